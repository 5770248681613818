"""Whether a change of the code leaves numbers and public names as they were.

    python -m benchmarks.unchanged save FOLDER [--of COMMIT] [--only KIND]...
    python -m benchmarks.unchanged compare BEFORE AFTER
    python -m benchmarks.unchanged time COMMIT [--rounds N] [--only NAME]...
    python -m benchmarks.unchanged start COMMIT [--rounds N]

`save` computes what is missing in the folder, so that it can be stopped: verdict columns of five suites on four
networks, weights of every recipe, draws of a generator, public names, help texts, the JSON of one run of each verb,
and results of every method of certification, of every audit, of `explain`, of `monitor` and of a guard, in Python and
behind the server. The items of this checkout are computed with the package of the commit, so they import only names
that the documentation shows. `compare` prints what differs.

`time` compares the CPU time of attacks, a training, CROWN and requests to a server with that of a commit, in alternated
pairs, and `start` that of an import, of help texts and of a refused setting.
"""
