"""Reports of a run: a summary, and all other formats, which are made from it."""
