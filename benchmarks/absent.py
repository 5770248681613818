"""What a measurement lacks here: a peer, a network, a data set."""


class Absent(Exception):
    """A row, a network or a peer cannot be had here; the text says why and how to get it."""
