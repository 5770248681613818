"""The page in a real browser without a network: nothing is asked for, nothing is logged, everybody can read it."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from holdfast.reports import comparison
from holdfast.reports.audit import monitoring_report
from holdfast.reports.write import rendered
from holdfast.verbs.reports import FolderEvidence, annex, annex_report
from reports import made

FOLDER = Path(__file__).parent / "browser"
HOSTILE = "<script>alert(1)</script><img src=//example.invalid/x onerror=alert(2)>"

pytestmark = [pytest.mark.browser, pytest.mark.long, pytest.mark.slow]


@dataclass(frozen=True)
class Browser:
    """What opens a page."""

    node: str
    chromium: str

    def __call__(self, path: Path) -> list[dict]:
        command = [self.node, str(FOLDER / "visit.mjs"), self.chromium, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def browser() -> Browser:
    node = shutil.which("node")
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    chromium = next((found for name in names if name and (found := shutil.which(name))), None)
    if node is None or chromium is None:
        pytest.skip("no node or no Chromium; on Debian: apt-get install nodejs chromium")
    if not (FOLDER / "node_modules" / "axe-core").is_dir():
        pytest.skip("the packages of tests/browser are not installed: npm ci --prefix tests/browser")
    return Browser(node, chromium)


def _failing_images():
    return made.page(made.summarised(made.evidence(), "robust_accuracy >= 0.5", "clean_accuracy >= 0.9"))


def _accepted_table():
    evidence = made.evidence(300, image=False, classes=("benign", "malware"))
    return made.page(
        made.summarised(evidence, "robust_accuracy >= 0.3", accepted={"black-box": "one is on file"})
    )


def _hostile():
    names = tuple(f"{HOSTILE}{i}" for i in range(10))
    model = {"name": HOSTILE, "files": {HOSTILE: HOSTILE}}
    evidence = made.evidence(classes=names, model=model, notes=(HOSTILE,))
    return made.page(made.summarised(evidence, "robust_accuracy >= 0.5"))


def _comparison():
    runs = made.evidence(), made.evidence(suite=HOSTILE)
    return rendered(
        comparison.comparison_report(comparison.comparison(*runs, tuple(map(made.summarised, runs)))), ".html"
    )


def _annex():
    folder = "holdfast-runs/20261129-130151-assess-" + 40 * "0"
    model, statement = "a-model-with-a-long-name.safetensors", 20 * "survive "
    found = FolderEvidence(folder, model, "assess", "", {"attacks": ["FGSM"]}, statement)
    text = rendered(annex_report(annex([found], "aisvs")), ".html")
    assert text.count('class="stacked"') == 2
    return text


def _monitoring():
    alarm = {
        "after": 257,
        "signal": "inputs: mean",
        "view": "inputs",
        "evidence": "wealth 1,918, at least 960",
    }
    power = {"signal": "inputs: mean", "shift": 0.3, "drop": None, "errors": False, "false_alarms": None}
    test = {
        "name": "martingale",
        "state": "alarm",
        "alarm": alarm,
        "power": power,
        "fewest": 1,
        "restarted": [],
    }
    test |= {"compares": "the rank of each sample", "guarantee": "An alarm has a probability of at most 5 %."}
    sources = {"stream": {"n": 500, "name": "stream.npz"}, "reference": {"n": 500, "name": "reference.npz"}}
    accuracy = dict.fromkeys(("of_reference", "measured", "expected"))
    content = {"verdict": "alarm", "decisive": ["martingale"], "tests": [test], "notes": ["a note"]}
    text = rendered(monitoring_report({**content, **sources, **accuracy}), ".html")
    assert text.count('class="stacked"') == 1
    return text


BUILT = [_failing_images, _accepted_table, _hostile, _comparison, _annex, _monitoring]


@pytest.mark.parametrize("build", BUILT)
def test_page_in_a_browser(build, browser, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(build(), encoding="utf-8")
    visits = browser(path)
    assert [visit["colorScheme"] for visit in visits] == ["light", "dark"]
    for visit in visits:
        assert visit["styled"], "the policy refused the page's own style sheet"
        assert visit["requests"] == []
        assert visit["messages"] == []
        assert visit["violations"] == []
        assert visit["broken"] == 0
        assert visit["sideways"] <= 0
        assert visit["cut"] == 0, "a table of texts is wider than the screen"


def test_the_check_itself_sees_requests_and_violations(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        "<header></header><img src='https://example.invalid/x.png'><script>console.log(1)</script>"
    )
    for visit in browser(path):
        assert visit["requests"]
        assert visit["messages"]
        assert {"image-alt", "html-has-lang"} <= {violation["id"] for violation in visit["violations"]}
