"""Side-by-side measurements: Holdfast, the naive floor and the peers that install."""
