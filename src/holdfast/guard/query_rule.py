"""The guard as an attacked model: the stateful query detector as a rule with attacks that test it, and the model with
the stateless detectors as one network that rejects inputs.
"""

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from holdfast.attacks.protocol import Attack
from holdfast.attacks.rays import RayS
from holdfast.attacks.square import Square
from holdfast.attacks.suites import is_possible
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Norm
from holdfast.core.draws import Draws
from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.core.evidence import Table
from holdfast.core.meter import Answering, margin
from holdfast.core.model import Classifier, per_channel
from holdfast.core.outputs import with_detector
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs, PerExample
from holdfast.guard.detectors.evasion import OARS, Base, CoarsePatterns, InformedSquare
from holdfast.guard.detectors.outputs import Observation
from holdfast.guard.detectors.queries import QueryDetector, QuerySettings, Screened
from holdfast.guard.guard import GuardPipeline, QueryResult
from holdfast.guard.rules import InputDefence, InputSchema, Releasing, release_of
from holdfast.guard.state_in_memory import MemoryState
from holdfast.io.files import open_regular
from holdfast.runs.harness.target import PreparedModel
from holdfast.runs.store.encryption import KEY_BYTES
from holdfast.runs.store.files import create_private

KEY_VARIABLE = "HOLDFAST_GUARD_KEY"
"""environment variable with the key of a guard; it takes precedence over the key file"""
_HEX = re.compile(f"[0-9a-fA-F]{{{2 * KEY_BYTES}}}")


@dataclass(frozen=True)
class QueryRule:
    """A query detector that receives inputs in the range of the schema, scaled to [0, 1]."""

    detector: QueryDetector
    schema: InputSchema
    clock: Callable[[], float] = time.time
    """function that returns the time in seconds"""

    def score(self, x: Tensor, principals: Sequence[str], sent: Tensor | None = None) -> QueryResult:
        """Return the scores (n) of queries (n, *shape), and add them to the state. `sent` are the queries as they were
        sent, if `x` was rounded.
        """
        result = self.detector.examine(
            scaled(x, self.schema), principals, self.clock(), x if sent is None else sent
        )
        lost = any(detail.lost for detail in result.details)
        return QueryResult(torch.from_numpy(result.scores), self.detector.state.fail if lost else None)


def scaled(x: Tensor, schema: InputSchema) -> Tensor:
    """Return inputs scaled from the range of the schema to [0, 1], in float32. Rows of symbols are unchanged."""
    x = x.float()
    if schema.kind != "numbers" or (schema.low == (0.0,) and schema.high == (1.0,)):
        return x
    low, high = (per_channel(ends, x) for ends in (schema.low, schema.high))
    return (x - low) / (high - low)


def guard_key(path: Path | None) -> bytes:
    """Return the key of a guard from the environment or from its key file, which is written if it does not exist.

    The key file is that of the settings with the ending `.key`. Without a file of settings the key is random, and lost
    with the process. Raises `TargetError` if other users may read the file or if it contains no key, and
    `UsageError` for an invalid key in the environment.
    """
    text = os.environ.get(KEY_VARIABLE)
    if text is not None:
        return _parsed(text, KEY_VARIABLE, UsageError)
    if path is None:
        return secrets.token_bytes(KEY_BYTES)
    file = key_file_of_guard(path)
    try:
        if not os.path.lexists(file):
            create_private(file, secrets.token_hex(KEY_BYTES).encode() + b"\n")
        with os.fdopen(
            open_regular(file, follow=True), "rb"
        ) as opened:  # the file that is tested is the one that is read
            mode = os.fstat(opened.fileno()).st_mode & 0o777
            text = opened.read(1024).decode("ascii", "replace").strip()
    except FileExistsError:  # another process was faster
        return guard_key(path)
    except OSError as error:
        raise TargetError(
            f"the key of the guard {str(file)!r} cannot be read or written: {error.strerror}; set {KEY_VARIABLE}"
        ) from error
    if os.name != "nt" and mode & 0o077:
        raise TargetError(
            f"{str(file)!r} has mode {mode:04o}, so that other users can read the key; run chmod 600 on it, or remove "
            "it and the state of the query detector for a new key"
        )
    return _parsed(text, repr(str(file)), TargetError)


