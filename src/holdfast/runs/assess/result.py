"""The result of an assessment: evidence, metrics, gates and reports."""

from collections.abc import Callable, Iterator, KeysView, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import AttackRecord, Columns, Cost, Doubt, Evidence
from holdfast.core.spelling import suggestion
from holdfast.gates.grammar import parse
from holdfast.gates.judging import Doubts, Judgement, exit_code, judge
from holdfast.metrics.catalogue import estimates, missing
from holdfast.metrics.curves import EpsCurve, eps_curve
from holdfast.metrics.shares import notes_on_absent
from holdfast.reports.formats.csv import frame
from holdfast.reports.formats.html import notebook
from holdfast.reports.run import run_report
from holdfast.reports.summary import Json, later_gate, summary
from holdfast.reports.terminal import body, verdict
from holdfast.reports.tree import Report
from holdfast.reports.words import VERDICTS, measured
from holdfast.reports.write import rendered, write
from holdfast.runs.harness.verdict import DISTANCES
from holdfast.runs.stored.record import Manifest

if TYPE_CHECKING:
    from holdfast.explanation.explained import Explained


class UnknownMetric(KeyError):
    """Error for the name of an unknown metric. Unlike the message of other `KeyError`s, its message is shown without
    quotes.
    """

    def __str__(self) -> str:
        return str(self.args[0])


class Metrics(dict[str, Estimate]):
    """Dictionary of metrics by name. An unknown name raises `UnknownMetric`, whose message contains the most similar
    name and all names.
    """

    def __missing__(self, name: str) -> Estimate:
        similar = suggestion(str(name), self)
        available = f"this run has {', '.join(self) or 'none'}"
        raise UnknownMetric(f"there is no metric {name!r}; {f'{similar} ' if similar else ''}{available}")


ATTACKED = "attacked"
"""Name of the file of a run folder with the columns from which the verdict is computed, without its suffix."""
_WORST_CASE = (
    "id",
    "y",
    "prediction",
    "correct",
    "success",
    "broken_by",
    "adversarial_prediction",
    "right_probability",
    "queries",
    *DISTANCES,
)


