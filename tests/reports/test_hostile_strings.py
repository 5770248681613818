"""Whatever a user's files are called, every output shows it and none obeys it."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest

from holdfast.core.catalogue import names
from holdfast.core.evidence import Doubt
from holdfast.gates.grammar import Claim
from holdfast.gates.judging import Judgement
from holdfast.reports.card import card_report
from holdfast.reports.run import run_report
from holdfast.reports.summary import summary
from holdfast.reports.write import rendered, write
from reports import made

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><svg onload=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' autofocus onfocus='alert(1)",
    "--><img src=x onerror=alert(1)>",
    "]]><x/>",
    "javascript:alert(1)",
    "[a](javascript:alert(1)) ![b](//example.invalid/x)",
    "`|\n| x | y |\n# heading\n```",
    "{{ 7 * 7 }}{% for x in y %}",
    "&lt;script&gt;&#x3c;b&#x3e;&amp;",
    "\x1b[2J\x1b]0;title\x07\x00\x08",
    "\u202edetrevni\u2066\ufeff",
    "=cmd|' /C calc'!A0",
    "[red]bold[/red] [link=x]",
    "../../etc/passwd%00",
    "\udcff\udc80 bytes",
    "long " * 2000,
    "name\n::error file=a.py,line=1::owned\r\n##[error]owned",
    "\x9b2J\x9d0;title\x9c",
    "",
]

CI_COMMAND = re.compile(r"^\s*::[a-z-]+(\s.*)?::|##[a-z]*\[", re.MULTILINE)
"""What GitHub and Azure read as a command in the log of a job."""


def _summary(text):
    """A summary with the string in every place that a user, a file or a plugin can fill."""
    base = made.evidence(300, classes=(text, *made.CLASSES[1:]), gallery=4)
    table = made.evidence(300, image=False, gallery=4).gallery
    attack = dataclasses.replace(base.attacks[0], name=text, stage=text, settings={text: text}, notes=(text,))
    evidence = dataclasses.replace(
        base,
        attacks=(attack, *base.attacks[1:]),
        doubts=(
            Doubt(text, "raised", 1.0, 0.5, 3, text),
            Doubt(f"{text}2", "clear", message=text),
            *base.doubts,
        ),
        model={"name": text, "files": {text: text}, "how": text, text: text},
        data={"name": text, "classes": [text, *made.CLASSES[1:]], "features": [text] * 12, "noun": text},
        notes=(text,),
        suite=text,
    )
    estimate = made.estimate("robust_accuracy", evidence)
    gate = Judgement(Claim("robust_accuracy", ">=", 0.5, text=text), estimate, "unclear", (text,))
    run = dict.fromkeys(("verb", "created", "folder", "hardware", "command"), text)
    run |= {"hashes": {text: text}, "versions": {text: text, "holdfast": text}}
    metrics = {"robust_accuracy": estimate, text: estimate}
    both = (evidence, dataclasses.replace(evidence, tables=made.tables(gallery=table)))
    return [
        (summary(one, metrics=metrics, gates=[gate], accepted_doubts={text: text}, run=run), one)
        for one in both
    ]


class Shape(HTMLParser):
    """The tags of a page and their attributes, values of ours to be compared."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]