def key_file_of_guard(path: Path) -> Path:
    """Return the path of the key file of a guard whose settings are in `path`."""
    return path.with_suffix(".key")


def derived_key(key: bytes, purpose: str) -> bytes:
    """Return a key for one purpose, from which neither the key of the guard nor keys of other purposes follow."""
    return hmac.new(key, f"holdfast guard {purpose}".encode(), hashlib.sha256).digest()


def _parsed(text: str, source: str, error: type[HoldfastError]) -> bytes:
    if not _HEX.fullmatch(text):
        raise error(
            f"{source} contains {len(text)} characters that are not a key; {2 * KEY_BYTES} hex digits were expected, "
            f'as python -c "import secrets; print(secrets.token_hex({KEY_BYTES}))" generates them'
        )
    return bytes.fromhex(text)


PLAIN, ADAPTIVE, INFORMED = "plain", "adaptive", "informed"
"""the attack that does not know the detectors, the one that adapts to rejections, and the one that knows the settings
of the query detector"""
PATTERNS, POPULATION, LABELS = "patterns", "population", "labels"
"""the attacks with coarse patterns, which adapt to rejections too, and the one that needs labels only"""
ROUNDED, LABELLED = "rounded", "labelled"
RELEASES = {ROUNDED: release_of("2"), LABELLED: release_of("labels")}
"""what clients receive of the scores in further arms, without the detectors"""


@dataclass(frozen=True)
class QueryTrials:
    """Attacks examples with Square, which does not know the detectors, with OARS, which adapts to rejections, and under
    Linf with coarse patterns, with RayS, and with `InformedSquare`, which knows the query detector. Each is run with
    and without the detectors, and without them also on rounded scores, and on labels if it can use them. Every attack
    begins with an empty state, and every query comes from a new client.
    """

    settings: QuerySettings | None = field(default_factory=QuerySettings)
    """settings of the query detector; None for a guard that has only stateless detectors, which are a part of the model
    """
    n: int = 10
    """number of examples"""
    queries: int = 1000
    """largest number of queries for each example"""

    @property
    def identity(self) -> Mapping[str, object]:
        """The settings as plain values."""
        return asdict(self)

    def __call__(self, target: PreparedModel, batch: Batch, threat: ThreatModel, seed: int) -> Table:
        """Return for each example that is correct when clean the numbers of queries until it was broken and until a
        query was rejected, 0 for never, as in `adaptive_with_broken`.
        """
        correct = margin(target.judged_logits(target.logits(batch.x), batch), batch) > 0
        batch, rng = batch.take(correct), Draws(seed).at("stateful")
        limited = replace(threat, queries=min(self.queries, threat.queries or self.queries))
        columns = {"id": batch.ids.cpu()}
        for name, attack in self._attacks(threat).items():
            for arm in ("without", "with"):
                screened = self._screened(target, batch, threat, seed, guarded=arm == "with")
                model = Answering(screened, batch) if name in (PLAIN, LABELS) else screened
                if len(batch):
                    attack(model, batch, limited, rng=rng.at(name))
                columns[f"{name}_{arm}_broken"] = screened.broken_at.cpu()
                columns[f"{name}_{arm}_rejected"] = screened.rejected_at.cpu()
            for arm, release in RELEASES.items():
                if arm == LABELLED and name not in (PATTERNS, LABELS):
                    continue  # without scores, the others do not know where to go
                screened = self._screened(target, batch, threat, seed, guarded=False)
                if attack.needs == "labels":
                    screened.broken_at = columns[f"{name}_without_broken"]
                elif len(batch):
                    attack(Releasing(screened, release), batch, limited, rng=rng.at(name))
                columns[f"{name}_{arm}_broken"] = screened.broken_at.cpu()
        return Table("example", columns)

    def _attacks(self, threat: ThreatModel) -> dict[str, Attack]:
        is_l2 = isinstance(threat.constraint, L2)
        base: Base = "hop_skip_jump" if is_l2 else "square"
        attacks: dict[str, Attack] = {
            PLAIN: Square(queries=self.queries),
            ADAPTIVE: OARS(base=base, queries=self.queries),
        }
        if not is_l2:
            attacks[PATTERNS] = CoarsePatterns("fit", adaptive=True, queries=self.queries)
            attacks[POPULATION] = CoarsePatterns("population", adaptive=True, queries=self.queries)
            attacks[LABELS] = RayS(queries=self.queries)
        if self.settings is not None and not is_l2:
            attacks[INFORMED] = InformedSquare(self.settings, queries=self.queries)
        return attacks

    def _screened(
        self, target: PreparedModel, batch: Batch, threat: ThreatModel, seed: int, *, guarded: bool
    ) -> Screened:
        assert isinstance(threat.constraint, Norm)
        detector = None
        if guarded and self.settings is not None:
            # reproducible; the attacks do not use the key
            key = hashlib.sha256(f"holdfast stateful {seed}".encode()).digest()
            detector = QueryDetector(key, MemoryState(), tuple(batch.x.shape[1:]), self.settings)
        return Screened(target.original, batch, threat.constraint, detector, alone=not guarded)


