"""The doubt `input` is raised if with another scale, normalisation or order of the axes, or with labels reduced by 1
if none is 0, the model is right on at least 15 points more of a sample of 128 examples; or the data use at most a
tenth of the range of the bounds.

It is measured by `runs/assess/measuring.py`.
"""

from holdfast.doubts.protocol import DoubtTest

TEST = DoubtTest(
    title="The data do not fit the model",
    meaning="The accuracy is much higher with another value range, normalisation or layout of the same data, or with "
    "1 subtracted from the labels, or the data fill only a small part of the declared bounds. The attacks ran "
    "on a different task than that of the training.",
    advice="Declare the preprocessing of your training: --mean and --std, --data-normalised, --bounds or --layout. "
    "Labels count from 0.",
    conclude=lambda case: case.context.input,
    free=True,
    meaningless=2,
)
