"""The audit of a model: it searches for the trigger of a backdoor, compares its size with those of clean networks, and
tests a stream of inputs with STRIP.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from holdfast.audits import backdoor_triggers
from holdfast.audits.backdoor_controls import (
    LEVEL,
    MAX_DIFFERENCE,
    MIN_CONTROLS,
    OUTSIDE,
    Controls,
    ControlTraining,
    SizeCache,
    controls_trained,
    predicted,
    ranked,
)
from holdfast.audits.backdoor_triggers import (
    BackdoorMeasurements,
    Compared,
    Control,
    Inversion,
    Inverted,
    Settings,
    Streamed,
    Strip,
    abnormality,
    joined,
    measured,
)
from holdfast.audits.finding import AuditVerdict, Finding, Picture, StoredSteps, Table, in_unit_range
from holdfast.core.batch import Batch, Data
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.evidence import Columns
from holdfast.core.model import Bounds, Classifier
from holdfast.core.types import Mask
from holdfast.runs.engine.progress import Notify
from holdfast.runs.engine.run import Run
from holdfast.statistics.intervals import mcnemar
from holdfast.threats.triggers import Trigger

CLEAN = 2000
"""Number of clean examples of the audit, at most: 5 % of the training examples of most data sets."""
_ROWS = 500
"""Number of inputs of the stream that are read at once."""


@dataclass(frozen=True)
class BackdoorRequest:
    """What the audit of a model compares, and with which settings."""

    batch: Batch
    """clean examples"""
    classes: int
    controls: Controls | None = None
    training: ControlTraining | None = None
    """training of controls; None if they are given or absent"""
    sizes: SizeCache | None = None
    """trigger sizes of controls that earlier audits measured"""
    stream: Data | None = None
    """inputs that the model received; None for none"""
    seed: int = 0
    inversion: Inversion = field(default_factory=Inversion)
    strip: Strip = field(default_factory=Strip)

    @property
    def n_controls(self) -> int:
        """Number of controls; 0 for none."""
        trained = 0 if self.training is None else MIN_CONTROLS
        return trained if self.controls is None else len(self.controls.files)

    def steps(self) -> tuple[str, ...]:
        """Return the names of the steps, in their order."""
        n = self.n_controls
        return (
            *((backdoor_triggers.TRAINING,) if self.training else ()),
            backdoor_triggers.ACCURACY,
            *(name for name, _ in backdoor_triggers.groups_of(self.classes)),
            *((*(f"control-{place}" for place in range(n)), backdoor_triggers.TRANSFER) if n else ()),
            *((backdoor_triggers.STRIP_CLEAN, backdoor_triggers.STRIP) if self.stream is not None else ()),
        )


def refuse_other_shape(batch: Batch, stream: Data) -> None:
    """Raise `UsageError` if the inputs of a stream cannot be mixed with clean examples."""
    shape = stream.read(0, 1).example_shape
    if shape != batch.example_shape:
        raise UsageError(
            f"inputs of the stream {stream.name} have shape {shape}, and the clean examples {batch.example_shape}; "
            "inputs of the same shape were expected",
            Remedy("stream"),
        )


def measure(run: Run, model: Classifier, request: BackdoorRequest, notify: Notify) -> None:
    """Take the steps of the audit that are not stored in the run.

    `model` is in eval mode. Raises `UsageError` or `TargetError` for controls of another architecture or copies.
    """
    steps = _Steps(run, model, request, notify)
    controls = request.controls
    if request.training is not None:
        step = backdoor_triggers.TRAINING
        controls = controls_trained(run, step, request.training, model, request.batch, notify)
    accuracies = steps.accuracies(controls)
    inverted = steps.inverted()
    if controls is not None:
        steps.compared(controls, inverted, accuracies)
    steps.streamed()


@dataclass(frozen=True)
class _Steps:
    run: Run
    model: Classifier
    request: BackdoorRequest
    notify: Notify

    @property
    def rng(self) -> Draws:
        return Draws(self.request.seed).at("backdoor")

    def accuracies(self, controls: Controls | None) -> backdoor_triggers.Accuracies:
        """Measure the clean accuracies of the model and of the controls."""
        batch = self.request.batch

        def right(model: Classifier) -> Mask:
            return predicted(model, batch.x) == batch.y

        def compute() -> Mapping[str, Any]:
            of_model = right(self.model)

            def beside(control: Classifier) -> backdoor_triggers.Beside:
                test = mcnemar(right(control), of_model)
                return {"ahead": test.only_first, "behind": test.only_second}

            of_controls = {} if controls is None else controls.each(self.model, beside)
            return {"model": float(of_model.double().mean()), "controls": of_controls}

        stored = self.run.document(backdoor_triggers.ACCURACY, compute)
        return {"model": stored["model"], "controls": dict(stored["controls"])}

    def inverted(self) -> Inverted:
        """Search the triggers of the model, one group of classes after the other."""
        groups = backdoor_triggers.groups_of(self.request.classes)
        return joined([self.run.stage(name, partial(self.group, of)).columns for name, of in groups])

    def group(self, classes: list[int]) -> Columns:
        """Search the triggers of some classes of the model."""
        return self.search(self.model, classes).columns()

    def search(self, model: Classifier, classes: list[int]) -> Inverted:
        """Search the triggers of some classes of a model."""
        batch = self.request.batch
        return self.request.inversion(model, batch.x, batch.y, classes, rng=self.rng.at("inversion"))

    def compared(
        self, controls: Controls, inverted: Inverted, accuracies: backdoor_triggers.Accuracies
    ) -> None:
        """Search the triggers of the controls that are comparable, if they are enough, and measure the success of the
        most unusual trigger on them. For the other controls, empty documents are stored.
        """
        beside = backdoor_triggers.controls_of(accuracies, len(self.request.batch))
        used = [control.name for control in beside if control.is_comparable]
        used = used if len(used) >= MIN_CONTROLS else []
        sizes = []
        for place, path in enumerate(controls.files):
            compute = partial(self.control, controls, place) if path.name in used else _no_sizes
            sizes.append(self.run.document(f"control-{place}", compute)["sizes"])
        if not used:
            self.run.document(backdoor_triggers.TRANSFER, dict)
            return
        rank = ranked(inverted.size, torch.tensor([each for each in sizes if each]))
        trigger, others = inverted.trigger(rank.label), self.request.batch.y != rank.label
        stamped = trigger.stamped(self.request.batch.x[others], self.model.bounds)

        def success(control: Classifier) -> float:
            return float((predicted(control, stamped) == rank.label).double().mean())

        self.run.document(backdoor_triggers.TRANSFER, lambda: controls.take(used).each(self.model, success))

    def control(self, controls: Controls, place: int) -> Mapping[str, Any]:
        """Search the triggers of a control, unless an earlier audit did with the same settings."""
        cache, digest = self.request.sizes, controls.digests[place]
        known = {} if cache is None else cache.read()
        if digest in known:
            return {"sizes": known[digest]}
        self.notify(f"searching the triggers of control {place + 1} of {len(controls.files)}")
        inverted = self.search(controls.opened(place, self.model), list(range(self.request.classes)))
        sizes = inverted.size.tolist()
        if cache is not None:
            cache.add(digest, sizes)
        return {"sizes": sizes}

    def streamed(self) -> None:
        """Measure the entropies of the stream, and those of one half of the clean examples; the other half is laid over
        them.
        """
        if self.request.stream is None:
            return
        batch, stream = self.request.batch, self.request.stream
        order = (
            self.rng.at("strip", "halves").bits(batch.ids.cpu()).argsort()
        )  # a file may be sorted by class
        measured, laid_over = order.to(batch.x.device).tensor_split(2)

        def entropies(inputs: Batch) -> Columns:
            overlays, rng = batch.x[laid_over], self.rng.at("strip")
            entropy = self.request.strip.entropy(self.model, inputs.x, inputs.ids, overlays, rng=rng)
            return {"id": inputs.ids.cpu(), "entropy": entropy.cpu()}

        def of_stream() -> Columns:
            starts = range(0, len(stream), _ROWS)
            pieces = [entropies(stream.read(start, start + _ROWS).to(batch.x.device)) for start in starts]
            return {name: torch.cat([piece[name] for piece in pieces]) for name in ("id", "entropy")}

        self.run.stage(backdoor_triggers.STRIP_CLEAN, lambda: entropies(batch.take(measured)))
        self.run.stage(backdoor_triggers.STRIP, of_stream)


def _no_sizes() -> Mapping[str, Any]:
    """The document of a control that is not compared."""
    return {"sizes": []}


_NAMED = 5
"""Number of controls that a sentence names."""


def left_out_of(measured: BackdoorMeasurements) -> str:
    """Return the part of a headline that names the controls that are left out; empty if there are none."""
    names = [repr(control.name) for control in measured.left_out]
    return f" (left out: {_first(names)})" if names else ""


def sentences(measured: BackdoorMeasurements) -> tuple[str, ...]:
    """Return the sentences about the controls: which are left out, how far the others differ, and what is missing."""
    if not measured.controls:
        return ()
    less = sum(control.is_below for control in measured.controls)
    apart = ""
    if measured.used:
        apart = (
            "The clean accuracies of the model and of the compared controls differ by at most "
            f"{100 * measured.largest_difference:.1f} points."
        )
    below = ""
    if less:
        below = f"{less} of the {len(measured.controls)} controls are less accurate than the model, as if trained less."
    trained = _trained(measured) if measured.trained else ""
    return tuple(
        part for part in (_left_out(measured), apart, below, trained, _missing(measured, less)) if part
    )


def _left_out(measured: BackdoorMeasurements) -> str:
    described = [f"{control.name!r} ({_beside(control)})" for control in measured.left_out]
    if not described:
        return ""
    return (
        f"The accuracy of the model is {100 * measured.accuracy:.1f} %. Left out are the controls for which the whole "
        f"interval of the difference is beyond {100 * MAX_DIFFERENCE:.0f} points: {_first(described)}."
    )


def _beside(control: Control) -> str:
    low, high = 100 * control.difference.low, 100 * control.difference.high
    return f"{100 * control.accuracy:.1f} %, {low:+.1f} to {high:+.1f} points"


def _first(items: Sequence[str]) -> str:
    named = ", ".join(items[:_NAMED])
    return named if len(items) <= _NAMED else f"{named}, and {len(items) - _NAMED} more"


def _trained(measured: BackdoorMeasurements) -> str:
    fewest, most = min(measured.trained), max(measured.trained)
    if fewest == most:
        return f"The audit trained each control for {most} epoch{'s' * (most != 1)}."
    return f"The audit trained the controls for {fewest} to {most} epochs."


def _missing(measured: BackdoorMeasurements, less: int) -> str:
    """What the user can do if controls are missing, or are less accurate because the time ended."""
    if measured.trained and less:
        return (
            "The time of train_controls ended before they were as accurate; with a longer time, their training "
            "continues."
        )
    missing = MIN_CONTROLS - len(measured.used)
    if missing <= 0:
        return ""
    networks = "network" if missing == 1 else "networks"
    return f"Give {missing} more {networks} that were trained like the model (controls)."


def controls_table(measured: BackdoorMeasurements) -> Table:
    """Return the table of the controls with their accuracies and smallest ratios."""
    compared = measured.compared
    ratios = iter([] if compared is None else compared.rank.of_controls)
    rows = []
    for control in measured.controls:
        difference = control.difference
        ratio: str | float = ""
        if compared is not None and control.is_comparable:
            ratio = next(ratios)
        accuracies = (control.accuracy, difference.value, difference.low, difference.high)
        rows.append((control.name, *accuracies, ratio, "yes" if control.is_comparable else "left out"))
    return Table(
        "Control networks",
        ("control", "accuracy", "difference", "low", "high", "smallest ratio", "compared"),
        rows,
        "The difference is that to the accuracy of the model on the same examples, with its 95 % interval. A control "
        f"is left out if the whole interval is beyond {100 * MAX_DIFFERENCE:.0f} points.",
    )


OWN = 0.1
"""Largest median success on the controls of a trigger of the model's own. Planted triggers reached 0.1 to 6 %, and the
smallest triggers of clean networks 22 to 90 %, which are natural features of their class."""
_TRIGGER = "trigger"
_LISTED = 20
"""Number of inputs of a stream that the report lists."""

_SEARCHED = (
    "Only triggers that change the same values of every input are searched. Warped inputs, triggers that depend on the "
    "input, and backdoors that were trained against this search are not found."
)
_UNDETECTABLE = "Backdoors exist that no test of inputs and outputs can detect."
_UNCOMPARED = (
    "Without control networks the sizes cannot be judged. The index exceeds 2 on clean networks too: it is not a "
    "p-value, because the spread of so few classes is not known well."
)
_TRAINED_OTHERWISE = (
    "p holds for a clean network that was trained like the controls. If the model was trained on other data or in "
    "another way, a small p may have this reason."
)


def suspect(measured: BackdoorMeasurements) -> Trigger:
    """Return the trigger of the class that is most unusual: that of the smallest ratio to the controls, or without
    controls the smallest one.
    """
    return measured.inverted.trigger(_label(measured))


def _label(measured: BackdoorMeasurements) -> int:
    inverted, compared = measured.inverted, measured.compared
    return int(inverted.classes[inverted.size.argmin()]) if compared is None else compared.rank.label


def concluded(steps: StoredSteps) -> Finding:
    """Return the finding of an audit from its stored steps."""
    finding = finding_of(measured(steps), steps.settings(Settings)["class_names"])
    return replace(finding, pictures=steps.pictures(finding.pictures))


def finding_of(measured: BackdoorMeasurements, names: Sequence[str] | None = None) -> Finding:
    """Return the finding of an audit from its measurements. `names` are those of the classes."""
    verdict, headline, reasons = _verdict(measured, names)
    compared, streamed = measured.compared, measured.streamed
    place = measured.inverted.classes.tolist().index(_label(measured))
    facts: dict[str, Any] = {
        "class": _label(measured),
        "size": float(measured.inverted.size[place]),
        "success": float(measured.inverted.success[place]),
        "index": float(abnormality(measured.inverted.size)[place]),
        "accuracy": measured.accuracy,
        "examples": measured.examples,
        "sizes": measured.inverted.size.tolist(),
    }
    if measured.controls:
        facts |= {
            "controls": len(measured.used),
            "left_out": {control.name: control.accuracy for control in measured.left_out},
            "less_accurate_controls": sum(control.is_below for control in measured.controls),
            "largest_difference_of_accuracy": measured.largest_difference,
        }
    if measured.trained:
        facts["epochs_of_controls"] = list(measured.trained)
    if compared is not None:
        facts |= {
            "p": compared.rank.p,
            "ratio": compared.rank.ratio,
            "ratios_of_controls": list(compared.rank.of_controls),
            "prediction_limit": compared.rank.limit,
            "success_on_controls": median(compared.transfer),
        }
    tables = [_classes(measured, names)]
    if measured.controls:
        tables.append(controls_table(measured))
    if streamed is not None:
        n_suspect = int(streamed.suspect.sum())
        facts |= {"stream": len(streamed.ids), "stream_suspect": n_suspect, "threshold": streamed.threshold}
        reasons = (*reasons, _of_stream(streamed))
        tables.append(_inputs(streamed))
    limits = (_SEARCHED, _UNDETECTABLE, *(() if compared is None else (_TRAINED_OTHERWISE,)))
    return Finding(
        verdict, headline, reasons, facts, tables=tables, pictures=_pictures(measured, names), limits=limits
    )


def _verdict(
    measured: BackdoorMeasurements, names: Sequence[str] | None
) -> tuple[AuditVerdict, str, tuple[str, ...]]:
    label, compared = _label(measured), measured.compared
    named = _named(label, names)
    place = measured.inverted.classes.tolist().index(label)
    index = float(abnormality(measured.inverted.size)[place])
    size = f"The smallest trigger of class {named} has the size {float(measured.inverted.size[place]):.1f}"
    success = f"and succeeds on {100 * float(measured.inverted.success[place]):.1f} % of clean examples"
    if compared is None:
        text = "there are no control networks with which the triggers can be compared"
        if measured.controls:
            n = len(measured.used)
            text = (
                f"only {n} control networks can be compared with the model and {MIN_CONTROLS} are needed: "
                f"{MIN_CONTROLS - n} missing{left_out_of(measured)}"
            )
        return (
            "unclear",
            text,
            (*sentences(measured), f"{size} {success}; its index is {index:.1f}.", _UNCOMPARED),
        )
    rank, transfer = compared.rank, 100 * median(compared.transfer)
    smaller = sum(ratio <= rank.ratio for ratio in rank.of_controls)
    n = len(rank.of_controls)
    relative = (
        f"Relative to the triggers of this class in the controls it is {rank.ratio:.2f}; the smallest ratio of the "
        f"controls is {min(rank.of_controls):.2f}, and that of a further clean network is below {rank.limit:.2f} with "
        f"a probability of {100 * OUTSIDE:g} % if their logarithms are normally distributed."
    )
    reasons = (
        f"{size} {success}. {relative}",
        f"{smaller} of {n} controls have as small a ratio: p = {rank.p:.3f}, flagged at {LEVEL} or less.",
        f"On the controls, it succeeds on {transfer:.1f} % of examples (median), flagged at {100 * OWN:.0f} % or less.",
        *sentences(measured),
        f"The index is {index:.1f}. It exceeds 2 on clean networks too, and is not used.",
    )
    verdict, text = _decided(compared, named, smaller)
    return verdict, text + left_out_of(measured), reasons


def _decided(compared: Compared, named: str, smaller: int) -> tuple[AuditVerdict, str]:
    """The verdict and its sentence for a class; `smaller` controls have as small a ratio."""
    rank, n = compared.rank, len(compared.rank.of_controls)
    if rank.p > LEVEL:
        return "not flagged", f"no trigger is unusually small among those of {n} control networks"
    if median(compared.transfer) > OWN:
        text = "also succeeds on the controls: it is a natural feature of the class, and not the model's own"
        return "unclear", f"the smallest trigger of class {named} {text}"
    of = f"all {n}" if not smaller else f"{n - smaller} of {n}"
    text = f"class {named} has a trigger that is smaller than expected from {of} control networks"
    if rank.ratio >= rank.limit:
        return "unclear", f"{text}, but not by more than clean networks may differ"
    return "flagged", text


def _named(label: int, names: Sequence[str] | None) -> str:
    if names is None or label >= len(names) or names[label] == str(label):
        return str(label)
    return f"{label} ({names[label]})"


def _classes(measured: BackdoorMeasurements, names: Sequence[str] | None) -> Table:
    inverted, compared = measured.inverted, measured.compared
    index = abnormality(inverted.size).tolist()
    rows = []
    for place, label in enumerate(inverted.classes.tolist()):
        cells = (
            _named(label, names),
            float(inverted.size[place]),
            float(inverted.success[place]),
            index[place],
        )
        ratio = () if compared is None else (compared.rank.ratios[place],)
        rows.append((*cells, *ratio))
    return Table(
        "Smallest trigger of each class",
        ("class", "size", "success", "index", *(() if compared is None else ("ratio to controls",))),
        rows,
        "The size is the sum of the mask, that is the number of values that are replaced. The index is that of Neural "
        "Cleanse. A ratio is relative to the controls and to the other classes, 1 if the size is as usual.",
    )


def _of_stream(streamed: Streamed) -> str:
    n, k = len(streamed.ids), int(streamed.suspect.sum())
    return (
        f"STRIP: {k} of {n} inputs of the stream have an entropy below {streamed.threshold:.3f}; of clean inputs 1 % "
        "have. This does not change the verdict."
    )


def _inputs(streamed: Streamed) -> Table:
    order = streamed.entropy.argsort(stable=True)[:_LISTED]
    rows = [
        (int(streamed.ids[row]), float(streamed.entropy[row]), "yes" if streamed.suspect[row] else "no")
        for row in order
    ]
    return Table(
        "Inputs of the stream with the lowest entropy",
        ("row", "entropy", "suspect"),
        rows,
        "Mean entropy of the predictions under other images. It is low if something in the input decides the class.",
    )


def _pictures(measured: BackdoorMeasurements, names: Sequence[str] | None) -> tuple[Picture, ...]:
    named = _named(_label(measured), names)
    captions = ("trigger", "mask", "clean example", f"with trigger, predicted as {named}")
    return (Picture(_TRIGGER, f"The smallest trigger of class {named}", captions),)


def images_of(batch: Batch, trigger: Trigger, bounds: Bounds) -> dict[str, Tensor]:
    """Return the images of a trigger: its pattern, its mask, and an example without and with it."""
    x = batch.x[batch.y != trigger.target][:1].cpu()
    if x.dim() != 4:
        return {}
    low, high = bounds.like(x)
    shown = (torch.stack([trigger.pattern, x[0], trigger.stamped(x, bounds)[0]]) - low) / (high - low)
    mask = trigger.mask.expand(x.shape[1:])
    images = torch.stack([mask * shown[0], mask, shown[1], shown[2]])
    return {_TRIGGER: in_unit_range(images, 0.0, 1.0)}
