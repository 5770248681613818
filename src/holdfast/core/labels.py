"""Error messages for labels that are not among the classes of a model."""


def off_range(lowest: int, highest: int, classes: int, name: str, *, remote: bool = False) -> str:
    """Return the error message for the data set `name`, whose labels range from `lowest` to `highest` and do not fit a
    model with `classes` classes. `remote` means a served model.
    """
    return (
        f"the labels of {name} range from {lowest} to {highest}, but the model has {classes} classes "
        f"(0 to {classes - 1}); {advice(lowest, highest, classes, remote=remote)}"
    )


def advice(lowest: int, highest: int, classes: int, *, remote: bool = False) -> str:
    """Return the part of an error message that suggests a remedy if labels from `lowest` to `highest` do not fit a
    model with `classes` classes.
    """
    if lowest == 1 and highest == classes:
        return "they appear to count from 1: subtract 1"
    trained = "check the label column, and that the model was trained on these classes"
    if not remote or lowest < 0:
        return trained
    return f"{trained}; if the server answers with classes, give --http-labels and --classes N"