def shape(text):
    parser = Shape()
    parser.feed(text)
    return parser


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_output_obeys_a_users_string(text, tmp_path):
    for place, (content, evidence) in enumerate(_summary(text)):
        written = {}
        for suffix in names("reports"):
            path = tmp_path / f"{place}{suffix}"
            write(run_report(content, evidence.columns), path)
            written[suffix] = path.read_text(encoding="utf-8")
        parsed = shape(written[".html"])
        assert not {"script", "iframe", "object", "form", "link", "base"} & set(parsed.tags)
        assert not [
            name
            for _, name, _ in parsed.attributes
            if name.startswith("on") or name in {"style", "xlink:href"}
        ]
        for tag, name, value in parsed.attributes:
            assert name != "src" or (tag == "img" and value.startswith("data:image/png;base64,"))
            assert name != "href" or re.fullmatch(r"#[a-z]+", value)
        assert "\u202e" not in written[".html"] + made.notebook(content)
        inside = shape(made.notebook(content))
        assert {name for _, name, _ in inside.attributes} <= {"scope", "src", "alt", "width"}
        assert {"scope", *(["src"] if place == 0 else [])} <= {name for _, name, _ in inside.attributes}
        for tag, name, value in inside.attributes:
            assert name != "src" or (tag == "img" and value.startswith("data:image/png;base64,"))
        ET.fromstring(written[".xml"])
        assert json.loads(written[".json"]) == content
        prose = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", written[".md"])
        assert not re.search(r"(?<!\\)<(?!/?(details|summary)>)", prose)
        assert not re.search(r"(?<!\\)\]\(", prose)
        for said in (made.stated(content), made.on_terminal(content)):
            assert all(letter == "\n" or letter.isprintable() for letter in said)
            assert not CI_COMMAND.search(said)
        assert not re.search(r"[\x7f-\x9f\u202e\u2066]", written[".json"])


@pytest.mark.slow
def test_tags_of_the_page_do_not_depend_on_the_strings():
    for made_of in (made.page, made.notebook):
        plain = [shape(made_of(content)).tags for content, _ in _summary("plain")]
        assert {"table", "th", "td"} <= set(plain[0])
        for text in HOSTILE:
            if text:
                assert [shape(made_of(content)).tags for content, _ in _summary(text)] == plain


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_card_shows_hostile_names_and_its_lines_do_not_depend_on_them(text):
    def card(word):
        share = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
        held = dict.fromkeys(("clean_accuracy", "robust_accuracy"), share)
        side = {"n": 9, "suite": word, "metrics": held, "doubts": [{"name": word, "message": word}]}
        side |= {"doubts_tested": 1, "accepted_doubts": {word: word}, "notes": [f"of one side {word}"]}
        strings = dict.fromkeys(
            (
                "name",
                "threat",
                "evaluated_under",
                "recipe",
                "reason",
                "requested_recipe",
                "opened_by",
                "command",
                "hardware",
            ),
            word,
        )
        return strings | {
            "scope": "every pass",
            "before": {**side, "at_chance": False},
            "after": side,
            "verdict": "no difference shown",
            "change": {**share, "metric": "robust_accuracy", "before": 0.1, "after": 0.6},
            "advice": {"epochs": 9, "budget_s": 9, "recipe": word, "eps": 0.1, "lr": None, "warmup": None},
            "ended_by": "budget",
            "chosen": {"epoch": 1, "part": 1.0},
            "epochs": 2,
            "held_out": {"n": 9, "standard_error": 0.1, "before": held, "after": held},
            "generalisation": {"n_training": 9, "robust_in_training": 0.5, "robust_error_gap": share},
            "notes": [word],
            "cost": {"wall_s": 1.0, "cpu_s": 1.0, "forwards": 0, "planning_s": 0},
            "seed": 0,
            "curve": [{"epoch": 1, "clean": 0.5, "robust": 0.4, "accuracy": 0.6}],
            "settings": {"plain": {"name": word}},
        }

    said, plain = (rendered(card_report(card(word)), ".md") for word in (text or "plain", "plain"))
    assert said.count("\n") == plain.count("\n")
    assert all(letter == "\n" or letter.isprintable() for letter in said)
    prose = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", re.sub(r"^    .*$", "", said, flags=re.MULTILINE))
    assert not re.search(r"(?<!\\)<", prose)
    assert not re.search(r"(?<!\\)\]\((?!curve\.svg\))", prose)


def test_a_summary_from_elsewhere_brings_no_picture_from_elsewhere():
    content = made.summarised(made.evidence(gallery=1))
    for key in ("clean", "perturbed", "difference"):
        content["examples"][0][key] = "https://example.invalid/x.png"
    assert "example.invalid" not in made.page(content) + made.notebook(content)
