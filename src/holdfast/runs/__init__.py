"""The verbs, such as assess and harden. Each runs in steps that can be resumed: it divides the examples into shards,
stores the measurements and judges the gates.
"""
