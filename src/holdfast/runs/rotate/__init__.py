"""The rotate verb: a pool of parameter sets that take turns at serving, collected, generated, admitted and swapped.

Each step works on the pool's folder alone and may be cut short by a kill; the next call goes on.
"""
