"""Whether a change of the code leaves numbers and public names as they were.

    python -m benchmarks.unchanged save FOLDER [--of COMMIT] [--only KIND]...
    python -m benchmarks.unchanged compare BEFORE AFTER
    python -m benchmarks.unchanged time COMMIT [--rounds N]

`save` computes what is missing in the folder, so that it can be stopped: verdict columns of five suites on four
networks, weights of every recipe, draws of a generator, public names, help texts, and the JSON of one run of each verb.
`compare` prints what differs. `time` alternates this version with that of a commit.
"""