@dataclass(frozen=True)
class Result:
    """The result of a finished assessment."""

    evidence: Evidence
    gates: tuple[Judgement, ...] = ()
    accepted_doubts: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    """information that is not part of the evidence: `verb`, `folder`, `created`, `command`, `hashes`, `versions`,
    `hardware`"""
    folder: Path | None = None
    """the run folder; None for a run in memory"""
    adversarial: Columns = field(default_factory=dict)
    """the adversarial input of each broken example as columns `id` and `x`, if the run stores them"""
    baseline: Evidence | None = None
    """evidence of another run, with which `regression` and `clean_accuracy_drop` compare; None without a baseline"""
    rotation: Mapping[str, Any] | None = None
    """the table of attackers of a model with rotation; None for other models"""
    training: Mapping[str, Any] | None = None
    """the verdict on the training of the model, for the assessment of a hardened model; None for other models"""
    explaining: "Callable[[Result, int | None], Explained] | None" = field(
        default=None, repr=False, compare=False
    )
    """function that opens the model and the data of the run again, and explains an example or the model; None if they
    are not known"""
    _asked: dict[str, Judgement] = field(default_factory=dict, init=False, repr=False, compare=False)
    """gates judged after the run, by their text, for the notebook view"""

    @cached_property
    def metrics(self) -> dict[str, Estimate]:
        """All metrics of the run by name, with confidence intervals."""
        return Metrics(estimates(self.evidence, baseline=self.baseline))

    @property
    def attacks(self) -> tuple[AttackRecord, ...]:
        """Attacks of the run in their order, each with the number of surviving examples before and after it."""
        return self.evidence.attacks

    @property
    def doubts(self) -> tuple[Doubt, ...]:
        """All doubts of the run with their states. A doubt is a reason why the measured robust accuracy may be too
        high.
        """
        return self.evidence.doubts

    @property
    def cost(self) -> Cost:
        """Numbers of forward and backward passes through the model, and the time of the run."""
        return self.evidence.cost

    @property
    def exit_code(self) -> int:
        """Exit code of the command line: 0 if all gates pass or there are none, 1 if a gate fails, 4 if the verdict is
        unclear.
        """
        return exit_code(judgement.verdict for judgement in self.gates)

    @property
    def worst_case(self) -> dict[str, Tensor]:
        """Columns with the strongest result against each example over all attacks and probes that count, including the
        distances of adversarial examples.
        """
        return worst_case(self.evidence)

    @property
    def table(self) -> str:
        """Attacks, metrics and doubts of the run as text for a terminal."""
        return body(self.report, colour=False)

    @property
    def curve(self) -> EpsCurve:
        """Robust accuracy as a function of eps, which is the largest change that the attacker may make.

        It is measured with `curve=True` or by a suite of minimum-norm attacks. Raises `UsageError` if it was not
        measured.
        """
        return eps_curve(self.evidence)

    def explain(self, index: int | None = None) -> "Explained":
        """Explain the example with the row number `index`, or without it the model: why it breaks, and what attacks
        use.

        The model and the data are opened again. Raises `UsageError` if the run does not state how;
        `holdfast.explain(model, x, y)` then does the same.
        """
        if self.explaining is None:
            raise UsageError(
                "this result does not state how its model and data are opened; give them, as in "
                "holdfast.explain(model, x, y, threat='linf:8/255')"
            )
        return self.explaining(self, index)

    @property
    def run_folder(self) -> Path | None:
        """Folder of the run: for a hardened model, the folder of the hardening, which contains its assessment."""
        return self.folder.parent if self.folder is not None and self.training is not None else self.folder

    def __getitem__(self, metric: str) -> Estimate:
        """Return a metric by name, as in `result["robust_accuracy"]`; `float()` of it is its value."""
        return self.metrics[metric]

    def __contains__(self, metric: object) -> bool:
        return metric in self.metrics

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def keys(self) -> KeysView[str]:
        """Return the names of the metrics of the run."""
        return self.metrics.keys()

    def gate(self, claim: str) -> Judgement:
        """Judge a further gate, such as `"robust_accuracy >= 0.5"`, on the evidence and the doubts of the run. Return
        the judged gate.

        Notebooks show it beside the gates of the run. It changes neither the verdict nor the exit code.
        """
        doubts = Doubts(self.doubts, self.accepted_doubts)
        judgement = judge(parse(claim), self.evidence, doubts, baseline=self.baseline)
        self._asked[judgement.claim.text] = judgement
        return judgement

    def summary(self) -> Json:
        """Return the content of all reports of the run as strict JSON."""
        return self._summary

    @cached_property
    def _summary(self) -> Json:
        return summary(
            self.evidence,
            metrics=self.metrics,
            gates=self.gates,
            accepted_doubts=self.accepted_doubts,
            run=self.about,
            rotation=self.rotation,
            training=self.training,
            notes=(*missing(self.evidence, self.baseline), *notes_on_absent(self.evidence)),
        )

    @cached_property
    def report(self) -> Report:
        """The report of the run."""
        return run_report(self._summary, self.evidence.columns)

    def to_html(self, path: str | Path) -> Path:
        """Write the HTML report of the run to `path`, and return the path."""
        return self._write(path, ".html")

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the summary of the run as JSON text. If `path` is given, the text is also written to this file."""
        if path is not None:
            self._write(path, ".json")
        return rendered(self.report, ".json")

    def to_pandas(self) -> Any:
        """Return the columns of the evidence as a `pandas.DataFrame` with one row for each example, indexed by id.

        `broken_by` is the attack or pass that broke the example; `robust` is true if the example is correct when clean
        and nothing broke it. The other columns, such as labels, predictions and distances, are those of the evidence.
        Raises `UsageError` if pandas is not installed.
        """
        return frame(self.evidence)

    def write(self, path: str | Path) -> Path:
        """Write a report of the run in the format of the file suffix, such as `.html`. Return the path."""
        return write(self.report, Path(path))

    def _write(self, path: str | Path, suffix: str) -> Path:
        if Path(path).suffix.lower() != suffix:
            raise UsageError(
                f"{str(path)!r} does not end in {suffix}; add the suffix, or call write() for other formats"
            )
        return self.write(path)

    def _repr_html_(self) -> str:
        """HTML for notebooks: verdict, gates, attacks, metrics, doubts with advice, and a few examples."""
        later = [later_gate(gate, self._summary) for gate in self._asked.values()]
        return notebook(run_report(self._summary, later_gates=later))

    def __str__(self) -> str:
        return verdict(self.report, colour=False).rstrip("\n")

    def __repr__(self) -> str:
        """Return the verdict and the main metrics in one line."""
        where = "" if self.folder is None else f", folder {str(self.folder)!r}"
        return f"<Result: {VERDICTS[self._summary['verdict']][1]}; {measured(self._summary)}{where}>"


def worst_case(evidence: Evidence, adversarial: Columns = MappingProxyType({})) -> dict[str, Tensor]:
    """Return the columns from which the verdict of a run is computed: the strongest result against each example, and as
    `adversarial.id` and `adversarial.x` the inputs `adversarial` that the run stores.
    """
    inputs = {f"adversarial.{name}": values for name, values in adversarial.items()}
    return {name: values for name, values in evidence.columns.items() if name in _WORST_CASE} | inputs


def about_of(
    manifest: Manifest, about: Mapping[str, Any], folder: Path | None, head: str | None
) -> dict[str, Any]:
    """Return the facts of a report that are not part of the evidence, such as digests, versions, hardware and the start
    time.
    """
    hashes = dict(manifest.digests) | ({} if head is None else {"chain": head})
    facts = {name: getattr(manifest, name) for name in ("verb", "versions", "hardware")}
    return {**facts, **about, "hashes": hashes, **({} if folder is None else {"folder": str(folder)})}
