"""Makes new sets, by the generator or by training from fresh random weights, and immunises them against stolen sets.

The seed of every draw comes from the operating system and is stored encrypted, so the seed of the run does not
reproduce the sets.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.core.draws import Draws
from holdfast.core.errors import Inconclusive, UsageError
from holdfast.core.model import Classifier
from holdfast.engine.progress import Notify, ignore
from holdfast.engine.signals import Stopper
from holdfast.reports.numbers import strict
from holdfast.rotation import Generator, Immunise
from holdfast.rotation.collecting import rows_of, trained_anew
from holdfast.store.differences import differences
from holdfast.store.pool import Pool
from holdfast.verbs.rotate.collecting import bases, bases_left, epochs_of
from holdfast.verbs.rotate.learning import learned
from holdfast.verbs.rotate.request import RotateRequest, accuracy, state_of

By = Literal["generator", "anew"]
_KEPT = "drawing"
_SETS = 8
_LOOKED = 2_000  # training inputs on which a generated set is tested before it is immunised
_POINT = 0.01  # accuracy on them by which a set may be below the bases: half an epoch cannot improve more
_MOST = 64  # generated sets that are tried for one set above that accuracy
UPDATES = 100
"""Number of updates of the immunisation below which a warning is shown: half of those of the record `rotation`, with
27,500 examples in batches of 128."""


@dataclass(frozen=True)
class Drawn:
    """The new candidates of one call of `draw`."""

    names: tuple[str, ...]
    """names of the new candidates"""
    by: By
    against: tuple[str, ...]
    """the sets that they were immunised against; empty without immunisation"""
    looked_at: int
    """number of sets generated, including those that were discarded"""


def draw(
    pool: Pool,
    request: RotateRequest,
    sets: int | None = None,
    *,
    by: By | None = None,
    immunise: Immunise | None = None,
    resume: bool = False,
    stopper: Stopper | None = None,
    notify: Notify = ignore,
) -> Drawn:
    """Add `sets` new candidates, by default eight, to the pool; by the generator if there is one, unless `by` is given.

    With `immunise`, each is trained further against the stolen sets in the ledger; if there are none, against the
    serving set, and if none serves, against the bases. `resume` continues the draw of an earlier call, which must
    have had the same arguments; if that draw is complete, its result is returned. Raises `UsageError`, also if
    another process draws, and `Inconclusive` if no generated set has sufficient accuracy.
    """
    how = None if immunise is None else strict(asdict(immunise))
    with pool.alone_at("draw"):
        begun = pool.kept(_KEPT) if resume else None
        if begun is None:
            kind = by or ("anew" if learned(pool, request) is None else "generator")
            metadata = {
                "drawing": secrets.token_hex(4),
                "asked": {"sets": sets or _SETS, "by": kind, "immunise": how},
                "against": [] if immunise is None else list(_against(pool)),
                "names": [],
                "looked_at": 0,
            }
            pool.keep(_KEPT, {"seed": torch.tensor([secrets.randbits(62)])}, metadata)
        else:
            settings = begun.about["asked"]
            _refuse_other(
                settings, {"sets": sets or settings["sets"], "by": by or settings["by"], "immunise": how}
            )
            if not _missing(begun.about):
                notify(
                    "that draw is complete, so there is nothing to resume; leave --resume out to draw more sets"
                )
                return _drawn(begun.about)
        return _Drawing(pool, request, immunise, stopper or Stopper(), notify).done()


def _refuse_other(known: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise `UsageError` if a resumed draw was begun with other arguments."""
    if (known["immunise"] is None) != (asked["immunise"] is None):
        way, does = ("leave out", "does not immunise") if known["immunise"] is None else ("add", "immunises")
        raise UsageError(
            f"the draw to be resumed {does} its sets; {way} --immunise, or start another draw without --resume"
        )
    if known != asked:
        raise UsageError(
            f"the draw to be resumed has other settings ({differences(known, asked)}); give the same settings, or "
            "leave --resume out to start another draw"
        )


def _drawn(said: Mapping[str, Any]) -> Drawn:
    return Drawn(tuple(said["names"]), said["asked"]["by"], tuple(said["against"]), said["looked_at"])


def candidates(pool: Pool) -> tuple[str, ...]:
    """Sets that were neither admitted nor refused yet, in the order in which they were added."""
    waiting = (
        one
        for one in pool.ledger.members
        if one.state == "candidate" and one.role == "service" and one.exposed is None
    )
    return tuple(one.name for one in waiting if not one.deleted)


def _missing(about: Mapping[str, Any]) -> bool:
    return len(about["names"]) < int(about["asked"]["sets"])


def _against(pool: Pool) -> tuple[str, ...]:
    """The sets that an attacker may have."""
    members = {member.name: member for member in pool.ledger.members}
    listed = tuple(one.name for one in pool.ledger.exposed() if not members[one.name].deleted)
    if listed:
        return listed
    now = pool.serving
    if now is not None:
        return (now.name,)
    left = bases_left(pool)
    if not left:
        raise UsageError(
            f"{str(pool.path)!r} lists no stolen set, no set serves, and the bases are deleted, so there is "
            "nothing to immunise against; leave --immunise out, or collect first"
        )
    return left


