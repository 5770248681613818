"""The pool behind a server that is adapted: a candidate becomes a parameter set, which the gates of the pool admit.

Until it is approved, the set is stored encrypted in the pool and is not in its ledger, so that no other process can
admit it and let it serve.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from holdfast.adaptation.server_state import ServerState, server_state
from holdfast.api.hardening import name_of
from holdfast.api.live_pairs import LivePairs
from holdfast.api.pooled import pool_of
from holdfast.api.recipe_building import candidates
from holdfast.api.rotation_opening import refuse_other_network, reopened
from holdfast.api.verb_settings import Adapt, RotateSettings
from holdfast.core.errors import Inconclusive, InUse, TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.io.models.models import ROTATING
from holdfast.io.remote.operator_port import Json, OperatorPort
from holdfast.recipes.training.recipe import Recipe
from holdfast.rotation import Immunise, loaded
from holdfast.rotation.pool.ledger import HEAD, LEDGER
from holdfast.rotation.pool.ledger_state import State
from holdfast.rotation.pool.pool import NAME_DIGITS, Pool
from holdfast.rotation.pool.pool_manifest import SETS
from holdfast.rotation.steps.admit import AdmitRequest, admit
from holdfast.rotation.steps.contents import secret
from holdfast.rotation.steps.rotation_request import RotateRequest, state_of
from holdfast.rotation.steps.set_measuring import set_subject
from holdfast.rotation.steps.short_steps import swap
from holdfast.runs.assess.request import Subject
from holdfast.runs.engine.progress import Notify, Progress
from holdfast.runs.harden.hardened import Hardened
from holdfast.runs.store.columns import content_digest
from holdfast.runs.store.files import POOL_MANIFEST, refuse_shared
from holdfast.settings.grammar import seconds

_POLL_S = 0.5
"""seconds between two looks at the server"""
_PATIENCE_S = 180.0
"""seconds in which the server must serve a set that the ledger states"""


def begin(status: ServerState, settings: Adapt) -> Json:
    """Return the facts about the pool of a server with which an adaptation begins.

    Raises `UsageError` or `TargetError` for a pool that cannot be adapted.
    """
    state = status["pool"]
    stated = state.get("settings", {})
    path = Path(stated.get("pool", "."))
    if "pool" not in stated:
        raise TargetError(
            "the server does not state the folder of its pool; run adapt at a server of this version"
        )
    if not path.is_dir():
        raise TargetError(
            f"the folder of the pool, {str(path)!r}, is not on this machine; run adapt where the server runs"
        )
    for each in (path, path / POOL_MANIFEST, path / LEDGER, path / HEAD, path / SETS):
        if each.exists():  # a folder without them is refused below; the sets themselves are authenticated
            refuse_shared(each)
    if guard := stated.get("guard"):
        refuse_shared(Path(guard))
    adapted = AdaptedPool(path, state["set"], "", settings)
    pool = adapted.pool
    if all(member.name != state["set"] for member in pool.ledger.members):
        raise TargetError(
            f"{str(path)!r} does not contain the set {state['set']}, which the server serves; it is another pool. "
            "Restore the pool, or restart the server"
        )
    if not all(os.access(each, os.W_OK) for each in (path, path / SETS, pool.ledger.path)):
        raise TargetError(
            f"this process may not write to the pool in {str(path)!r}, to which the candidate is added; run adapt as "
            "the user who owns it"
        )
    if set(pool.ahead) <= set(pool.unjudged):
        draw = "" if pool.ahead or pool.candidates else f"holdfast rotate draw {pool.shown}, then "
        raise UsageError(
            f"no set waits in {str(path)!r} that was judged against all stolen sets, so none could serve if the "
            f"candidate were worse on live requests; admit sets first: {draw}holdfast rotate admit {pool.shown}"
        )
    adapted.refuse_other_architecture()
    return {"set": state["set"], "pool": str(path), "settings": dict(stated)}


@dataclass(eq=False)
class AdaptedPool:
    """A pool, the set of it from which the candidate is trained, and the run that does so."""

    path: Path
    incumbent: str
    """name of the set that served when the run began"""
    run: str
    settings: Adapt

    @cached_property
    def pool(self) -> Pool:
        """The pool in the folder, which is written to."""
        pool = pool_of(f"{ROTATING}{self.path}")
        assert pool is not None, "this is the address of a pool"
        return pool

    @cached_property
    def common(self) -> RotateRequest:
        """The properties that all sets of the pool share. Raises `UsageError` for another architecture or data."""
        own = RotateSettings(
            device=self.settings.device,
            trust_code=self.settings.trust_code,
            follow_links=self.settings.follow_links,
        )
        return reopened(self.pool, own)

    def refuse_other_architecture(self) -> None:
        """Raise `TargetError` if the model with which the pool was created does not have the tensors of its sets."""
        loaded(self.common.model, self.pool.weights(self.incumbent), self.incumbent)

    @cached_property
    def incumbent_subject(self) -> Subject:
        """The set that served when the run began, as a model."""
        return self._subject(self.pool.weights(self.incumbent))

    def _subject(self, weights: Mapping[str, Any]) -> Subject:
        sha = content_digest(weights)
        name = sha[:NAME_DIGITS]
        return set_subject(self.common, name, sha, loaded(self.common.model, weights, name))

    # --- the candidate

    @property
    def _stored(self) -> str:
        return f"adapted_{self.run}"

    @cached_property
    def candidate(self) -> Subject:
        """The immunised candidate."""
        stored = self.pool.kept(self._stored)
        if stored is None:
            raise TargetError(
                f"{str(self.path)!r} no longer contains the candidate of this run; begin a new run"
            )
        return self._subject(stored.columns)

    @property
    def name(self) -> str:
        """Name of the candidate as a set of the pool."""
        return self.candidate.digest[:NAME_DIGITS]

    def immunise(self, hardened: Hardened) -> Json:
        """Train the candidate against examples computed on the stolen sets and on the set from which it was trained,
        and store it encrypted in the pool.
        """
        against = dict.fromkeys(
            each.name for each in self.pool.ledger.exposed() if not self.pool.ledger.member(each.name).deleted
        )
        against[self.incumbent] = None
        exposed = [self.common.of_set(self.pool, name) for name in against]
        common, rng = self.common, secret(self.pool).at("adapted", self.run)
        model = loaded(common.model, state_of(hardened.model), "of the candidate")
        # the one that trained it, so that the robustness that it gave is kept
        recipe = self._recipes(model)[hardened.card["recipe"]]
        with common.enough_threads():
            immunised = Immunise()(model, exposed, recipe, common.train, common.threat, rng=rng)
        self.pool.keep(self._stored, state_of(immunised), {"against": list(against)})
        return {"set": self.name, "digest": self.candidate.digest, "against": list(against)[-10:]}

    def refuse_other_network(self) -> None:
        """Raise `UsageError` for a recipe whose network is not that of the sets of the pool."""
        for name, recipe in self._recipes(self.common.model).items():
            refuse_other_network(recipe, name)

    def _recipes(self, model: Classifier) -> dict[str, Recipe]:
        """The recipes of which one trains the candidate, by their names."""
        given: Any = self.settings.recipe
        if not isinstance(given, Mapping):
            return {name_of(given): given}
        chosen = candidates(given, model, self.common.train.example_shape)
        return {each.name: each.recipe for each in chosen}

    def admit(self, progress: Progress, notify: Notify, again: str) -> Json:
        """Add the candidate to the pool, and let the gates of the pool judge it. `again` states how the run is resumed.

        The set from which it was trained is listed as stolen when it is admitted, as for every set that was made from
        another one, so that the server replaces that set.
        """
        weights = state_of(self.candidate.model)
        name = self.pool.add(
            weights, {"by": "adapt"}, bases=(self.incumbent,), why=f"hardened from {self.incumbent}"
        )
        request = AdmitRequest(self.pool, self.common, accepted=self.settings.accept_doubts, only=name)
        while self._state(name) == "candidate":
            try:
                admit(request, again=again, notify=notify, progress=progress, is_step=True)
                break
            except UsageError as error:  # a running rotation judges sets, and may have judged this one
                if not isinstance(error, InUse) and self._state(name) == "candidate":
                    raise
            time.sleep(_POLL_S)
        member = self.pool.ledger.member(name)
        facts = {"set": name, "why": member.why}
        if member.state in ("candidate", "refused"):
            facts["ends"] = f"the pool did not admit the set {name}: {member.why}"
        return facts

    def _state(self, name: str) -> State:
        return self.pool.ledger.member(name).state

    def drop(self) -> None:
        """Delete the stored candidate, which is a set of the pool or is not used."""
        self.pool.drop(self._stored)

    # --- the server

    def measure(self, pairs: LivePairs) -> Json:
        """Compare the candidate with the set from which it was trained on the inputs that the serving sets answer."""
        facts = pairs.watched(self._watched_s, lambda status: "")
        return {**facts, "ends": f"before the promotion, {facts['ends']}"} if "ends" in facts else facts

    @property
    def _watched_s(self) -> float:
        return seconds(self.settings.canary_time, "canary_time")

    def promote(self, port: OperatorPort) -> Json:
        """Let the admitted set serve, and wait until the server does so."""
        if self._state(self.name) == "admitted":  # the server may have swapped already
            try:
                self.pool.serve(self.name, f"adapted by the run {self.run}")
            except UsageError as error:
                if self._state(self.name) == "admitted":  # and it did not do so meanwhile
                    return {"set": self.name, "ends": error.message}
        fault = self._wait(port, serves=True)
        if fault:
            self._withdraw(fault)
            return {"set": self.name, "ends": fault}
        return {"set": self.name, "waiting": len(self.pool.ahead), "unjudged": len(self.pool.unjudged)}

    def _wait(self, port: OperatorPort, *, serves: bool) -> str:
        """Wait until the server serves the set, or no longer serves it. Return why it does not."""
        until = time.monotonic() + _PATIENCE_S
        while True:
            state = server_state(port, of="pool")["pool"]
            if (state["set"] == self.name) is serves:
                return ""
            if serves and self._state(self.name) == "retired":
                return f"the set {self.name} was replaced before the server used it"
            if time.monotonic() > until:
                return (
                    f"the server did not change its set within {_PATIENCE_S:g} s {state['reason']}".rstrip()
                )
            time.sleep(_POLL_S)

    def watch(self, pairs: LivePairs, port: OperatorPort) -> Json:
        """Watch the set while it serves, and replace it if it is worse than the set from which it was trained."""
        serves = True

        def look(status: ServerState) -> str:
            nonlocal serves  # a trigger of the rotation may replace it
            serves = serves and status["pool"]["set"] == self.name
            return ""

        facts = {**pairs.watched(self._watched_s, look), "serves": serves}
        if "ends" in facts:
            self._withdraw(facts["ends"])
            facts["ends"] = f"after the promotion, {facts['ends']}"
            if late := self._wait(port, serves=False):
                raise TargetError(late)
        return facts

    def _withdraw(self, fault: str) -> None:
        """Let another admitted set serve, also one that was not judged against the set that is replaced."""
        serving = self.pool.serving
        if serving is None or serving.name != self.name:
            return
        try:
            swap(self.pool, f"{self.name} is withdrawn: {fault}", unjudged=True, epoch=serving.epoch)
        except Inconclusive as error:
            raise TargetError(
                f"the set {self.name} is worse on live requests ({fault}), and no other admitted set waits: it still "
                "serves. Draw and admit sets, then resume the run"
            ) from error
