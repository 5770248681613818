"""The rotate verb: collect a pool of parameter sets, generate new ones, admit them, and swap the serving set.

Each step works on the folder of the pool only. A step that was killed continues in the next call.
"""
