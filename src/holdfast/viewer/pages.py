"""The pages of a folder of runs. Each has a path, under which the server answers and the export writes it."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from typing import Any, Literal

from markupsafe import Markup

from holdfast.adaptation.journal import Adapted, open_adaptation, steps_table
from holdfast.audits.audit import open_audit
from holdfast.core.errors import HoldfastError, TargetError, UsageError
from holdfast.core.names import slug
from holdfast.io.models.factories import names_code
from holdfast.io.remote.remote import SCHEMES
from holdfast.reports.formats.csv import csv_text
from holdfast.reports.formats.html import filled
from holdfast.reports.run import card_facts, example_group, metrics_section
from holdfast.reports.tree import Block, Items, Report, Section, Table
from holdfast.reports.words import VERDICTS, amount, shown_metrics
from holdfast.reports.write import rendered
from holdfast.rotation.ledger import verify_pool
from holdfast.runs.assess.result import Result
from holdfast.runs.documents.record import consistent
from holdfast.runs.documents.stored_runs import Comparison, open_run
from holdfast.server.asgi import style_sheet
from holdfast.server.audit_folder import verify_audit
from holdfast.viewer import shelf as outcomes
from holdfast.viewer.shelf import Item, Shelf, fingerprint

Explain = Callable[[Result, int], str]
"""function from a run and the id of an example to the HTML fragment of its explanation"""
Json = dict[str, Any]

HTML, CSV, CSS = "text/html; charset=utf-8", "text/csv; charset=utf-8", "text/css; charset=utf-8"
MOST_ROWS = 500
"""Largest number of examples in a table of a page; the CSV file has all."""
_MOST_PARTNERS = 50
_KEPT = 8
"""number of opened runs, and of explanations, that are kept in memory"""
_OUTCOMES = {"pass": "passed", "fail": "failed", "no gate": "without a gate"}
"""verdicts in a sentence that counts them, if they differ from the verdicts themselves"""
_TONES = {"pass": "pass", "fail": "fail", "unclear": "unclear", "flagged": "fail", "not flagged": "pass"}


@dataclass(frozen=True)
class Page:
    """The content of a page or a file: its `text` and its type `media`."""

    text: str
    media: str = HTML
    complete: bool = False
    """whether it is a report with a style sheet of its own"""


class NoPage(Exception):
    """There is no page under a path."""


@dataclass(frozen=True)
class _Opened:
    """A run that was read, with what each attack did."""

    result: Result
    tried: list[outcomes.Attempt]
    rows: Mapping[int, int]
    """row of each example by its id"""

    @property
    def names(self) -> dict[str, str]:
        """Names of the attacks of the suite by their stages, which addresses of pages contain."""
        return {each.stage: each.name for each in self.tried}


class Site:
    """The pages of a folder of runs. `explain` computes explanations on demand; None if none are computed."""

    def __init__(
        self, shelf: Shelf, explain: Explain | None = None, *, mode: Literal["server", "files"] = "server"
    ) -> None:
        self.shelf, self.explain, self.mode = shelf, explain, mode
        self._opened: OrderedDict[str, tuple[tuple[object, ...], _Opened]] = OrderedDict()
        self._explained: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._pages = {
            "audit": self._audit,
            "pool": self._pool,
            "chains": self._chains,
            "adaptation": self._adaptation,
        }
        self._one_at_a_time = threading.RLock()  # an explanation takes a core, and a run memory

    def page(self, path: str, query: Mapping[str, str] | None = None) -> Page:
        """Return the page under a path such as `run/a-1234abcd/example/17`. Raises `NoPage` if there is none."""
        parts = [part for part in path.split("/") if part]
        match parts:
            case []:
                return self._index(dict(query or {}))
            case ["style.css"]:
                return Page(style_sheet(), CSS)
            case ["trend", key, metric]:
                return self._trend(key, metric.removesuffix(".csv"), csv_only=metric.endswith(".csv"))
            case ["compare", first, second, *rest] if len(rest) < 2:
                return self._comparison(first, second, rest[0] if rest else "")
            case ["run" | "audit" | "pool" | "chains" | "adaptation" as kind, item_id, *rest]:
                item = self.shelf.item(item_id)
                if item is None or item.kind not in (kind, "unreadable"):
                    raise NoPage
                return self._of_item(item, rest)
        raise NoPage

    # --- frames

    def _filled(self, path: str, template: str, title: str, **content: Any) -> Page:
        link = partial(self._link, path)
        frame = {"link": link, "title": title, "root": self.shelf.root.name, "live": self.mode == "server"}
        return Page(filled(template, **frame, **content))

    def _link(self, path: str, *parts: object) -> str:
        """The address, on the page under a path, of the page or file with the parts of another path."""
        target, depth = "/".join(map(str, parts)), len([part for part in path.split("/") if part])
        if self.mode == "server":
            return f"/{target}"
        is_file = target.endswith((".css", ".csv"))
        return "../" * depth + (target if is_file else f"{target}/index.html".lstrip("/"))

    def _failed(self, item: Item, error: str) -> Page:
        return self._filled(
            f"{item.kind}/{item.id}", "site-failed.html.j2", item.name, item=item, error=error
        )

    # --- index and trends

    def _index(self, query: Mapping[str, str]) -> Page:
        items, wanted = self.shelf.items(), query.get("q", "").strip().lower()[:200]
        shown = [item for item in items if all(word in _words(item) for word in wanted.split())]
        waiting = sum(
            1 for item in items if item.entry and item.entry.finished and not item.checked and not item.fault
        )
        return self._filled(
            "",
            "site-index.html.j2",
            "Runs",
            items=[item for item in shown if item.kind in ("run", "audit", "unreadable")],
            others=[item for item in shown if item.kind in ("pool", "chains", "adaptation")],
            waiting=waiting,
            q=wanted,
            model_key=model_key,
            tones=_TONES,
            outcomes=_OUTCOMES,
            heading=_amounts(shown),
            counts=Counter(
                _outcome(item) for item in shown if item.state and item.kind in ("run", "audit", "unreadable")
            ),
        )

    def _trend(self, key: str, metric: str, *, csv_only: bool) -> Page:
        runs = [item for item in self.shelf.items() if item.entry and model_key(item.entry.model) == key]
        metrics = list(dict.fromkeys(name for item in runs for name, _ in item.metrics))
        if not runs or (metric not in metrics and any(item.checked for item in runs)):
            raise NoPage
        found, model = outcomes.trends(runs, metric), runs[0].entry.model if runs[0].entry else ""
        if csv_only:
            return Page(csv_text(outcomes.trend_csv(found, metric)), CSV)
        return self._filled(
            f"trend/{key}/{metric}",
            "site-trend.html.j2",
            f"Trend of {model}",
            model=model,
            key=key,
            metric=metric,
            metrics=metrics,
            trends=found,
            size=(outcomes.WIDTH, outcomes.HEIGHT),
            waiting=sum(not item.checked for item in runs if item.entry and item.entry.finished),
        )

    # --- entries

    def _of_item(self, item: Item, rest: Sequence[str]) -> Page:
        if item.kind == "unreadable":
            return self._failed(item, item.fault)
        try:
            with consistent(item.path):
                if item.kind == "run":
                    return self._run_page(item, rest)
                if rest:
                    raise NoPage
                return self._pages[item.kind](item)
        except (HoldfastError, OSError) as error:
            if isinstance(error.__cause__, NoPage):
                raise NoPage from error
            text = error.on_command_line() if isinstance(error, HoldfastError) else str(error)
            return self._failed(item, text)

    def _audit(self, item: Item) -> Page:
        if item.entry is not None and not item.entry.finished:
            return self._failed(item, f"the audit is {item.state}")
        report = open_audit(item.path).report
        return self._filled(f"audit/{item.id}", "site-report.html.j2", item.name, item=item, r=report)

    def _pool(self, item: Item) -> Page:
        verified = verify_pool(item.path)
        facts = {
            "entries of the ledger": verified.entries,
            "sets that were decrypted": verified.sets,
            "head": verified.head,
            "authenticated": "yes" if verified.authenticated else "no, without the key of the pool",
        }
        tables = [("Parameter sets", Table(("set", "status"), verified.members, texts=frozenset({1})))]
        return self._facts(item, "The ledger of the pool is consistent", facts, tables)

    def _chains(self, item: Item) -> Page:
        verified = verify_audit(item.path)
        facts = {
            "chains": verified.chains,
            "records": verified.records,
            "requests answered": verified.answered,
            "requests failed": verified.failed,
            "requests interrupted": verified.interrupted,
            "requests in progress": verified.open,
            "records lost": verified.lost,
            "head": verified.head,
        }
        tables = [("Servers", Items(verified.notes))] if verified.notes else []
        return self._facts(item, "All chains of the folder are consistent", facts, tables)

    def _adaptation(self, item: Item) -> Page:
        stored = open_adaptation(item.path)
        facts = {"server": stored.server, "run": stored.run, "reason": stored.reason, "head": stored.head}
        title = "The adaptation is not finished" if stored.outcome is None else str(Adapted.of(stored))
        return self._facts(item, title, facts, [("Steps", steps_table(stored.steps))])

    def _facts(self, item: Item, heading: str, facts: Json, blocks: Sequence[tuple[str, Block]]) -> Page:
        sections = [Section("Facts", (card_facts(facts),))]
        sections += [Section(title, (block,)) for title, block in blocks]
        report = Report(item.kind, item.name, heading, facts, sections)
        return self._filled(f"{item.kind}/{item.id}", "site-report.html.j2", item.name, item=item, r=report)

    # --- runs

    def open(self, item: Item) -> _Opened:
        """Return the finished run of an entry, read and checked. Raises `TargetError` if it cannot be read."""
        with self._one_at_a_time:
            state = fingerprint(item.path)
            known = self._opened.get(item.id)
            if known is None or known[0] != state:
                with consistent(item.path):
                    result = open_run(item.path)
                    result.summary()  # pages show it
                rows = {int(example): row for row, example in enumerate(result.evidence["id"])}
                known = self._opened[item.id] = state, _Opened(result, outcomes.attempts(result), rows)
            self._opened.move_to_end(item.id)
            if len(self._opened) > _KEPT:
                self._opened.popitem(last=False)
            return known[1]

    def _run_page(self, item: Item, rest: Sequence[str]) -> Page:
        if item.entry is not None and not item.entry.finished:
            return self._failed(item, f"the run is {item.state}")
        opened = self.open(item)
        match list(rest):
            case []:
                return self._run(item, opened)
            case ["report"]:
                return Page(rendered(opened.result.report, ".html"), complete=True)
            case ["examples.csv"]:
                return Page(csv_text(_all_examples(opened)), CSV)
            case ["examples", by]:
                return self._examples(item, opened, by, "")
            case ["examples", by, but]:
                return self._examples(item, opened, by, but)
            case ["example", number] if _is_id(number, opened):
                return self._example(item, opened, int(number))
            case ["example", number, "why"] if _is_id(number, opened) and self.explain is not None:
                return self._why(item, opened, int(number))
        raise NoPage

    def _run(self, item: Item, opened: _Opened) -> Page:
        summary, stages = opened.result.summary(), [each.stage for each in opened.tried]
        counts = {
            by: {
                but: int(outcomes.broken_not(opened.tried, by, but).sum())
                for but in ("", *stages)
                if but != by
            }
            for by in (outcomes.ANY, *stages)
            if stages
        }
        path, key = f"run/{item.id}", model_key(item.entry.model if item.entry else "")
        shown = (name for name in shown_metrics(summary) if item.value(name))
        addresses = {name: self._link(path, "trend", key, name) for name in shown}
        return self._filled(
            path,
            "site-run.html.j2",
            item.name,
            item=item,
            s=summary,
            verdict=VERDICTS[summary["verdict"]],
            tone=summary["verdict"].replace(" ", "-"),
            metrics=metrics_section(summary, addresses),
            attacks=opened.names,
            counts=counts,
            partners=self._partners(item),
        )

    def _partners(self, item: Item) -> list[Item]:
        """The runs to compare a run with: on the same data, those of the same model first, at most 50; in an export
        only the one before it.
        """
        entry, items = item.entry, self.shelf.items()
        if entry is None:
            return []
        found = [
            each
            for each in items
            if each.kind == "run"
            and each.id != item.id
            and each.entry
            and each.entry.finished
            and not each.fault
            if each.entry.data == entry.data
        ]
        found.sort(key=lambda each: each.entry is not None and each.entry.model != entry.model)
        if self.mode == "files":
            place = entry.created, item.name
            return [each for each in found if each.entry and (each.entry.created, each.name) < place][:1]
        return found[:_MOST_PARTNERS]

    def _examples(self, item: Item, opened: _Opened, by: str, but: str) -> Page:
        try:
            mask = outcomes.broken_not(opened.tried, by, but)
        except (KeyError, RuntimeError) as error:
            raise NoPage from error
        rows = mask.nonzero()[:, 0].tolist()
        evidence, names = opened.result.evidence, opened.names
        breakers = outcomes.broken_by(evidence)
        shown = [
            {
                "id": int(evidence["id"][row]),
                **dict(zip(("label", "clean", "attacked"), outcomes.texts(evidence, row), strict=True)),
                "by": breakers[row],
                "outcomes": [each.outcome(row) for each in opened.tried],
            }
            for row in rows[:MOST_ROWS]
        ]
        return self._filled(
            f"run/{item.id}/examples/{by}/{but}",
            "site-examples.html.j2",
            item.name,
            item=item,
            by=names.get(by, by),
            but=names.get(but, but),
            n=len(rows),
            rows=shown,
            attacks=list(names.values()),
            exported=self._exported(opened),
        )

    def _exported(self, opened: _Opened) -> set[int]:
        """The ids of the examples with a page: all on a server, those with stored pictures in an export."""
        if self.mode == "server":
            return set(opened.rows)
        return {int(example["id"]) for example in opened.result.summary()["examples"]} & set(opened.rows)

    def _example(self, item: Item, opened: _Opened, number: int) -> Page:
        evidence, row = opened.result.evidence, opened.rows[number]
        summary = opened.result.summary()
        stored = next((each for each in summary["examples"] if each["id"] == number), None)
        label, clean, attacked = outcomes.texts(evidence, row)
        facts = {
            "label": label,
            "prediction when clean": clean,
            "margin when clean": float(evidence["margin"][row]),
            "outcome": outcomes.kinds(evidence)[row],
            "broken by": outcomes.broken_by(evidence)[row],
        }
        if facts["broken by"]:
            facts["prediction when attacked"] = attacked
            norms = ("linf", "l2", "l1", "l0") if evidence.threat.constraint.in_input_units else ()
            facts |= {f"distance {norm}": float(evidence[f"distance_{norm}"][row]) for norm in norms}
        return self._filled(
            f"run/{item.id}/example/{number}",
            "site-example.html.j2",
            f"Example {number} of {item.name}",
            item=item,
            number=number,
            facts_shown=facts,
            measured=card_facts(facts),
            outcomes=[(each.name, each.outcome(row)) for each in opened.tried],
            stored=None if stored is None else example_group(stored, summary["threat"]),
            explains=self.explain is not None,
            of_classes="task" not in evidence.model,
        )

    def _why(self, item: Item, opened: _Opened, number: int) -> Page:
        key = f"{item.id}-{opened.result.about['hashes'].get('chain', '')}", number
        with self._one_at_a_time:
            fragment = self._explained.get(key)
            if fragment is None and self.explain is not None:
                try:
                    fragment = self._explained[key] = self.explain(opened.result, number)
                except (HoldfastError, OSError) as error:
                    text = error.on_command_line() if isinstance(error, HoldfastError) else str(error)
                    return self._failed(item, text)
            if len(self._explained) > _KEPT:
                self._explained.popitem(last=False)
        title = f"Explanation of example {number} of {item.name}"
        place = f"run/{item.id}/example/{number}/why"
        content = Markup(fragment)  # noqa: S704 (a template filled it, which escapes names)
        return self._filled(place, "site-why.html.j2", title, item=item, number=number, fragment=content)

    # --- comparisons

    def _comparison(self, first_id: str, second_id: str, wanted: str) -> Page:
        items = [self.shelf.item(item_id) for item_id in (first_id, second_id)]
        first, second = items
        if first is None or second is None or {first.kind, second.kind} != {"run"}:
            raise NoPage
        try:
            runs = [self.open(item).result for item in (first, second)]
            with consistent(first.path):
                shared = outcomes.pairs(runs[0].evidence, runs[1].evidence)
                content = Comparison(*runs).summary()
        except (HoldfastError, OSError) as error:
            return self._failed(second, str(error))
        if wanted == "examples.csv":
            heading = [
                "id in the first",
                "id in the second",
                "label",
                "first",
                "second",
                "broken by",
                "broken by",
            ]
            return Page(csv_text([heading, *(list(asdict(pair).values()) for pair in shared)]), CSV)
        counts = Counter((pair.first, pair.second) for pair in shared)
        chosen = tuple(wanted.split("-"))
        if wanted and (len(chosen) != 2 or not set(chosen) <= set(outcomes.KINDS)):
            raise NoPage
        listed = [pair for pair in shared if (pair.first, pair.second) == chosen] if wanted else []
        return self._filled(
            f"compare/{first_id}/{second_id}/{wanted}",
            "site-compare.html.j2",
            f"{first.name} and {second.name}",
            first=first,
            second=second,
            s=content,
            counts=counts,
            kinds=outcomes.KINDS,
            chosen=chosen if wanted else (),
            n=len(listed),
            rows=listed[:MOST_ROWS],
            exported=[self._exported(self.open(item)) for item in (first, second)],
        )

    # --- export

    def paths(self) -> Iterator[str]:
        """Yield the path of every page of an export."""
        yield from ("", "style.css")
        items = self.shelf.items()
        models: dict[str, dict[str, None]] = {}
        for item in items:
            if item.kind == "unreadable":
                yield f"run/{item.id}"
                continue
            yield f"{item.kind}/{item.id}"
            if item.entry is not None:
                models.setdefault(model_key(item.entry.model), {}).update(
                    (name, None) for name, _ in item.metrics
                )
            if item.kind == "run" and item.verdict and not item.fault:
                yield from self._paths_of(item)
        for key, metrics in models.items():
            for metric in metrics:
                yield from (f"trend/{key}/{metric}", f"trend/{key}/{metric}.csv")

    def _paths_of(self, item: Item) -> Iterator[str]:
        start, opened = f"run/{item.id}", self.open(item)
        yield from (f"{start}/report", f"{start}/examples.csv")
        stages = [each.stage for each in opened.tried]
        for by in (outcomes.ANY, *stages) if stages else ():
            yield f"{start}/examples/{by}"
            others = [but for but in stages if but != by and outcomes.broken_not(opened.tried, by, but).any()]
            yield from (f"{start}/examples/{by}/{but}" for but in others)
        yield from (f"{start}/example/{number}" for number in sorted(self._exported(opened)))
        for other in self._partners(item):
            pair = f"compare/{other.id}/{item.id}"
            yield from (pair, f"{pair}/examples.csv")
            yield from (f"{pair}/{a}-{b}" for a in outcomes.KINDS for b in outcomes.KINDS)


def model_key(name: str) -> str:
    """Return the name of a model in addresses."""
    return f"{slug(name)[:60] or 'model'}-{sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _amounts(items: Sequence[Item]) -> str:
    """The numbers of runs and of audits in words."""
    audits = sum(item.kind == "audit" for item in items)
    runs = sum(item.kind in ("run", "unreadable") for item in items)
    counted = [amount(n, noun) for n, noun in ((runs, "runs"), (audits, "audits")) if n]
    return " and ".join(counted) or "No run"


def _outcome(item: Item) -> str:
    """The state of a run or an audit, without its number of stages if it is not finished."""
    unfinished = item.entry is not None and not item.entry.finished and not item.fault
    return "not finished" if unfinished else item.state


def _words(item: Item) -> str:
    entry = item.entry
    about = (entry.verb, entry.model, entry.data, entry.threat, entry.suite) if entry else (item.kind,)
    return " ".join((item.name, item.state, *about)).lower()


def _is_id(text: str, opened: _Opened) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 16 and int(text) in opened.rows


def _all_examples(opened: _Opened) -> list[list[Any]]:
    """All examples of a run with the outcome of each attack, as rows of a table with a heading."""
    evidence, of_examples = opened.result.evidence, outcomes.kinds(opened.result.evidence)
    breakers = outcomes.broken_by(evidence)
    rows: list[list[Any]] = [["id", "label", "outcome", "broken by", *opened.names.values()]]
    for number, row in opened.rows.items():
        label = outcomes.texts(evidence, row)[0]
        attacked = [each.outcome(row) for each in opened.tried]
        rows.append([number, label, of_examples[row], breakers[row], *attacked])
    return rows


def explainer(*, trust_code: bool = False) -> Explain:
    """Return the function that explains an example of a run as HTML.

    The address of the model is that of the run, which may come from someone else. Without `trust_code`, a model is
    therefore refused whose opening would run code or send requests. A model that changed since the run is refused, too.
    """

    def explain_example(result: Result, number: int) -> str:
        from holdfast.verbs.explain import explain  # opens models, which the other pages do not need
        from holdfast.verbs.settings import Explain as ExplainSettings

        card = result.evidence.model
        name, folder = str(card.get("name", "")), str(result.run_folder)
        is_code = card.get("how") == "python" or names_code(name)
        is_remote = name.partition("://")[0] in SCHEMES
        if (is_code or is_remote) and not trust_code:
            raise UsageError(
                f"the model of the run is {name!r}; opening it would {'run code' if is_code else 'send requests'}. The "
                "page of the example shows what the run stores; if you trust the model, start holdfast ui with "
                "--trust-code"
            )
        if not is_code:
            return explain(folder, index=number).fragment(level=1)
        data: Any = result.evidence.data.get("name")
        if data is None:
            raise TargetError(
                f"the run {folder!r} does not name its data; use holdfast explain with the data"
            )
        settings = ExplainSettings(model=name, data=data, from_run=folder, index=number, trust_code=True)
        try:
            return settings.run().fragment(level=1)
        except UsageError as error:
            reason = error.on_command_line()
            raise UsageError(
                f"the model {name} and the data {data} cannot be opened without the options of the run, which its "
                f"folder does not state ({reason}); use holdfast explain {name} {data} with these options and "
                f"--from-run {folder} --index {number}"
            ) from error

    return explain_example
