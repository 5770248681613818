"""Branch and bound: a region is divided until each part is proved or broken."""
