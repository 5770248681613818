"""Doubts: reasons for which a number might flatter the model. `names` is the catalogue and needs no torch.

`probing` says what to run and on which examples, `concluding` turns what came back into states; both are pure, and the
harness does the running. They are about what the suite has not spent, and never change the verdict's numbers.
"""