class _Drawing:
    """One call of `draw`, new or resumed."""

    def __init__(
        self, pool: Pool, request: RotateRequest, immunise: Immunise | None, stopper: Stopper, notify: Notify
    ) -> None:
        stored = pool.kept(_KEPT)
        assert stored is not None
        self.pool, self.request, self.immunise = pool, request, immunise
        self.stopper, self.notify, self.said = stopper, notify, dict(stored.about)
        self.by: By = self.said["asked"]["by"]
        self.seed: Tensor = stored.columns["seed"]
        self.draws = Draws(int(self.seed)).at("drawing")
        self.task = request.task(epochs_of(pool))
        self.looked = rows_of(self.task.data, _LOOKED, self.draws.at("looked at"))
        self.exposed = [request.of_set(pool, name) for name in self.said["against"]]
        self.generator = self._generator() if self.by == "generator" else None
        self.least = self._least() if self.generator is not None else 0.0

    def done(self) -> Drawn:
        """Make all sets that are missing."""
        wanted = self.said["asked"]["sets"]
        if self.immunise is not None and self.exposed:
            updates = self.immunise.updates(len(self.task.data), self.task.recipe.training.batch)
            if updates < UPDATES:
                self.notify(
                    f"note: immunisation trains each set for {updates} updates only, so no effect is expected: it "
                    "was measured with 215. More training data, or a smaller recipe.training.batch in the "
                    "collection, give more updates"
                )
        while _missing(self.said):
            place = len(self.said["names"])
            fresh, made_from = self._fresh(self.draws.at("set", place))
            if self.immunise is not None and self.exposed:
                task = self.task
                fresh = self.immunise(
                    fresh,
                    self.exposed,
                    task.recipe,
                    task.data,
                    task.threat,
                    rng=self.draws.at("immunised", place),
                )
            self._take(fresh, made_from)
            self.notify(f"set {place + 1} of {wanted}: {self.said['names'][-1]}")
        return _drawn(self.said)

    def _generator(self) -> Generator:
        generator = learned(self.pool, self.request)
        if generator is None:
            raise UsageError(
                f"{str(self.pool.path)!r} has no generator yet; train one with holdfast rotate train "
                f"{self.pool.shown}, or train sets from fresh weights with --by anew"
            )
        shapes = {name: tuple(mean.shape) for name, mean in generator.embedding.span.mean.items()}
        own = {name: tuple(value.shape) for name, value in self.request.model.net.named_parameters()}  # type: ignore[union-attr]
        other = next((name for name, shape in shapes.items() if own.get(name) != shape), None)
        if other is not None:
            raise UsageError(
                f"the generator returns {other} of shape {shapes[other]}, but the model has {own.get(other)}: the "
                "generator is for another architecture; train it again with holdfast rotate train "
                f"{self.pool.shown}"
            )
        return generator

    def _least(self) -> float:
        """The accuracy that a generated set needs on the inputs that it is tested on."""
        models = [self.request.of_set(self.pool, name) for name in bases_left(self.pool)]
        right = [accuracy(base, self.looked) for base in models]
        return mean(right) - _POINT if right else 0.0

    def _fresh(self, rng: Draws) -> tuple[Classifier, tuple[str, ...]]:
        """A set with sufficient accuracy, and the names of the sets that it was made from.

        Raises `Inconclusive` if none of 64 generated sets is sufficient.
        """
        if self.generator is None:
            self.said["looked_at"] += 1
            return trained_anew(self.task, rng), ()
        best = 0.0
        for turn in range(_MOST):
            drawn = self.generator.drawn(1, rng.at("draw", turn))
            model = self.request.of_weights(drawn.one(0))
            right = accuracy(model, self.looked)
            self.said["looked_at"] += 1
            if right >= self.least:
                return model, bases(self.pool)
            best = max(best, right)
        raise Inconclusive(
            f"none of {_MOST} generated sets reaches an accuracy of {100 * self.least:.1f} % on {len(self.looked)} "
            f"training inputs (one percentage point below the bases); the best has {100 * best:.1f} %. The "
            "generator samples between the collected sets. Collect more sets of each run, train the generator "
            "without a regulariser, or train sets from fresh weights with --by anew"
        )

    def _take(self, model: Classifier, made_from: Sequence[str]) -> None:
        """Add a set to the pool and record its name."""
        about = {"drawing": self.said["drawing"], "by": self.by, "against": self.said["against"]}
        with self.stopper.finishing():
            name = self.pool.add(state_of(model), about, bases=made_from, why=f"drawn by {self.by}")
            self.said["names"] = [*self.said["names"], name]
            self.pool.keep(_KEPT, {"seed": self.seed}, self.said)
