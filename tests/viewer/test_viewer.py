"""The pages of stored runs: what they show, what they refuse, and how they are read in a browser."""

import asyncio
import re
import shutil
import socket

import httpx
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import holdfast
import test_report_browser
from conclusions import concluding
from holdfast.adaptation.journal import open_journal
from holdfast.attacks import FGSM, PGD
from holdfast.audits.audit import AuditRequest, audited
from holdfast.audits.finding import Finding, Table
from holdfast.cli.app import verbs
from holdfast.core.errors import UsageError
from holdfast.metrics.names import METRICS
from holdfast.rotation.pool import Pool
from holdfast.runs.documents.stored_runs import attacked_stages, run_entry
from holdfast.server.audit_folder import AuditFolder
from holdfast.server.messages import bound_socket
from holdfast.viewer.pages import NoPage, Site, explainer
from holdfast.viewer.serving import HOST, export, site_application
from holdfast.viewer.shelf import Shelf

pytest.importorskip("starlette")
browser = test_report_browser.browser

HOSTILE = "<script>alert(1)<"
ATTACKS = [FGSM(), PGD(steps=3)]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with two runs of one model."""
    root = tmp_path_factory.mktemp("runs")
    for name, eps in (("a", "linf:0.1"), ("b", "linf:0.15")):
        holdfast.assess(
            "mnist-cnn",
            "mnist-mini",
            threat=eps,
            suite=ATTACKS,
            n=40,
            gates=["robust_accuracy >= 0.2"],
            run=root / name,
        )
    return root


@pytest.fixture
def runs(stored, tmp_path):
    """A folder with the two runs, one with a hostile name, one that is damaged, one that is being written, and a
    link.
    """
    root = tmp_path / "runs"
    shutil.copytree(stored, root)
    shutil.copytree(stored / "a", root / HOSTILE)
    (root / "damaged").mkdir()
    (root / "damaged" / "run.json").write_text("{")
    shutil.copytree(stored / "a", root / "writing")
    for name in ("verdict.json", "2-pgd.safetensors"):
        (root / "writing" / name).unlink()
    chain = (root / "writing" / "chain.jsonl").read_text().splitlines(keepends=True)
    (root / "writing" / "chain.jsonl").write_text("".join(chain[:3]))
    (root / "link").symlink_to(stored / "a")
    return root


def _site(root, **options):
    site = Site(Shelf(root), **options)
    site.shelf.check()
    return site


def _id(site, name):
    return next(item.id for item in site.shelf.items() if item.name == name)


def test_the_index_lists_all_runs_with_their_verdicts(runs):
    site = _site(runs)
    items = {item.name: item for item in site.shelf.items()}
    assert set(items) == {"a", "b", "damaged", "writing", HOSTILE}
    assert items["a"].verdict in ("pass", "unclear", "fail") and items["a"].checked
    assert float(items["a"].value("robust_accuracy")) == run_entry(runs / "a").robust
    assert items["writing"].state.startswith("not finished: ")
    assert "not valid JSON" in items["damaged"].fault
    text = site.page("").text
    assert "<script>" not in text and "&lt;script&gt;alert(1)&lt;" in text
    assert all(re.fullmatch(r"[a-z0-9-]+", item.id) for item in items.values())


def test_an_index_before_the_check_shows_stored_verdicts(stored):
    shelf = Shelf(stored)
    unchecked = {item.name: item.verdict for item in shelf.items()}
    assert len(shelf.unchecked()) == 2
    assert "computed again from the columns now" in Site(shelf).page("").text
    shelf.check()
    assert {item.name: item.verdict for item in shelf.items()} == unchecked
    assert not shelf.unchecked()


def test_a_search_keeps_the_runs_that_contain_all_words(runs):
    site = _site(runs)
    text = site.page("", {"q": "linf:0.15 mnist-cnn"}).text
    assert "1 run for “linf:0.15 mnist-cnn”" in text
    assert "No run matches" in site.page("", {"q": "resnet"}).text


def test_examples_are_found_by_the_attacks_that_broke_them(runs):
    site = _site(runs)
    number = _id(site, "b")
    opened = site.open(site.shelf.item(number))
    stages = attacked_stages(runs / "b")
    assert [each.stage for each in opened.tried] == list(stages) == ["1-fgsm", "2-pgd"]
    broken = sum(int((c["success"].bool() & c["ran"].bool()).sum()) for c in stages.values())
    text = site.page(f"run/{number}/examples/any").text
    assert f"{broken} examples broken by an attack" in text
    only = site.page(f"run/{number}/examples/2-pgd/1-fgsm").text
    assert "broken by PGD that withstood FGSM" in only
    for row in re.findall(r'example/(\d+)"', only):
        outcomes = [each.outcome(opened.rows[int(row)]) for each in opened.tried]
        assert outcomes == ["withstood", "broken"]
    csv = site.page(f"run/{number}/examples.csv").text.splitlines()
    assert len(csv) == 41 and csv[0] == "id,label,outcome,broken by,FGSM,PGD"


def test_the_page_of_a_run_begins_with_its_verdict_and_the_main_metrics(runs):
    site = _site(runs)
    text = site.page(f"run/{_id(site, 'b')}").text
    verdict, metrics, others = (
        text.index('class="badge"'),
        text.index('id="metrics"'),
        text.index("<details>"),
    )
    assert verdict < metrics < others
    first = text[metrics:others]
    assert METRICS["robust_accuracy"] in first.lower() and METRICS["clean_accuracy"] in first.lower()
    assert "Defensive" not in first and "Perturb" not in first and first.count('<th scope="row">') <= 6
    assert METRICS["mean_perturbation_linf"] in text[others:].lower()
    assert "1-fgsm</" not in text and '<th scope="row">FGSM</th>' in text


def test_an_attack_in_several_waves_is_one_column(tmp_path):
    suite, run = "fast", tmp_path / "runs" / "a"
    holdfast.assess("mnist-cnn-hardened", "mnist-mini", "linf:0.1", suite, n=40, doubts=False, run=run)
    assert any("-wave-" in file.name for file in run.iterdir())
    assert not any("-wave-" in stage for stage in attacked_stages(run))


def test_the_page_of_a_broken_text_shows_its_words(tmp_path):
    def scores(texts):
        return torch.tensor([[0.0, 1.0] if "win" in text else [1.0, 0.0] for text in texts])

    run = tmp_path / "runs" / "a"
    holdfast.assess(scores, (["win it", "lose"], [1, 0]), "text:edits=1,words=1", doubts=False, run=run)
    site = _site(tmp_path / "runs")
    assert "<mark" in site.page(f"run/{_id(site, 'a')}/example/0").text
    assert "text:edits=1,words=1" in site.page("").text


def test_two_runs_are_compared_example_by_example(runs):
    site = _site(runs)
    first, second = _id(site, "a"), _id(site, "b")
    text = site.page(f"compare/{first}/{second}").text
    assert "40 examples in both runs" in text and "The threat models differ" in text
    rows = site.page(f"compare/{first}/{second}/examples.csv").text.splitlines()[1:]
    changed = [row for row in rows if ",robust,broken," in row]
    page = site.page(f"compare/{first}/{second}/robust-broken").text
    assert len(re.findall(r'in the first run">\d', page)) == len(changed)


def test_the_trend_joins_only_comparable_runs(runs):
    site = _site(runs)
    key = re.search(r'href="/trend/([^/"]+)/', site.page("").text)[1]
    text = site.page(f"trend/{key}/robust_accuracy").text
    assert text.count("<h2") == 2  # of two threat models
    assert text.count("<svg") == 1  # one of them has a single run
    assert "No difference of" in text and "One run" in text
    rows = site.page(f"trend/{key}/robust_accuracy.csv").text.splitlines()
    assert len(rows) == 4 and "'" not in rows[1]


def test_an_example_page_shows_what_is_stored_and_links_to_its_explanation(runs):
    asked = []
    site = _site(runs, explain=lambda result, number: asked.append(number) or "<p>found</p>")
    number = _id(site, "b")
    listed = site.page(f"run/{number}/examples/any").text
    row = int(re.search(r'example/(\d+)"', listed)[1])
    text = site.page(f"run/{number}/example/{row}").text
    assert "Explain this example" in text and "data:image/png" in text
    for _ in range(2):
        why = site.page(f"run/{number}/example/{row}/why").text
        assert "Explanation of example" in why and "<p>found</p>" in why
    assert asked == [row]  # it is computed once


def test_an_explanation_needs_consent_for_code(runs):
    def refuse(result, number):
        raise UsageError("opening it would run code")

    site = _site(runs, explain=refuse)
    number = _id(site, "a")
    row = next(iter(site.open(site.shelf.item(number)).rows))
    assert "Opening it would run code" in site.page(f"run/{number}/example/{row}/why").text


@pytest.mark.parametrize(
    "path",
    [
        "run",
        "run/../a",
        "run/nothing",
        "trend/x/robust_accuracy",
        "compare/a/b",
        "run/{a}/examples/9-none",
        "run/{a}/example/99999",
        "run/{a}/example/-1",
        "run/{a}/example/1/why",
        "audit/{a}",
        "run/{a}/examples/any/any/any",
    ],
)
def test_other_paths_have_no_page(stored, path):
    site = _site(stored)
    with pytest.raises(NoPage):
        site.page(path.format(a=_id(site, "a")))


def test_an_altered_run_is_refused_with_the_reason(runs):
    site = _site(runs)
    number = _id(site, "a")
    assert "Not shown" not in site.page(f"run/{number}").text
    file = runs / "a" / "1-fgsm.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    site.shelf.check()
    assert site.shelf.item(number).state == "refused"
    assert "Not shown" in site.page(f"run/{number}").text
    assert "Not shown" in site.page(f"run/{_id(site, 'damaged')}").text
    assert "not finished" in site.page(f"run/{_id(site, 'writing')}").text


@pytest.fixture
def concluded():
    """An audit whose finding does not depend on steps."""
    found = Finding("flagged", f"{HOSTILE} found", tables=[Table("scores", ["class", "score"], [["0", 1.5]])])
    with concluding(lambda steps: found):
        yield


def _others(root):
    """An audit, a pool, audit chains of a server, and an adaptation."""
    about = {"name": "m", "digest": "0" * 64}, {"name": "d", "digest": "1" * 64}
    audited(AuditRequest("backdoor", {}, *about, (), ("no-backdoor",)), lambda run: dict, root / "audit-b")
    Pool.create(root / "pool", {})
    AuditFolder.open(root / "chains", {"model": HOSTILE}).close()
    with open_journal(root / "adapted", {"server": f"http://{HOSTILE}"}, resume=False) as journal:
        journal.take("begin", lambda: {"removed": 3, "ends": f"a gate failed {HOSTILE}"})
        journal.end()


@pytest.mark.usefixtures("concluded")
def test_audits_pools_chains_and_adaptations_have_pages(tmp_path):
    pytest.importorskip("cryptography")
    _others(tmp_path)
    site = _site(tmp_path)
    pages = {item.name: site.page(f"{item.kind}/{item.id}").text for item in site.shelf.items()}
    texts = {item.kind: pages[item.name] for item in site.shelf.items() if item.name in pages}
    assert set(texts) == {"audit", "pool", "chains", "adaptation"}
    assert "&lt;script&gt;alert(1)&lt; found" in texts["audit"] and "1.5" in texts["audit"]
    assert "The ledger of the pool is consistent" in texts["pool"]
    assert "All chains of the folder are consistent" in texts["chains"]
    assert "not promoted" in texts["adaptation"] and "a gate failed" in texts["adaptation"]
    assert not any("<script>" in text for text in texts.values())
    export(_site(tmp_path, mode="files"), tmp_path / "site")
    (tmp_path / "chains" / "audit.json").write_text("{}")
    assert "Not shown" in site.page(f"chains/{_id(site, 'chains')}").text


def get(application, path, **headers):
    async def send():
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8090") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(send())


def test_the_server_only_reads_and_answers_only_this_computer(stored):
    application = site_application(_site(stored))
    answer = get(application, "/")
    assert answer.status_code == 200 and "script-src" not in answer.headers["content-security-policy"]
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert get(application, "/", host="evil.example").status_code == 421
    assert get(application, "/run/x/example/1/why", **{"sec-fetch-site": "cross-site"}).status_code == 403
    assert get(application, "/nothing").status_code == 404
    assert get(application, "/style.css").headers["content-type"].startswith("text/css")
    assert all(route.methods == {"GET", "HEAD"} for route in application.routes)


def test_a_port_in_use_and_a_folder_that_is_none_are_refused(tmp_path):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(UsageError, match="choose another port"):
            bound_socket(HOST, busy.getsockname()[1])
    with pytest.raises(UsageError, match="is missing, or is a file"):
        Shelf(tmp_path / "none")


def test_an_export_contains_every_page_it_links_to(runs, tmp_path):
    site = _site(runs, mode="files")
    n = export(site, tmp_path / "site")
    files = [file for file in (tmp_path / "site").rglob("*") if file.is_file()]
    assert len(files) == n
    for file in files:
        for target in re.findall(r'href="([^"#]+)"', file.read_text()) if file.suffix == ".html" else ():
            assert (file.parent / target).is_file(), (file, target)
    with pytest.raises(UsageError, match="a new or empty folder"):
        export(site, tmp_path / "site")


def test_the_command_exports_and_refuses_consent_for_it(stored, tmp_path):
    done = CliRunner().invoke(
        verbs, ["ui", str(stored), "--export", str(tmp_path / "out")], catch_exceptions=False
    )
    assert done.exit_code == 0 and (tmp_path / "out" / "index.html").is_file()
    refused = CliRunner().invoke(
        verbs, ["ui", str(stored), "--export", str(tmp_path / "other"), "--trust-code"]
    )
    assert isinstance(refused.exception, UsageError)


_NET = """\
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear({n}, 10))
"""


def test_a_model_of_code_is_explained_only_with_consent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(_NET.format(n=784))
    run = tmp_path / "runs" / "a"
    holdfast.assess("net.py:make", "mnist-mini", "linf:0.1", [FGSM()], n=10, doubts=False, run=run)
    with pytest.raises(UsageError, match="--trust-code"):
        explainer()(holdfast.report(run), 1)
    text = explainer(trust_code=True)(holdfast.report(run), 1)
    assert "<figure" in text and "What you can do" in text


def test_a_run_is_explained_with_the_options_of_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(_NET.format(n=2))
    (tmp_path / "t.csv").write_text("a,b,kind\n" + "".join(f"0.{k},0.5,{k}\n" for k in range(10)))
    run = tmp_path / "runs" / "a"
    data = holdfast.open_data("t.csv", label="kind")
    holdfast.assess("net.py:make", data, "linf:0.1", [FGSM()], doubts=False, run=run)
    assert "What you can do" in explainer(trust_code=True)(holdfast.report(run), 1)


def test_code_that_opens_the_weights_of_a_run_is_not_run_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(_NET.format(n=784))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    torch.save(network.state_dict(), "net.pt")
    run = tmp_path / "runs" / "a"
    model = holdfast.open_model("net.pt", arch="net.py:make")
    holdfast.assess(model, "mnist-mini", "linf:0.1", [FGSM()], n=10, doubts=False, run=run)
    with pytest.raises(UsageError, match="net.pt.*arch"):
        explainer(trust_code=True)(holdfast.report(run), 1)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.long
def test_the_pages_in_a_browser(browser, runs, tmp_path, concluded):
    pytest.importorskip("cryptography")
    _others(runs)
    site = _site(runs, mode="files")
    export(site, tmp_path / "site")
    style = (tmp_path / "site" / "style.css").read_text()
    start = site.shelf.item(_id(site, "b"))
    partner = re.search(r'href="[^"]*(compare/[^"]+)/index', site.page(f"run/{start.id}").text)[1]
    row = next(iter(sorted(site._exported(site.open(start)))))
    key = re.search(r'href="trend/([^/"]+)/', site.page("").text)[1]
    paths = ["", f"run/{start.id}", f"run/{start.id}/examples/any", f"run/{start.id}/example/{row}"]
    paths += [f"trend/{key}/robust_accuracy", partner, f"run/{_id(site, 'damaged')}"]
    kinds = ("audit", "pool", "chains", "adaptation")
    paths += [f"{item.kind}/{item.id}" for item in site.shelf.items() if item.kind in kinds]
    for path in paths:
        text = (tmp_path / "site" / path / "index.html").read_text()
        text = re.sub('<link rel="stylesheet"[^>]*>', lambda _: f"<style>{style}</style>", text)
        page = tmp_path / "page.html"
        page.write_text(text)
        for visit in browser(page):
            assert visit["styled"], path
            assert (visit["requests"], visit["messages"], visit["violations"]) == ([], [], []), path
            assert visit["broken"] == 0 and visit["sideways"] <= 0, path
