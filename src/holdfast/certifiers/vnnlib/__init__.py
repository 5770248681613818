"""Reads VNN-LIB files, which ask whether inputs of networks exist that satisfy constraints on inputs and outputs."""
