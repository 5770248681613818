"""The steps `train` and `draw` of a rotation: a generator of parameter sets is fitted, and candidates are generated or
retrained, and immunised.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.errors import Inconclusive, Remedy, UsageError
from holdfast.core.model import Classifier
from holdfast.reports.words import strict
from holdfast.rotation import Codec, Embedding, Generator, Immunise, LatentDiffusion, Members
from holdfast.rotation.collecting import rows_of, trained_from_fresh_weights
from holdfast.rotation.generating import packed_generator
from holdfast.rotation.pool import Pool
from holdfast.rotation.steps.rotation_request import (
    GENERATOR,
    RotateRequest,
    TrainedGenerator,
    accuracy,
    bases,
    bases_left,
    collected_members,
    epochs_of,
    generator_of,
    secret,
    state_of,
)
from holdfast.runs.engine.progress import Notify, Stopper, ignore, stoppable
from holdfast.runs.store.folder import differences

_LOST = 0.003  # largest loss of accuracy by encoding and decoding
_JUDGED = 24  # sets for that test, spread over the collection
_TRIED = 16  # generated sets on which the generator is tested
_DIVERGED = 0.1  # largest difference in accuracy between the bases and the best of them


@dataclass(frozen=True)
class TrainRequest:
    """The pool on whose parameter sets a generator is trained, and the settings of the generator."""

    pool: Pool
    common: RotateRequest
    """the settings that all sets of the pool share"""
    codec: Codec = field(default_factory=Codec)
    diffusion: LatentDiffusion = field(default_factory=LatentDiffusion)


def train(request: TrainRequest, *, again: str = "", notify: Notify = ignore) -> TrainedGenerator:
    """Train a generator on the collected parameter sets of a pool and store it encrypted. It replaces an earlier
    generator.

    `again` states how a stopped call is started again. Raises `UsageError` if fewer than two sets are collected or
    another process trains, and `LostLoss` if the training diverges. Raises `Inconclusive` if sets lose more than 0.3
    points of accuracy in the codec, or if no generated set comes within ten points of the bases. After an error, an
    earlier generator is kept.
    """
    pool, common, codec, diffusion = request.pool, request.common, request.codec, request.diffusion
    again = again or "an earlier generator is kept; train again with the same arguments"
    with stoppable(again) as stopper, pool.alone_at("train"), common.enough_threads():
        collected, draws = collected_members(pool), secret(pool).at("generator")
        begin = time.perf_counter()
        embedding = codec(collected, rng=draws.at("codec"))
        codec_s = time.perf_counter() - begin
        notify(
            f"codec: {len(collected)} sets of {collected.parameters:,} parameters, {embedding.span.rank} directions, "
            f"{100 * embedding.lost:.2g} % of the variance lost, {codec_s:.1f} s"
        )
        lost = _lost_accuracy(common, embedding, collected)
        notify(
            f"encoding and decoding: {100 * lost:.2f} percentage points of accuracy lost, at most {100 * _LOST:g} "
            "allowed"
        )
        if lost > _LOST:
            raise Inconclusive(
                f"sets lose {100 * lost:.2f} percentage points of accuracy by encoding and decoding, and at most "
                f"{100 * _LOST:g} are allowed: generated sets would lose as much. Collect more sets of each run, or "
                "use a larger codec",
                Remedy("codec.dims", 2 * codec.dims, also=(Remedy("codec.steps", 2 * codec.steps),)),
            )
        begin = time.perf_counter()
        generator = diffusion(embedding, collected, rng=draws.at("diffusion"))
        diffusion_s = time.perf_counter() - begin
        _refuse_diverged(common, generator, collected, draws.at("tried"), diffusion)
        notify(f"diffusion: regulariser {diffusion.regulariser}, {diffusion_s:.1f} s")
        n, parameters, rank = len(collected), collected.parameters, embedding.span.rank
        result = TrainedGenerator(n, parameters, rank, embedding.lost, lost, codec_s, diffusion_s)
        with stopper.finishing():
            pool.keep(GENERATOR, packed_generator(generator), vars(result))
    return result


def _refuse_diverged(
    request: RotateRequest, generator: Generator, collected: Members, rng: Draws, diffusion: LatentDiffusion
) -> None:
    """Raise `Inconclusive` if no generated set has nearly the accuracy of the bases."""
    held_out = request.first_held_out
    drawn, bases = generator.drawn(_TRIED, rng), collected.bases()
    best_accuracy = max(accuracy(request.of_weights(drawn.one(k)), held_out) for k in range(len(drawn)))
    usual = mean(accuracy(request.of_weights(bases.one(k)), held_out) for k in range(len(bases)))
    if best_accuracy < usual - _DIVERGED:
        raise Inconclusive(
            f"the best of {_TRIED} generated sets has an accuracy of {100 * best_accuracy:.1f} %, the bases "
            f"{100 * usual:.1f} %: the diffusion diverged, and an earlier generator is kept. Regularise less "
            f"(regulariser is {diffusion.regulariser}, weight {diffusion.weight:g}), or train longer",
            Remedy("generator.steps", 2 * diffusion.steps),
        )


def _lost_accuracy(request: RotateRequest, embedding: Embedding, collected: Members) -> float:
    """Mean accuracy on held-out examples that sets lose by encoding and decoding."""
    places = torch.linspace(0, len(collected) - 1, min(_JUDGED, len(collected))).round().long()
    some = collected.take(places)
    decoded = Members(embedding.decoded(embedding.encoded(some)), some.basins)
    held_out = request.first_held_out

    def mean_accuracy(sets: Members) -> float:
        return mean(accuracy(request.of_weights(sets.one(k)), held_out) for k in range(len(sets)))

    return mean_accuracy(some) - mean_accuracy(decoded)


By = Literal["generator", "retraining"]
"""How sets are produced: sampled from the generator, or trained from fresh random weights."""
_DRAW_FILE = "drawing"
_SETS = 8  # sets of a draw without --sets
_LOOKED = 2_000  # training inputs on which a generated set is tested before it is immunised
_POINT = 0.01  # accuracy on them by which a set may be below the bases: half an epoch cannot improve more
_MOST = 64  # generated sets that are tried for one set above that accuracy
UPDATES = 100
"""Number of updates of an immunisation below which a warning is shown.

