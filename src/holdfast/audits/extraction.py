"""The finding of the audit of extraction: copies of a model, what less detailed answers cost the attacker, and when a
guard recognises the queries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from holdfast.audits import ownership
from holdfast.audits.extraction_steps import (
    AGAIN,
    AGREEMENT,
    EVALUATION,
    EXACT,
    KEYS,
    NOISE,
    REPEATED,
    ROBUST,
    SENT,
    Arm,
    Design,
    before_first,
    guard_steps,
    recognised,
    refusal_step,
)
from holdfast.audits.finding import AuditVerdict, CountCurve, Finding, Line, Size, StoredSteps, Table
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.types import Mask
from holdfast.reports.words import percent
from holdfast.runs.store.columns import IDS, Count, Flag, Form, distinct, flag, whole
from holdfast.statistics.intervals import paired_difference, proportion

COPIED = 0.9
"""Agreement from which a model is flagged. A copy that errs on a tenth of the inputs replaces the model for few uses;
gates set other bounds."""
_SAME = 1e-4
"""largest difference of the probabilities of equal inputs that is attributed to rounding in batches of other sizes"""


class _Pool(TypedDict):
    name: Literal["own", "other", "noise"]
    n: Annotated[Size, Field(ge=1)]
    data: str
    """name of the data; empty for noise"""
    shared: Count
    """number of its inputs that are test examples, and were left out"""


class _Settings(TypedDict):
    pools: Annotated[list[_Pool], Field(min_length=1), distinct("name")]
    budgets: Annotated[list[Annotated[Size, Field(ge=1)]], Field(min_length=1)]
    classes: Annotated[Size, Field(ge=2)]
    labels_only: Flag
    attacked: Size
    exact: Flag
    guarded: Flag
    remote: Flag
    threat: str
    own_architecture: Flag


class _Sent(TypedDict):
    rows: Count


@dataclass(frozen=True)
class CopyResult:
    """What was measured on one copy."""

    arm: Arm
    queries: int
    same: Mask
    """for each test example, whether the copy and the model predict the same class"""
    right: Mask | None
    """whether the copy predicts the label; None for test examples without labels"""
    before: Mask | None = None
    """for each attacked test example, whether the model predicts its label; None if none was attacked"""
    after: Mask | None = None
    """whether it still does so on the example that was made on the copy"""

    @property
    def agreement(self) -> Estimate:
        """Share of the test examples for which the copy predicts the class of the model."""
        return proportion(self.same)

    @property
    def accuracy(self) -> Estimate | None:
        """Share of the test examples for which the copy predicts the label."""
        return None if self.right is None else proportion(self.right)

    @property
    def robust(self) -> Estimate | None:
        """Robust accuracy of the model under examples made on the copy."""
        return None if self.after is None else proportion(self.after)


def concluded(steps: StoredSteps) -> Finding:
    """Return the finding of an audit of extraction, or of one of ownership, from its stored steps."""
    if steps.manifest["config"]["settings"].get("suspect") is not None:
        return ownership.concluded(steps)
    settings: _Settings = steps.settings(_Settings)
    budgets = settings["budgets"]
    if sorted(set(budgets)) != budgets:
        raise steps.refuse(EVALUATION, f"the budgets {budgets} by the settings", "an ascending list")
    design = Design(
        {pool["name"]: pool["n"] for pool in settings["pools"]},
        budgets,
        settings["classes"],
        settings["labels_only"],
        settings["attacked"],
        settings["exact"],
        settings["guarded"],
        settings["remote"],
    )
    return _Conclusion(steps, settings, design, {pool["name"]: pool for pool in settings["pools"]}).finding()


@dataclass(frozen=True)
class _Conclusion:
    steps: StoredSteps
    settings: _Settings
    design: Design
    pools: Mapping[str, _Pool]

    @cached_property
    def test_examples(self) -> Columns:
        high = self.design.classes - 1
        return self.steps.columns(
            EVALUATION,
            {
                "id": Form(("n",), rows=(1, 2**40), whole=True),
                "row": IDS,
                "label": whole("n", low=-1, high=high),
                "predicted": whole("n", low=-1, high=high),
            },
        )

    @cached_property
    def evaluation(self) -> Columns:
        """The test examples that the model answers, on which copies are compared."""
        kept = self.test_examples["predicted"] >= 0
        if not kept.any():
            raise self.steps.refuse(EVALUATION, "no test example with an answer", "at least one")
        return {name: values[kept] for name, values in self.test_examples.items()}

    def copy(self, name: str, arm: Arm, queries: int, *, attacked: bool) -> CopyResult | None:
        """What was measured on a copy; None if there were fewer answers than classes."""
        n, attacked = len(self.evaluation["id"]), attacked and self.design.attacked > 0
        forms = {"predicted": whole("n", low=-1, high=self.design.classes - 1)}
        columns = dict(self.steps.columns(name, forms, n=n))
        if (columns["predicted"] < 0).any():
            return None
        if attacked:
            forms = {"place": whole("a", high=n - 1), "before": flag("a"), "after": flag("a")}
            columns |= self.steps.columns(name, forms, a=min(self.design.attacked, n))
            if (columns["after"] > columns["before"]).any():
                raise self.steps.refuse(name, "examples that became right by an attack", "none")
        label, known = self.evaluation["label"], bool((self.evaluation["label"] >= 0).all())
        return CopyResult(
            arm,
            queries,
            columns["predicted"] == self.evaluation["predicted"],
            columns["predicted"] == label if known else None,
            columns["before"] == 1 if attacked else None,
            columns["after"] == 1 if attacked else None,
        )

    @cached_property
    def results(self) -> list[CopyResult]:
        """The copies of all arms and budgets."""
        found = []
        for arm in self.design.arms():
            budgets = self.design.budgets_of(arm.pool)
            found += [self.copy(arm.step(n), arm, n, attacked=n == budgets[-1]) for n in budgets]
        return [each for each in found if each is not None]

    def answered(self, arm: Arm) -> Columns:
        forms = {"row": whole("q", high=self.design.pools[arm.pool] - 1), "refused": flag("q")}
        return self.steps.columns(arm.queried, forms, q=self.design.budgets_of(arm.pool)[-1])

    def of(self, arm: Arm) -> CopyResult | None:
        """The copy of an arm with the largest budget."""
        return next((each for each in self.results[::-1] if each.arm == arm), None)

    def finding(self) -> Finding:
        result, majority = self.of(self.design.result), float(self.evaluation["predicted"].bincount().max())
        n = len(self.evaluation["id"])
        seen = [each for pool in self.design.pools for each in self.seen(pool)]
        exact = self.exact()
        if result is None:
            refusals = int(self.answered(self.design.result)["refused"].sum())
            return Finding(
                "unclear",
                f"the server refused {refusals:,} of the queries, and fewer answers than classes remain",
                facts={"refused": refusals},
            )
        agreement = result.agreement
        verdict, reasons = _judged(agreement, majority / n)
        if exact is not None and exact["softmax"]:
            verdict = "flagged"
            reasons.insert(0, f"it is a softmax model: {exact['queries']:,} queries give its weights")
        metrics = {AGREEMENT: agreement}
        if result.robust is not None:
            metrics[ROBUST] = result.robust
        return Finding(
            verdict,
            f"a copy trained on {result.queries:,} answers ({_shown(result.arm)}) agrees with the model on "
            f"{percent(agreement.value)} of the test examples ({percent(agreement.low)} to {percent(agreement.high)})",
            [*reasons, *self.reasons(result, exact, seen)],
            self.facts(result, exact, seen),
            metrics,
            (self.table(), *self.costs(), *self.guard_table(seen)),
            curves=(self.curve(),) if self.design.several else (),
            limits=self.limits(),
        )

    def reasons(
        self, result: CopyResult, exact: Mapping[str, Any] | None, seen: Sequence[Mapping[str, Any]]
    ) -> list[str]:
        reasons = []
        if result.accuracy is not None:
            model = proportion(self.evaluation["label"] == self.evaluation["predicted"])
            reasons.append(
                f"the accuracy is {percent(result.accuracy.value)} of the copy and {percent(model.value)} of the model"
            )
        if result.robust is not None:
            assert result.before is not None
            reasons.append(
                f"the accuracy of the model is {percent(float(result.before.double().mean()))}, and "
                f"{percent(result.robust.value)} ({percent(result.robust.low)} to {percent(result.robust.high)}) after "
                f"attacks on this copy under {self.settings['threat']}"
            )
        if unanswered := len(self.test_examples["id"]) - len(self.evaluation["id"]):
            reasons.append(
                f"the server refuses {unanswered:,} of {len(self.test_examples['id']):,} test examples, on which "
                "copies are not compared"
            )
        again = self.again()
        if again["changed"]:
            reasons.append(
                f"the model answers differently for {again['changed']} of {again['n']} equal inputs: the probabilities "
                f"differ by up to {again['difference']:.2g}; the agreement is that with one answer for each input"
            )
        if exact is not None and exact["softmax"]:
            reasons.append(
                f"the logits of the extracted weights differ from those of the model by at most {exact['error']:.1e}, "
                "up to a term that is common to all classes"
            )
        reasons += [_seen_sentence(each) for each in seen if each["recognised"] or each["first_refused"]]
        return reasons

    def again(self) -> dict[str, Any]:
        columns = self.steps.columns(
            AGAIN, {"same": flag("m"), "difference": Form(("m",), rows=(1, REPEATED), low=0, high=1)}
        )
        changed = (columns["same"] == 0) | (columns["difference"] > _SAME)
        return {
            "changed": int(changed.sum()),
            "n": len(changed),
            "difference": float(columns["difference"].max()),
        }

    def exact(self) -> dict[str, Any] | None:
        """The exact extraction; None if it was not tried."""
        if not self.design.exact:
            return None
        if not int(self.steps.columns(EXACT, {"softmax": flag("s")}, s=1)["softmax"]):
            return {"softmax": False}
        n = len(self.evaluation["id"])
        forms = {
            "features": whole("s", low=1, high=2**31),
            "predicted": whole("n", high=self.design.classes - 1),
        }
        columns = self.steps.columns(EXACT, {**forms, "error": Form(low=0)}, n=n, s=1)
        return {
            "softmax": True,
            "queries": int(columns["features"]) + 1,
            "error": float(columns["error"].max()),
            "agreement": float((columns["predicted"] == self.evaluation["predicted"]).double().mean()),
        }

    def seen(self, pool: str) -> list[dict[str, Any]]:
        """What a guard, or the server itself, does about the random queries of a pool."""
        arm = replace(self.design.result, pool=pool)
        answered, found = self.answered(arm), []
        if self.design.remote and answered["refused"].any():
            refusals = answered["refused"] == 1
            copy = self.copy(refusal_step(pool), arm, before_first(refusals), attacked=False)
            found.append(_seen(pool, "the server", 1, copy, refusals))
        for keys in KEYS * self.design.guarded:
            seen, copied = guard_steps(pool, keys)
            forms = {name: flag("q") for name in ("flagged", "stateful", "refused")}
            columns = self.steps.columns(seen, forms, q=len(answered["row"]))
            masks = {name: columns[name] == 1 for name in forms}
            copy = self.copy(copied, arm, before_first(recognised(columns)), attacked=False)
            found.append(
                _seen(pool, "the guard", keys, copy, masks["refused"], masks["stateful"], masks["flagged"])
            )
        return found

    def facts(
        self, result: CopyResult, exact: Mapping[str, Any] | None, seen: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        sent = self.steps.source.document(SENT)
        return {
            "queries": result.queries,
            "agreement": result.agreement.value,
            "agreement_low": result.agreement.low,
            "agreement_high": result.agreement.high,
            "copies": [
                {
                    "pool": each.arm.pool,
                    "answers": each.arm.answers,
                    "choice": each.arm.choice,
                    "queries": each.queries,
                    "agreement": vars(each.agreement),
                    "accuracy": None if each.accuracy is None else vars(each.accuracy),
                    "robust_accuracy": None if each.robust is None else vars(each.robust),
                }
                for each in self.results
            ],
            "costs": [
                {"pool": arm.pool, "answers": arm.answers, "difference": vars(difference)}
                for arm, difference in self.differences()
            ],
            "exact": exact,
            "guard": list(seen),
            "repeated": self.again(),
            "shared_with_test": {name: pool["shared"] for name, pool in self.pools.items()},
            **({} if sent is None else {"rows_sent": self.steps.document(SENT, _Sent)["rows"]}),
        }

    def table(self) -> Table:
        rows: list[tuple[str | int, ...]] = []
        for each in self.results:
            numbers = [_interval(number) for number in (each.agreement, each.accuracy, each.robust)]
            rows.append((each.arm.pool, each.arm.answers, each.arm.choice, each.queries, *numbers))
        data = "; ".join(f"{name}: {pool['data']}" for name, pool in self.pools.items() if pool["data"])
        robust = (
            f"Robust is the accuracy of the model on {self.design.attacked:,} examples that were made on the copy "
            f"({self.settings['threat']}). "
        ) * (self.design.attacked > 0)
        return Table(
            "Copies",
            ("pool", "answers", "choice", "queries", "agreement", "accuracy", "robust"),
            rows,
            f"In percent, with 95 % intervals over the test examples. Pools: {data or NOISE}. {robust}The result is "
            "the first row with the most queries, chosen before.",
        )

    def differences(self) -> list[tuple[Arm, Estimate]]:
        """Difference of the agreement to that with all scores, for answers that reveal less, at the largest budget."""
        found = []
        for arm in self.design.arms():
            whole, less = self.of(replace(arm, answers="scores", choice="random")), self.of(arm)
            if arm.answers != "scores" and whole is not None and less is not None:
                found.append((arm, paired_difference(less.same, whole.same)))
        return found

    def costs(self) -> list[Table]:
        def points(value: float) -> str:
            return f"{100 * value:+.1f}"

        rows = [
            (arm.pool, arm.answers, points(d.value), points(d.low), points(d.high))
            for arm, d in self.differences()
        ]
        title, headings = "What less detailed answers cost the attacker", ("change", "low", "high")
        note = "Change of the agreement in percentage points, with its 95 % interval."
        return [Table(title, ("pool", "answers", *headings), rows, note)] if rows else []

    def guard_table(self, seen: Sequence[Mapping[str, Any]]) -> list[Table]:
        rows = []
        for each in seen:
            firsts = [each[name] or "none" for name in ("fired", "recognised", "first_refused")]
            then = each["agreement"]
            agreement = _interval(None if then is None else Estimate(**then))
            rows.append((each["pool"], each["by"], each["keys"], *firsts, f"{each['n_fired']:,}", agreement))
        firsts = ["first alarm", "first recognised", "first refused"]
        note = (
            "Numbers of queries of the same stream, one after the other. An alarm is that of any rule, of which "
            "calibrated ones fire on some benign inputs too; recognised is by the query detector. The agreement is "
            "that of a copy trained on the answers before the first query that was recognised or refused."
        )
        headings = ("pool", "by", "keys", *firsts, "alarms", "agreement then")
        return [Table("What the guard sees", headings, rows, note)] if rows else []

    def curve(self) -> CountCurve:
        """Agreement by the number of queries, for the result, labels, and the other pools: at most three lines."""
        arms = [self.design.result, replace(self.design.result, answers="labels")]
        arms += [replace(self.design.result, pool=pool) for pool in [*self.design.pools][1:]]
        lines = [
            Line(
                _shown(arm),
                [(each.queries, each.agreement.value) for each in self.results if each.arm == arm],
            )
            for arm in [*dict.fromkeys(arms)][:3]
        ]
        return CountCurve("Agreement of the copy with the model", "number of queries", "agreement", lines)

    def limits(self) -> list[str]:
        architecture = (
            "The copies have the architecture of the model, which an attacker may not know."
            if self.settings["own_architecture"]
            else "The copies have a small architecture of the audit; one more like that of the model may agree more."
        )
        return [
            architecture,
            "The intervals are over test examples; another training of the copy differs as well.",
            "Other attackers choose queries better or train longer: a low agreement is no proof of safety.",
            *(
                ["A guard sees a naive attacker here, who sends inputs of a pool as they are."]
                if self.design.guarded
                else []
            ),
        ]


def _judged(agreement: Estimate, majority: float) -> tuple[AuditVerdict, list[str]]:
    allowed = f"a model is flagged if a copy agrees on {100 * COPIED:.0f} % or more"
    if agreement.low <= majority:
        return "unclear", [
            f"the model predicts one class for {percent(majority)}, and the copy agrees no more often"
        ]
    if agreement.low >= COPIED:
        return "flagged", [allowed]
    return ("unclear" if agreement.high >= COPIED else "not flagged"), [allowed]


def _seen(
    pool: str,
    by: str,
    keys: int,
    copy: CopyResult | None,
    refusals: Mask,
    stateful: Mask | None = None,
    flagged: Mask | None = None,
) -> dict[str, Any]:
    """Numbers of the first queries, counted from 1, that were recognised in some way, None for none; and the agreement
    of the copy before, None if there was none.
    """

    def first(mask: Mask | None) -> int | None:
        return None if mask is None or not mask.any() else before_first(mask) + 1

    fired = refusals if flagged is None else flagged
    return {
        "pool": pool,
        "keys": keys,
        "by": by,
        "n": len(refusals),
        "fired": first(fired),
        "n_fired": int(fired.sum()),
        "recognised": first(stateful),
        "first_refused": first(refusals),
        "agreement": None if copy is None else vars(copy.agreement),
    }


def _seen_sentence(each: Mapping[str, Any]) -> str:
    keys = "one key" if each["keys"] == 1 else f"{each['keys']} keys"
    first = min(each[name] for name in ("recognised", "first_refused") if each[name] is not None)
    then = each["agreement"]
    until = "" if then is None else f", and a copy trained until then agrees on {percent(then['value'])}"
    return (
        f"{each['by']} flags or refuses {each['n_fired']:,} of {each['n']:,} queries of the pool {each['pool']} with "
        f"{keys}; query {first:,} is the first that it recognises or refuses{until}"
    )


def _shown(arm: Arm) -> str:
    return f"{arm.answers}, pool {arm.pool}" + (", k-centre" if arm.choice == "k-centre" else "")


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"