def measurable(threat: ThreatModel, access: Access) -> bool:
    """Return whether the trials support a threat model and a model with `access`: a ball of Linf or L2, access to
    scores, and no target.
    """
    constraint = threat.constraint
    is_ball = (
        is_possible("black-box", constraint, "labels")
        and constraint.is_ball
        and constraint.eps < float("inf")
    )
    return is_ball and threat.gives("scores") and access in ("scores", "gradients") and threat.goal is None


class Defended(nn.Module):
    """Network that squeezes its inputs, as the guard does, before it calls a classifier."""

    def __init__(self, model: Classifier, defence: InputDefence | None) -> None:
        super().__init__()
        self.model, self.defence = model, defence

    def forward(self, x: Inputs) -> Tensor:
        """Return the logits (n, classes) of the squeezed inputs."""
        logits: Tensor = self.model(x if self.defence is None else self.defence(x))
        return logits


class CombinedDetector(nn.Module):
    """The largest score of some stateless detectors, each relative to its threshold and in units of its standard
    deviation on benign inputs. It is positive if a detector fires, and differentiable where the detectors are.

    It costs one forward pass, and those of its detectors.
    """

    def __init__(
        self, model: Classifier, pipeline: GuardPipeline, scales: dict[str, float], rules: Sequence[str]
    ) -> None:
        super().__init__()
        self.model, self.pipeline, self.scales, self.rules = model, pipeline, scales, tuple(rules)

    def forward(self, x: Inputs) -> PerExample:
        """Return the scores (n,)."""
        x = x if self.pipeline.defence is None else self.pipeline.defence(x)
        seen = Observation(x, self.model(x), network=self.model)
        parts = [
            (self.pipeline.detectors[name](seen) - self.pipeline.rules[name].threshold)
            / self.scales.get(name, 1.0)
            for name in self.rules
        ]
        return torch.stack(parts).amax(0)


def rejecting(
    model: Classifier, pipeline: GuardPipeline, scales: dict[str, float], rule: str | None = None
) -> Classifier:
    """Return a classifier with an additional class "rejected", which it predicts where a stateless detector of the
    guard fires, whatever the mode and the action of its rule.

    `scales` are the standard deviations of the scores of benign inputs, by rule. With `rule`, only that rule is used.
    Raises `UsageError` without a stateless detector, for one without a threshold, and for one that needs features.
    """
    rules = [name for name in pipeline.rules if name in pipeline.detectors and rule in (None, name)]
    if not rules:
        known = ", ".join(pipeline.detectors) or "none"
        what = "no stateless detector" if rule is None else f"no detector {rule!r}"
        raise UsageError(f"the guard has {what}, as energy; it has {known}")
    for name in rules:
        if pipeline.rules[name].threshold == torch.inf:
            raise UsageError(
                f"the rule {name} of the guard has no threshold; run holdfast calibrate first, or give a threshold"
            )
        if "features" in pipeline.detectors[name].needs:
            raise UsageError(
                f"the rule {name} needs features, which an assessment does not have; set on: logits, or name another "
                "rule"
            )
    net = with_detector(
        Defended(model, pipeline.defence), CombinedDetector(model, pipeline, scales, rules), 0.0
    )
    wrapped = Classifier(net, bounds=model.bounds, classes=model.classes, access=model.access)
    wrapped.hides, wrapped.batches, wrapped.class_names = model.hides, model.batches, model.class_names
    wrapped.class_labels, wrapped.feature_names = model.class_labels, model.feature_names
    wrapped.failing = model.failing
    return wrapped
