"""What a run found: the evidence, what is read from it, and what was decided."""

from collections.abc import Iterator, KeysView, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import AttackRecord, Columns, Cost, Doubt, Evidence
from holdfast.core.spelling import suggestion
from holdfast.gates.grammar import parse
from holdfast.gates.judging import Doubts, Judgement, exit_code, judge
from holdfast.metrics.catalogue import estimates, missing
from holdfast.metrics.curves import EpsCurve, eps_curve
from holdfast.reports.html import fragment
from holdfast.reports.summary import Json, asked_gate, summary, to_json
from holdfast.reports.table import frame
from holdfast.reports.terminal import tables, verdict
from holdfast.reports.words import VERDICTS, measured
from holdfast.reports.write import write


class UnknownMetric(KeyError):
    """A name that is no metric of this run; the message stands as it is, without the quotes of a `KeyError`."""

    def __str__(self) -> str:
        return str(self.args[0])


class Metrics(dict[str, Estimate]):
    """Metrics by name; a name that is not among them is answered with the nearest and with those that are."""

    def __missing__(self, name: str) -> Estimate:
        near = suggestion(str(name), self)
        known = f"this run has {', '.join(self) or 'none'}"
        raise UnknownMetric(f"there is no metric {name!r}; {f'{near} ' if near else ''}{known}")


_WORST_CASE = ("id", "y", "prediction", "correct", "success", "broken_by", "adversarial_prediction")


@dataclass(frozen=True)
class Result:
    """An assessment that is over."""

    evidence: Evidence
    gates: tuple[Judgement, ...] = ()
    accepted_doubts: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    """what the evidence does not know: `verb`, `folder`, `created`, `command`, `hashes`, `versions`, `hardware`"""
    folder: Path | None = None
    """where all of it is kept; None where it was measured in memory"""
    adversarial: Columns = field(default_factory=dict)
    """every successful input, as `id` and `x`, where the run was asked to keep them"""
    baseline: Evidence | None = None
    """what `regression` and `clean_accuracy_drop` compare with"""
    rotation: Mapping[str, Any] | None = None
    """the table of attackers of a model whose parameter sets take turns at serving; None of any other"""
    _asked: dict[str, Judgement] = field(default_factory=dict, init=False, repr=False, compare=False)
    """gates that were asked after the run, by their claims, for a notebook to show"""

    @cached_property
    def metrics(self) -> dict[str, Estimate]:
        """Every metric that this run brings, by name, with its interval."""
        return Metrics(estimates(self.evidence, baseline=self.baseline))

    @property
    def attacks(self) -> tuple[AttackRecord, ...]:
        """The attacks in their order, with what stood before and after each."""
        return self.evidence.attacks

    @property
    def doubts(self) -> tuple[Doubt, ...]:
        """Why the number might flatter the model."""
        return self.evidence.doubts

    @property
    def cost(self) -> Cost:
        """What was asked of the model, and the time it took."""
        return self.evidence.cost

    @property
    def exit_code(self) -> int:
        """What the command line ends with: 0 pass or no gate, 1 a gate failed, 4 unclear."""
        return exit_code(judgement.verdict for judgement in self.gates)

    @property
    def worst_case(self) -> dict[str, Tensor]:
        """Columns of what became of each example over the whole suite, distances included."""
        columns = self.evidence.columns
        return {
            name: values
            for name, values in columns.items()
            if name in _WORST_CASE or name.startswith("distance") or name in {"queries", "right_probability"}
        }

    @property
    def table(self) -> str:
        """The attacks, the metrics and the doubts as text."""
        return tables(self.summary(), colour=False)

    @property
    def curve(self) -> EpsCurve:
        """Robust accuracy against eps, where the run measured it (`curve=True`, or a suite of minimum-norm attacks).

        Raises `UsageError` where it did not.
        """
        return eps_curve(self.evidence)

    def __getitem__(self, metric: str) -> Estimate:
        """A metric by its name, as in `result["robust_accuracy"]`; `float()` of it is its value."""
        return self.metrics[metric]

    def __contains__(self, metric: object) -> bool:
        return metric in self.metrics

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def keys(self) -> KeysView[str]:
        """The names of the metrics that this run brings."""
        return self.metrics.keys()

    def gate(self, claim: str) -> Judgement:
        """Judge another claim, such as `"robust_accuracy >= 0.5"`, on the same evidence and doubts.

        A notebook shows it beside the gates of the run; it changes neither the verdict nor the exit code.
        """
        doubts = Doubts(self.doubts, self.accepted_doubts)
        judgement = judge(parse(claim), self.evidence, doubts, baseline=self.baseline)
        self._asked[judgement.claim.text] = judgement
        return judgement

    def summary(self) -> Json:
        """What every report is made from, in the types of strict JSON."""
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
            notes=missing(self.evidence, self.baseline),
        )

    def to_html(self, path: str | Path) -> Path:
        """Write the page."""
        return self._write(path, ".html")

    def to_json(self, path: str | Path | None = None) -> str:
        """The summary as JSON text, written to `path` where one is given."""
        if path is not None:
            self._write(path, ".json")
        return to_json(self._summary)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` of one row an example, its index the ids: labels, predictions, distances and the rest.

        `broken_by` is the attack or pass that broke the example, and `robust` says whether none did and the model was
        right. The other columns are those of the evidence. Raises `UsageError` where pandas is not installed.
        """
        return frame(self.evidence)

    def write(self, path: str | Path) -> Path:
        """Write the report that the suffix asks for: `.html .json .xml .sarif .md .csv`."""
        write(self._summary, self.evidence.columns, Path(path))
        return Path(path)

    def _write(self, path: str | Path, suffix: str) -> Path:
        if Path(path).suffix.lower() != suffix:
            raise UsageError(
                f"{str(path)!r} does not end in {suffix}; name it so, or call write() for other formats"
            )
        return self.write(path)

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict, gates, attacks, metrics, doubts with what to do, and a few examples."""
        return fragment(self._summary, [asked_gate(gate, self._summary) for gate in self._asked.values()])

    def __str__(self) -> str:
        return verdict(self._summary, colour=False).rstrip("\n")

    def __repr__(self) -> str:
        """The verdict and what was measured, in one line."""
        where = "" if self.folder is None else f", folder {str(self.folder)!r}"
        return f"<Result: {VERDICTS[self._summary['verdict']][1]}; {measured(self._summary)}{where}>"


def about_of(
    manifest: Mapping[str, Any], about: Mapping[str, Any], folder: Path | None, head: str | None
) -> dict[str, Any]:
    """What a report says beside the evidence."""
    hashes = dict(manifest["digests"]) | ({} if head is None else {"chain": head})
    known = {name: manifest[name] for name in ("verb", "versions", "hardware")}
    return {**known, **about, "hashes": hashes, **({} if folder is None else {"folder": str(folder)})}
