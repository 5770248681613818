"""Whether the tests notice faults: 60 faults at places that some test executes, and the tests that fail with them.

    python -m benchmarks.faults choose TREE     # draws places in a tree, and writes faults.json
    python -m benchmarks.faults trace TREE      # runs the tests once, and records which of them execute which place
    python -m benchmarks.faults run TREE --column after  # plants each fault, and runs the tests that execute its place
    python -m benchmarks.faults place TREE      # prints the faults whose line is not found in a tree
    python -m benchmarks.faults report          # prints the table of the record

TREE is the root of a separate work tree, because its files are changed while the tests run. `trace` and `run` continue
where they were stopped. A fault is one changed line: its file, the function around it, the text of the line and that of
its replacement. It is found again by this text after code has moved; `moved.json` has those whose text has changed.

A fault is run with the tests that execute its place, quick ones first and short ones first, until one fails, for at
most two minutes. A test that fails without the fault as well does not count.
"""
