"""The verb assess, from the request to the result: it checks the inputs, runs the attacks and the probes, and judges
the gates.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from holdfast.core.batch import Data, Lookup
from holdfast.core.evidence import Columns, Evidence
from holdfast.core.meter import purpose
from holdfast.doubts.answering import arms, required_attacks
from holdfast.gates.judging import Doubts, Judgement, judge
from holdfast.io.data.clips import write_clips
from holdfast.io.remote.served_model import Served
from holdfast.runs.assess import measuring
from holdfast.runs.assess.certify import refuse_unsound
from holdfast.runs.assess.executors import executor_for
from holdfast.runs.assess.expected_time import duration, expected_rows, expected_seconds
from holdfast.runs.assess.looks import measured_until
from holdfast.runs.assess.measuring import Measurement, ShardMeasure
from holdfast.runs.assess.preparation import (
    learning_examples,
    paired_sets,
    plan_for,
    readied,
    refuse_data,
    refuse_gates,
)
from holdfast.runs.assess.request import AssessRequest, DescribedModel, Opening
from holdfast.runs.assess.result import (
    ATTACKED,
    Result,
    about_of,
    adversarial,
    evidence_of,
    with_attackers,
    worst_case,
)
from holdfast.runs.assess.served_runs import attach, finish, refuse_early, served_by
from holdfast.runs.documents.record import (
    ADAPTIVE,
    DOUBTS,
    ROTATION,
    UNTIL,
    VERDICT,
    Adapted,
    Doubted,
    Manifest,
    Record,
    adapted_from_json,
    decided_from_json,
    doubted_from_json,
    looks_from_json,
    manifest_from_json,
    splits_of,
)
from holdfast.runs.documents.run_manifest import about_run, assess_manifest, command_of
from holdfast.runs.documents.stored_runs import decided, files_of, judgements_of, open_run
from holdfast.runs.engine.identity import resumable, way_out
from holdfast.runs.engine.progress import Notify, Progress, Stopper, ignore, silent, stoppable
from holdfast.runs.engine.ray_cluster import NODES
from holdfast.runs.engine.run import Executor, MemoryStore, Run, Stopwatch, Store
from holdfast.runs.harness.assembly import FOUND
from holdfast.runs.harness.kinds.checks import GEOMETRY, STATEFUL
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.target import PreparedModel
from holdfast.runs.store import columns as column_files
from holdfast.runs.store.files import CLIPS
from holdfast.runs.store.folder import RunFolder, open_run_folder, stored_manifest

JUDGED_BY_ATTACKERS = 1_000
"""Largest number of examples that the table of attackers is measured on; the first ones of the data are used."""


def assess(
    subject: DescribedModel,
    data: Data,
    request: AssessRequest,
    *,
    run: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    opening: Opening | None = None,
    again: str = "",
    notify: Notify = ignore,
    detail: Notify = ignore,
    is_step: bool = False,
) -> Result:
    """Measure how robust a model is under attacks, and judge the gates of the request.

    With `run`, all results are written to that folder. With `resume`, an interrupted run in that folder is continued,
    and the stored result of a finished run is returned. `again` is the command that resumes the run that contains this
    one. Worker processes open the model and the data with `opening`; without it they receive copies of `subject` and
    `data`. `notify` is called with messages before the run, such as the largest number of rows that are sent to a
    server, or the expected time, unless the assessment `is_step` of a run that states the time of all its steps.
    `detail` is called with messages on single shards of a cluster.
    Raises `UsageError`, `TargetError`, or `Interrupted` with the command to resume.
    """
    refuse_data(data)
    served = served_by(subject.model)
    if served is not None:
        refuse_early(served, subject, request)
    device, adaptive = torch.device(request.device), bool(request.plan.adaptive)
    again = again or ("" if run is None else way_out(request.command, run))
    with (
        nullcontext() if run is None else resumable(again, partial(way_out, request.command, run)),
        readied(subject, data, device, adaptive=adaptive, batch_size=request.batch_size) as (target, sample),
        ExitStack() as stack,
    ):
        plan = plan_for(subject, data, request, target, sample, stack)
        refuse_gates(request.claims, plan, target, sample, data)
        stored, shape = None if run is None else stored_manifest(run), tuple(sample.x.shape[1:])
        manifest = assess_manifest(subject, data, request, plan, target, shape, served=served, stored=stored)
        stopper = Stopper() if run is None else stack.enter_context(stoppable(again))
        about = about_run(request.command)
        store: Store = MemoryStore()
        folder: RunFolder | None = None
        if run is not None:
            store = folder = stack.enter_context(
                open_run_folder(run, manifest.to_json(), about, resume=resume)
            )
            manifest, about = manifest_from_json(run, folder.manifest), folder.about()
            attach(served)
        job = _Job(subject, data, request, plan, target, device, manifest, served, run)
        measure = ShardMeasure(plan, target, data, device, served)
        chosen = executor_for(request, subject, measure, manifest.digests, opening, notify, detail)
        with chosen as executor:
            work = job.run(store, executor, stopper, progress)
            if store.document(DOUBTS) is None:
                job.announce(notify, is_step=is_step)
            measurement, by_stage = job.measurement(work), dict[str, Columns]()
            missed = measurement.stages([s for s in plan.stages() if not s.adaptive], by_stage)
            executor.pause()  # the probes run in this process, and need the memory of the workers
            doubted = job.doubted(measurement, by_stage, missed)
            adapted = job.adapted(measurement, by_stage, doubted) if plan.adaptive else None
        record = job.record(work, by_stage, doubted, adapted)
        evidence = job.evidence(record)
        rotation = job.attackers(work, evidence)
        evidence = with_attackers(evidence, rotation)
        adversarial_examples = job.adversarial(folder, evidence, record, notify)
        gates, accepted = job.judged(work, evidence, folder)
        head = None if folder is None else folder.chain.head
        shown = about_of(manifest, {**about, **job.command(gates)}, run, head)
        return Result(evidence, gates, accepted, shown, run, adversarial_examples, request.baseline, rotation)


@dataclass(frozen=True)
class _Job:
    """The inputs of an assessment, and its steps."""

    subject: DescribedModel
    data: Data
    request: AssessRequest
    plan: Plan
    target: PreparedModel
    device: torch.device
    manifest: Manifest
    served: Served | None
    """connection to the server of a served model"""
    folder: Path | None
    """folder of the run; None for a run in memory"""

    def command(self, gates: Sequence[Judgement]) -> dict[str, str]:
        """Return the command line of a run in a folder, as when the run is opened later; nothing for one in memory."""
        return {} if self.folder is None else {"command": command_of(self.manifest.to_json(), gates)}

    def run(self, store: Store, executor: Executor, stopper: Stopper, progress: Progress) -> Run:
        """Create the run whose results are written to a store. The time that earlier attempts used is subtracted from
        the time budget.
        """
        work, budget_s = self.manifest.plan, self.request.time_budget_s
        threat = self.plan.threat
        robust = bool(self.plan.members) and threat.goal is None and math.isfinite(threat.constraint.eps)
        spent_s = sum(store.spent(name).wall for name in work.stages)
        return Run(
            tuple(work.stages),
            store,
            executor,
            tuple(work.shards),
            work.batch_size,
            math.inf if budget_s is None else time.perf_counter() + budget_s - spent_s,
            stopper,
            progress,
            self.settle,
            {stage.name: stage.title for stage in self.plan.stages()},
            len(self.data) if robust else None,
            self.request.until is not None,
        )

    def settle(self, stage: str, shard: int | None) -> None:
        """Delete the stored answers of a model server for a shard or stage whose results are stored."""
        if self.served is not None:
            self.served.sent.done(stage, shard)

    def measurement(self, run: Run) -> Measurement:
        """Return the state that all stages of the run share: the plan, the models and the data. With a condition
        `until`, the examples that decide it are measured, and the state is restricted to them.
        """
        fit = learning_examples(self.plan, self.target, self.data, self.request.fit)
        across = paired_sets(self.plan, self.data, self.request.across)
        sets = {"fit": () if fit is None else (fit,), "across": across}
        if self.plan.geometry is not None:
            sets[GEOMETRY] = (self.data.read(0, min(self.plan.geometry.n, len(self.data))),)
        if self.plan.trials is not None:
            sets[STATEFUL] = (self.data.read(0, min(self.plan.trials.n, len(self.data))),)
        measurement = Measurement(run, self.plan, self.target, self.data, self.device, sets, self.served)
        return measurement if self.request.until is None else measured_until(measurement, self.request.until)

    def doubted(
        self, measurement: Measurement, by_stage: dict[str, Columns], missed: Sequence[str]
    ) -> Doubted:
        """Measure and store the doubts, with notes on the probes for which there was no time. If the doubts are already
        stored, they are returned unchanged.

        Adversarial examples of the probes are added to `by_stage`.
        """
        run, off = measurement.run, self.plan.doubts == "none"
        store = run.store
        if self.folder is not None and store.document(VERDICT) is not None:
            open_run(self.folder)  # refuses a finished run whose verdict does not follow from its files
        if (stored := store.document(DOUBTS)) is not None:
            if (columns := store.stage(FOUND)) is not None:
                by_stage[FOUND] = columns.columns
            return doubted_from_json(self.folder or Path(), stored)
        store.begin(DOUBTS, 0)
        stopwatch = Stopwatch(store, DOUBTS)
        not_measured = (
            ["no doubt was measured, because the doubts were switched off"]
            if off and self.plan.members and not self.plan.alone
            else []
        )
        with purpose(DOUBTS, 0, "doubts"):
            results = measuring.run_probes(measurement, by_stage, missed, stopwatch)
        measurement.confirm()
        if results.found:
            by_stage[FOUND] = results.found
        batches, halved = splits_of(store.splits())
        broken = {name: ids.tolist() for name, ids in results.findings.missed.items()}
        notes = [*missed, *not_measured, *halved]
        found = Doubted(results.findings.doubts, broken, list(results.probes), notes, results.cost, batches)
        # The inputs are stored first: if the document exists, a resumed run assumes that they are complete.
        with run.stopper.finishing():
            if results.found and store.stage(FOUND) is None:  # a killed attempt may have stored it already
                store.complete(FOUND, results.found)
            store.record(DOUBTS, found.to_json())
            stopwatch.tick(done=True)
        run.stored(DOUBTS, None)
        return found

    def adapted(self, measurement: Measurement, by_stage: dict[str, Columns], doubted: Doubted) -> Adapted:
        """Run the adaptive attacks that the doubts require, and record which doubts require each attack."""
        members = {member.name for member in self.plan.adaptive}
        because = required_attacks(
            [arm for arm in arms(self.plan.threat.constraint) if arm.name in members], doubted.doubts
        )
        stages = [s for s in self.plan.stages() if s.adaptive and s.member and s.member.name in because]
        missed = measurement.stages(stages, by_stage)
        found = Adapted(
            {arm: list(names) for arm, names in because.items()},
            list(self.target.masking.descriptions),
            self.target.blind_view,
            list(missed),
            [] if because else ["no doubt requires an adaptive attack, so none was run"],
        )
        document = measurement.run.document(ADAPTIVE, lambda: vars(found))
        return adapted_from_json(self.folder or Path(), document)

    def record(
        self, run: Run, by_stage: Mapping[str, Columns], doubted: Doubted, adapted: Adapted | None
    ) -> Record:
        """Return the record of the run, which consists of its manifest, the columns of the stages, the doubts and the
        results of adaptive attacks.
        """
        if self.served is not None:
            finish(self.served)
        sent = None if self.served is None else self.served.sent.totals
        seconds = {name: run.store.spent(name) for name in run.stages}
        nodes, looks = run.store.document(NODES), run.store.document(UNTIL)
        return Record(
            self.manifest,
            by_stage,
            doubted,
            adapted,
            seconds,
            sent,
            () if nodes is None else nodes["nodes"],
            None if looks is None else looks_from_json(self.folder or Path(), looks),
        )

    def evidence(self, record: Record) -> Evidence:
        """Return the evidence of the run. Raises `UnsoundProof` if a certified example is broken."""
        evidence = evidence_of(record)
        refuse_unsound(evidence)
        return evidence

    def adversarial(
        self, folder: RunFolder | None, evidence: Evidence, record: Record, notify: Notify
    ) -> Columns:
        """Return the adversarial examples that the run stores. In a folder, they are written to one file with the
        columns from which the verdict is computed, and those of clips as files as well.
        """
        inputs = adversarial(record)
        if folder is not None:
            columns = column_files.encode(worst_case(evidence, inputs), {})
            folder.keep(ATTACKED, f"{ATTACKED}{column_files.SUFFIX}", columns)
            self._write_clips(folder, evidence, inputs, notify)
        return inputs

    def _write_clips(self, folder: RunFolder, evidence: Evidence, inputs: Columns, notify: Notify) -> None:
        """Write adversarial inputs as files if they are clips, in folders of classes, and record their digests."""
        rate = evidence.data.get("sampling_rate")
        if rate is None or not self.plan.keep_adversarial or not inputs:
            return
        y = evidence["y"][Lookup(evidence["id"]).rows(inputs["id"])].tolist()
        classes = self.data.classes or tuple(map(str, range(max(y, default=0) + 1)))
        files = write_clips(folder.path / CLIPS, inputs["x"], y, inputs["id"].tolist(), classes, rate)
        folder.record(CLIPS, {"files": files})
        notify(f"clips: {folder.path / CLIPS}")

    def attackers(self, run: Run, evidence: Evidence) -> Mapping[str, Any] | None:
        """Measure the success rates of all attackers of a model with rotation. The result for each attacker is stored
        as soon as it is measured.
        """
        stored, keep = run.store.document(ROTATION), partial(run.record, ROTATION)
        if self.request.attackers is None or (stored is not None and stored["complete"]):
            return stored
        judged_on = self.data.read(0, min(JUDGED_BY_ATTACKERS, len(evidence)))
        table = self.request.attackers(evidence, judged_on, known=stored, keep=keep, progress=run.progress)
        keep(table)
        return table

    def judged(
        self, run: Run, evidence: Evidence, folder: RunFolder | None
    ) -> tuple[tuple[Judgement, ...], Mapping[str, str]]:
        """Judge the gates, store the verdict, and return the judgements with the accepted doubts. If the request
        contains neither gates nor accepted doubts, those of the stored run are used.
        """
        accepted, stored = self.request.accepted, run.store.document(VERDICT)
        before = None if stored is None else decided_from_json(self.folder or Path(), stored)
        if before is not None:
            accepted = accepted or before.accepted_doubts
        doubts, baseline = Doubts(evidence.doubts, accepted), self.request.baseline
        if before is not None and not self.request.gates:
            gates = judgements_of(before.gates, evidence, doubts)
        else:
            of_training = self.request.before
            gates = tuple(
                judge(claim, evidence, doubts, baseline=baseline, before=of_training)
                for claim in self.request.claims
            )
        files = {} if folder is None else files_of(folder.chain)
        run.record(VERDICT, decided(gates, accepted, files).to_json())
        return gates, accepted

    def announce(self, notify: Notify, *, is_step: bool) -> None:
        """Notify the user of the notes about model and data, and of the expected cost of the run: the number of rows
        that are sent to a model server, or the time. A step of another run states neither notes nor time.
        """
        if not is_step:
            for note in self.manifest.notes:
                notify(f"note: {note}")
        if self.request.until is not None:
            n = len(self.data)
            notify(
                f"the run ends as soon as {self.request.until.text!r} is decided; the following is expected if that "
                f"takes {n:,} example{'s' * (n != 1)}"
            )
        if self.served is not None:
            notify(self.rows_message(self.served))
        elif notify is not ignore and not is_step:
            for message in self.expected_time():
                notify(message)

    def rows_message(self, served: Served) -> str:
        """Return a message with the number of rows that the run is expected to send to the model server, and the number
        that earlier attempts sent.
        """
        work = self.manifest.plan
        rows = expected_rows(
            self.request, self.plan, self.target, len(self.data), work, opening=served.opening
        )
        earlier = served.sent.earlier
        return f"expected: {rows.description}" + (
            f"; {earlier:,} rows were sent before the stop" if earlier else ""
        )

    def expected_time(self) -> list[str]:
        """Return messages with the expected time of the run, if it can be estimated, and with the part that its time
        budget limits.
        """
        budget_s = self.request.time_budget_s
        seconds = expected_seconds(self.request, self.plan, self.target, self.data, self.device)
        messages = [] if seconds is None else [f"expected total time: about {duration(max(seconds, 1))}"]
        if budget_s is not None:
            messages.append(f"the attacks and proofs end after the time budget of {budget_s:g} s")
        return messages