It is half of the number in the benchmark record `rotation`, with 27,500 examples in batches of 128.
"""


FRESH = Remedy("by", "retraining")
"""Way of drawing sets without a generator"""
_ANOTHER = "to start another draw"


@dataclass(frozen=True)
class DrawRequest:
    """The pool to which candidates are added, the number of candidates, and how they are produced."""

    pool: Pool
    common: RotateRequest
    """the settings that all sets of the pool share"""
    sets: int | None = None
    """number of new candidates; None for eight or, if a draw is resumed, for the number of that draw"""
    by: By | None = None
    """how sets are produced; None for the generator if there is one or, if a draw is resumed, for
    the way of that draw"""
    immunise: Immunise | None = None
    """settings of the training against stolen sets; None for no such training"""
    resume: bool = False
    """whether the last draw is continued, which must have the same settings"""


@dataclass(frozen=True)
class Drawn:
    """The candidates that one draw added to a pool."""

    names: tuple[str, ...]
    """names of the new candidates"""
    by: By
    against: tuple[str, ...]
    """names of the sets that the candidates were immunised against; empty without immunisation"""
    looked_at: int
    """number of generated sets, including those that were discarded"""


def draw(request: DrawRequest, *, again: str = "", notify: Notify = ignore) -> Drawn:
    """Generate or train new parameter sets, and add them to the pool as candidates.

    With `immunise`, each candidate is trained further against the stolen sets in the ledger; if there are none, against
    the serving set, and if no set serves, against the bases. If a resumed draw is complete, its result is returned.
    `again` states how a stopped call is resumed. Raises `UsageError`, also if another process draws, and `Inconclusive`
    if no generated set has sufficient accuracy.
    """
    again = again or "finished steps are stored; resume with the same arguments and resume=True"
    with stoppable(again) as stopper, request.pool.alone_at("draw"), request.common.enough_threads():
        stored = request.pool.kept(_DRAW_FILE) if request.resume else None
        if stored is None:
            _start(request)
        else:
            _refuse_other(stored.about["asked"], request)
            if not _missing(stored.about):
                notify(
                    "that draw is complete, so there is nothing to resume; omit --resume to draw more sets"
                )
                return _result(stored.about)
        drawing = _Drawing(request, stopper, notify)
        drawing.warn()
        while _missing(drawing.about):
            drawing.add()
    return _result(drawing.about)


def by_named(name: str | None) -> By | None:
    """Return the method of producing parameter sets that is called `name`: generation or retraining. Return None if
    `name` is None.

    Raises `UsageError` for an unknown name.
    """
    if name is not None and name not in get_args(By):
        raise UsageError(f"by is {name!r}; expected generator or retraining")
    return cast("By | None", name)


# --- the description of a draw, which is stored encrypted


def _start(request: DrawRequest) -> None:
    """Store the description of a new draw, without sets, and its secret seed."""
    pool, immunise = request.pool, request.immunise
    by = request.by or ("retraining" if generator_of(pool, request.common) is None else "generator")
    about = {
        "drawing": secrets.token_hex(4),
        "asked": {"sets": request.sets or _SETS, "by": by, "immunise": _plain(immunise)},
        "against": [] if immunise is None else list(_against(pool)),
        "names": [],
        "looked_at": 0,
    }
    # The seed is secret, because with it an attacker could repeat the draw. 62 bits fit into an int64.
    pool.keep(_DRAW_FILE, {"seed": torch.tensor([secrets.randbits(62)])}, about)


def _plain(immunise: Immunise | None) -> Any:
    return None if immunise is None else strict(asdict(immunise))


def _refuse_other(stored: Mapping[str, Any], request: DrawRequest) -> None:
    """Raise `UsageError` if the settings of the draw to be resumed differ."""
    immunise = _plain(request.immunise)
    settings = {
        "sets": request.sets or stored["sets"],
        "by": request.by or stored["by"],
        "immunise": immunise,
    }
    if (stored["immunise"] is None) != (immunise is None):
        change, behaviour = (
            (Remedy("immunise"), "does not immunise")
            if stored["immunise"] is None
            else (Remedy("immunise", True), "immunises")
        )
        raise UsageError(
            f"the draw to be resumed {behaviour} its sets", change, Remedy("resume", reason=_ANOTHER)
        )
    if stored != settings:
        raise UsageError(
            f"the draw to be resumed has other settings ({differences(stored, settings)}); give the same settings",
            Remedy("resume", reason=_ANOTHER),
        )


def _missing(about: Mapping[str, Any]) -> bool:
    return len(about["names"]) < int(about["asked"]["sets"])


def _result(about: Mapping[str, Any]) -> Drawn:
    return Drawn(tuple(about["names"]), about["asked"]["by"], tuple(about["against"]), about["looked_at"])


def _against(pool: Pool) -> tuple[str, ...]:
    """The sets that an attacker may have."""
    members = {member.name: member for member in pool.ledger.members}
    listed = tuple(exposure.name for exposure in pool.ledger.exposed() if not members[exposure.name].deleted)
    if listed:
        return listed
    serving = pool.serving
    if serving is not None:
        return (serving.name,)
    remaining_bases = bases_left(pool)
    if not remaining_bases:
        raise UsageError(
            f"{str(pool.path)!r} lists no stolen set, no set serves, and the bases are deleted, so there is "
            "nothing to immunise against; collect first",
            Remedy("immunise"),
        )
    return remaining_bases


# --- the sets of a draw


class _Drawing:
    """The remaining sets of a draw, new or resumed."""

    def __init__(self, request: DrawRequest, stopper: Stopper, notify: Notify) -> None:
        stored = request.pool.kept(_DRAW_FILE)
        assert stored is not None
        self.pool, self.common, self.immunise = request.pool, request.common, request.immunise
        self.stopper, self.notify, self.about = stopper, notify, dict(stored.about)
        self.by: By = self.about["asked"]["by"]
        self.seed: Tensor = stored.columns["seed"]
        self.draws = Draws(int(self.seed)).at("drawing")
        self.task = self.common.task(epochs_of(self.pool))
        self.tested = rows_of(self.task.data, _LOOKED, self.draws.at("looked at"))
        self.exposed = [self.common.of_set(self.pool, name) for name in self.about["against"]]
        self.generator = self._generator() if self.by == "generator" else None
        self.least = self._least() if self.generator is not None else 0.0

    def warn(self) -> None:
        """Notify the user if an immunisation has too few training updates to be effective."""
        if self.immunise is None or not self.exposed:
            return
        updates = self.immunise.updates(len(self.task.data), self.task.recipe.training.batch)
        if updates < UPDATES:
            self.notify(
                f"note: immunisation trains each set for {updates} updates only, so no effect is expected: it "
                "was measured with 215. More training data, or a smaller recipe.training.batch in the "
                "collection, give more updates"
            )

    def add(self) -> None:
        """Produce one parameter set, immunise it, and add it to the pool as a candidate of this draw."""
        place, task = len(self.about["names"]), self.task
        model, made_from = self._produced(self.draws.at("set", place))
        if self.immunise is not None and self.exposed:
            rng = self.draws.at("immunised", place)
            model = self.immunise(model, self.exposed, task.recipe, task.data, task.threat, rng=rng)
        self._store(model, made_from)
        self.notify(f"set {place + 1} of {self.about['asked']['sets']}: {self.about['names'][-1]}")

    def _generator(self) -> Generator:
        generator = generator_of(self.pool, self.common)
        if generator is None:
            raise UsageError(
                f"{str(self.pool.path)!r} has no generator yet; train one with holdfast rotate train "
                f"{self.pool.shown}, or train sets from fresh weights",
                FRESH,
            )
        shapes = {name: tuple(mean.shape) for name, mean in generator.embedding.span.mean.items()}
        own = {name: tuple(value.shape) for name, value in self.common.model.net.named_parameters()}  # type: ignore[union-attr]
        differing = next((name for name, shape in shapes.items() if own.get(name) != shape), None)
        if differing is not None:
            raise UsageError(
                f"the generator returns {differing} of shape {shapes[differing]}, but the model has "
                f"{own.get(differing)}: the generator is for another architecture; train it again with "
                f"holdfast rotate train {self.pool.shown}"
            )
        return generator

    def _least(self) -> float:
        """The accuracy that a generated set needs on the inputs that it is tested on."""
        models = [self.common.of_set(self.pool, name) for name in bases_left(self.pool)]
        right = [accuracy(base, self.tested) for base in models]
        return mean(right) - _POINT if right else 0.0

    def _produced(self, rng: Draws) -> tuple[Classifier, tuple[str, ...]]:
        """A set with sufficient accuracy, and the names of the sets that it was made from.

        Raises `Inconclusive` if none of 64 generated sets is sufficient.
        """
        if self.generator is None:
            self.about["looked_at"] += 1
            return trained_from_fresh_weights(self.task, rng), ()
        best_accuracy = 0.0
        for trial in range(_MOST):
            drawn = self.generator.drawn(1, rng.at("draw", trial))
            model = self.common.of_weights(drawn.one(0))
            set_accuracy = accuracy(model, self.tested)
            self.about["looked_at"] += 1
            if set_accuracy >= self.least:
                return model, bases(self.pool)
            best_accuracy = max(best_accuracy, set_accuracy)
        raise Inconclusive(
            f"none of {_MOST} generated sets reaches an accuracy of {100 * self.least:.1f} % on {len(self.tested)} "
            f"training inputs (one percentage point below the bases); the best has {100 * best_accuracy:.1f} %. The "
            "generator samples between the collected sets. Collect more sets of each run, train the generator "
            "without a regulariser, or train sets from fresh weights",
            FRESH,
        )

    def _store(self, model: Classifier, made_from: Sequence[str]) -> None:
        """Add a set to the pool and record its name. A signal takes effect after both."""
        about = {"drawing": self.about["drawing"], "by": self.by, "against": self.about["against"]}
        with self.stopper.finishing():
            name = self.pool.add(state_of(model), about, bases=made_from, why=f"drawn by {self.by}")
            self.about["names"] = [*self.about["names"], name]
            self.pool.keep(_DRAW_FILE, {"seed": self.seed}, self.about)
