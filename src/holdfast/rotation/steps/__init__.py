"""The verb rotate: it collects a pool of parameter sets, generates new ones, admits them, and swaps the serving set.

Each step reads and writes the folder of the pool only. If a step was killed, the next call continues it.
"""
