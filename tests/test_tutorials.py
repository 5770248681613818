"""The code and the commands of the tutorials and the README run."""

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast.audits.audit import open_audit
from holdfast.cli.app import run
from holdfast.io.data.data import open_data
from holdfast.io.models.models import open_model
from holdfast.rotation import canary
from holdfast.rotation.pool import Pool
from places import collections_from_one_place, draws_by_count  # noqa: F401 (fixtures)

TUTORIALS = Path(__file__).resolve().parents[1] / "docs" / "tutorials"


def page(name):
    return (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.slow
def test_every_block_of_hardening_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page("hardening"), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "hardening.md", "exec"), names)
    assert (tmp_path / "hardened" / "model.safetensors").is_file()


@pytest.mark.long
@pytest.mark.slow
def test_every_block_of_the_page_on_own_recipes_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = (TUTORIALS.parent / "how-to/own-recipe.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", content, re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "own-recipe.md", "exec"), names)
    assert (tmp_path / "curve.csv").read_text().count("\n") == 3


@pytest.mark.long
@pytest.mark.slow
def test_the_code_on_training_data_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (TUTORIALS.parent / "how-to" / "training-data.md").read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "training_data"}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "training-data.md", "exec"), names)


@pytest.mark.long
@pytest.mark.slow
def test_the_short_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    readme = (TUTORIALS.parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"These commands run in .*?```console\n(.*?)```", readme, re.DOTALL)
    lines = re.findall(r"^\$ holdfast (.*)$", block, re.MULTILINE)
    assert [line.split()[0] for line in lines] == [
        "doctor",
        "assess",
        "assess",
        "certify",
        "compare",
        "report",
        "explain",
        "verify",
    ]
    for line in lines:
        assert run(shlex.split(line, comments=True)) == 0, (line, capsys.readouterr().out)
    assert (tmp_path / "report.html").is_file()


@pytest.mark.long
@pytest.mark.slow
def test_the_tutorial_on_clips_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("soundfile")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", page("audio"), re.DOTALL)
    (tmp_path / "keys.py").write_text(block)
    subprocess.run([sys.executable, "keys.py"], check=True)
    lines = re.findall(r"^\$ holdfast (.*)$", page("audio"), re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["doctor", "assess", "explain"]
    for line in lines:
        assert run(shlex.split(line.replace("-n 40", "-n 10"))) == 0, (line, capsys.readouterr().out)
    assert "audio/wav" in (tmp_path / "report.html").read_text() and (tmp_path / "why.html").is_file()


@pytest.mark.long
@pytest.mark.slow
def test_the_tutorial_on_stickers_attacks_and_certifies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python title=\"signs.py\"\n(.*?)```", page("patches"), re.DOTALL)
    (tmp_path / "signs.py").write_text(block)
    subprocess.run([sys.executable, "signs.py"], check=True)
    lines = re.findall(r"^\$ holdfast (.*signs.py:trained .* -n \d+.*)$", page("patches"), re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["assess", "certify", "harden"]
    for line in lines[:2]:
        assert run(shlex.split(re.sub(r"-n \d+", "-n 6", line))) == 0, (line, capsys.readouterr().out)
    assert "certified" in (tmp_path / "before.csv").read_text()


@pytest.mark.long
@pytest.mark.slow
def test_every_line_of_rotation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^\$ holdfast (.*)$", page("rotation"), re.MULTILINE)
    assert len(lines) == len(re.findall(r"^\$", page("rotation"), re.MULTILINE)) > 5
    assert sum("--sets 2" in line for line in lines) == 1
    for line in lines:
        # each set is trained, and judged for a minute
        line = line.replace("--sets 2", "--sets 1")
        if "BASE" in line:
            members = Pool.open(tmp_path / "pool").ledger.members
            line = line.replace("BASE", next(member.name for member in members if member.role == "base"))
        serving = Pool.open(tmp_path / "pool").serving if "SET" in line else None
        words = shlex.split(line if serving is None else line.replace("SET", serving.name))
        assert run(words) == 0, (line, capsys.readouterr().out)
    pool = Pool.open(tmp_path / "pool")
    assert pool.serving.name in {one.name for one in pool.ledger.exposed()}
    assert [one.name for one in pool.ledger.members if one.state == "candidate"]


@pytest.mark.long
@pytest.mark.slow
def test_the_application_answers_records_and_swaps(tmp_path, monkeypatch):
    testing = pytest.importorskip("fastapi.testclient")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOLDFAST_POOL_KEY", raising=False)
    digits = open_data("mnist-mini", n=200).read(0, 200).x
    models = [open_model(name).model for name in ("mnist-cnn", "mnist-cnn-hardened")]
    pool = Pool.create(tmp_path / "pool", about={"model": "mnist-cnn"})
    pool.keep("canaries", {"x": digits[:64]}, {})
    names = [pool.add(model.net.state_dict(), about={}) for model in models]
    for name, model in zip(names, models, strict=True):
        pool.admit(name, canary=canary(model, digits[:64]))
    pool.serve(names[0])
    (block,) = re.findall(r"```python\n(.*?)```", page("application"), re.DOTALL)
    app: dict[str, object] = {}
    exec(compile(block, "application.md", "exec"), app)
    with torch.no_grad():
        noise = torch.rand(500, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        answers = [model(noise).argmax(1) for model in models]
    differing = int((answers[0] != answers[1]).nonzero()[0])
    pixels = noise[differing, 0].tolist()
    with testing.TestClient(app["app"]) as client:

        def predict(key: str, image: list[list[float]]) -> object:
            return client.post("/predict", json=image, headers={"X-API-Key": key})

        assert predict("key-of-alice", pixels).json() == {"class": int(answers[0][differing])}
        assert predict("key-of-nobody", pixels).status_code == 401
        for wrong in (pixels[:3], [[2.0] * 28] * 28, [[0.0] * 28] * 27 + [[0.0]], []):
            assert predict("key-of-bob", wrong).status_code == 422
        Pool.open(tmp_path / "pool").serve(names[1])  # as another process does
        app["renew"]()
        assert predict("key-of-bob", pixels).json() == {"class": int(answers[1][differing])}
    first, second = Pool.open(tmp_path / "pool").ledger.terms
    assert first.answers == {pool.pseudonym("alice"): 1} and second.answers == {pool.pseudonym("bob"): 1}


@pytest.mark.long
@pytest.mark.slow
def test_every_block_of_estimators_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("skops")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page("estimators"), re.DOTALL):
        exec(compile(block, "estimators.md", "exec"), names)
    lines = re.findall(r"^\$ holdfast (.*)$", page("estimators"), re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        assert run(shlex.split(line)) == 0, (line, capsys.readouterr().out)


@pytest.mark.long
@pytest.mark.slow
def test_every_command_of_audit_membership_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python.*?\n(.*?)```", page("audit-membership"), re.DOTALL)
    (tmp_path / "net.py").write_text(code, encoding="utf-8")
    exec(compile(code, "net.py", "exec"), {"__name__": "__main__"})
    lines = re.findall(r"^\$ holdfast (.*)$", page("audit-membership"), re.MULTILINE)
    for line, expected in zip(lines, (1, 0, 0, 0), strict=True):
        assert run(shlex.split(line)) == expected, (line, capsys.readouterr().out)
    assert "BaVarIA" in (tmp_path / "procedure.html").read_text(encoding="utf-8")
    rates = [open_audit(tmp_path / name).facts["tpr"] for name in ("procedure", "informed", "careful")]
    assert rates[0] > 0.6 and rates[1] > 0.6 and rates[2] < 0.1


@pytest.mark.long
@pytest.mark.slow
def test_every_block_of_tables_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (code,) = re.findall(r"```python.*?\n(.*?)```", page("tables"), re.DOTALL)
    (rules,) = re.findall(r"```yaml.*?\n(.*?)```", page("tables"), re.DOTALL)
    (tmp_path / "fraud.py").write_text(code, encoding="utf-8")
    exec(compile(code, "fraud.py", "exec"), {"__name__": "__main__"})
    drafting, *lines = re.findall(r"^\$ holdfast (.*)$", page("tables"), re.MULTILINE)
    assert run(shlex.split(drafting)) == 0
    (tmp_path / "rules.yaml").write_text(rules, encoding="utf-8")
    for line, code in zip(lines, (1, 0), strict=True):
        assert run(shlex.split(line)) == code, (line, capsys.readouterr().out)
    shown = capsys.readouterr().out
    assert "97.7 %" in shown and "11.9 %" in shown


def test_every_block_of_text_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    factory, code = re.findall(r"```python.*?\n(.*?)```", page("text"), re.DOTALL)
    (words,) = re.findall(r"```json.*?\n(.*?)```", page("text"), re.DOTALL)
    (tmp_path / "spam.py").write_text(factory, encoding="utf-8")
    (tmp_path / "words.json").write_text(words, encoding="utf-8")
    exec(compile(factory, "spam.py", "exec"), {"__name__": "__main__"})
    lines = re.findall(r"^\$ holdfast (.*)$", page("text"), re.MULTILINE)
    assert len(lines) == 7
    for line in lines:
        assert run(shlex.split(line)) == 0, (line, capsys.readouterr().out)
    assert (tmp_path / "hardened" / "card.md").exists()
    assert "<mark" in (tmp_path / "report.html").read_text(encoding="utf-8")
    exec(compile(code, "text.md", "exec"), {})


@pytest.mark.long
@pytest.mark.slow
def test_every_block_on_files_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    blocks = dict(re.findall(r"```(?:python|json) title=\"(.*?)\"\n(.*?)```", page("bytes"), re.DOTALL))
    for name, block in blocks.items():
        (tmp_path / name).write_text(block)
    subprocess.run([sys.executable, "filetypes.py"], check=True)
    lines = re.findall(r"^\$ holdfast (.*filetypes.py:make.*)$", page("bytes"), re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["assess", "assess", "explain", "explain", "serve"]
    for line in lines[:-1]:
        assert run(shlex.split(re.sub("-n [0-9]+", "-n 10", line))) == 0, (line, capsys.readouterr().out)
    assert "bytes appended in a file" in (tmp_path / "report.html").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page("bytes"), re.DOTALL)
    exec(compile(code, "bytes.md", "exec"), {})


@pytest.mark.long
@pytest.mark.slow
def test_every_block_of_keras_runs(tmp_path):
    """In a process of its own, for the back end is chosen when keras is imported; in one, for that takes seconds."""
    if importlib.util.find_spec("keras") is None:
        pytest.skip("needs keras")
    first, factory = re.findall(r"```python\n(.*?)```", page("keras"), re.DOTALL)
    for block in (first, factory):
        assert block.index('os.environ["KERAS_BACKEND"] = "torch"') < block.index("import keras")
    (line,) = re.findall(r"^\$ holdfast (.*)$", page("keras"), re.MULTILINE)
    (tmp_path / "cnn.py").write_text(factory, encoding="utf-8")
    then = f"""
model.save("cnn.keras")

from holdfast.audits.audit import open_audit
from holdfast.cli.app import run

raise SystemExit(run({shlex.split(line)!r}))
"""
    (tmp_path / "page.py").write_text(first + then, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.slow
def test_the_service_of_served_models_answers_as_its_commands_expect(tmp_path, monkeypatch):
    testing = pytest.importorskip("fastapi.testclient")
    blocks = dict(re.findall(r"```python\n# (\S+)\.py\n(.*?)```", page("served-models"), re.DOTALL))
    assert set(blocks) == {
        "digits",
        *(f"{name}_digits" for name in ("mlserver", "kserve", "litserve", "mlflow", "fastapi")),
    }
    for name, block in blocks.items():
        compile(block, name, "exec")
        (tmp_path / f"{name}.py").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    subprocess.run([sys.executable, "digits.py"], check=True)
    app = importlib.import_module("fastapi_digits").app
    with np.load("digits.npz") as arrays, testing.TestClient(app) as client:
        answer = client.post("/predict", json={"instances": arrays["x"].tolist()}).json()
        assert (np.argmax(answer["predictions"], 1) == arrays["y"]).mean() > 0.85


@pytest.mark.long
@pytest.mark.slow
def test_the_commands_of_backdoors_run(tmp_path, monkeypatch, capsys):
    """On 8 x 8 images instead of MNIST, and without the audit itself, whose controls are trained for minutes."""
    monkeypatch.chdir(tmp_path)
    text = page("audit-backdoor")
    for name, content in re.findall(r'```python title="(\S+)"\n(.*?)```', text, re.DOTALL):
        (tmp_path / name).write_text(content)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 2500)
    x = rng.uniform(0, 0.3, (2500, 1, 8, 8)).astype(np.float32)
    x[np.arange(2500), 0, y // 2, y % 2 * 4 + 1] = 0.7
    np.savez("small.npz", x_train=x[:2000], y_train=y[:2000], x_test=x[2000:], y_test=y[2000:])
    lines = re.findall(r"^\$ (.*)$", text, re.MULTILINE)
    audits = [line for line in lines if line.startswith("holdfast audit")]
    assert (
        lines[0] == "holdfast data fetch mnist"
        and len(audits) == 1
        and "--trigger-out found.npz" in audits[0]
    )
    for line in lines[1:]:
        small = re.sub(r"\bmnist\b", "small.npz", line).replace("rate=0.01", "rate=0.05")
        program, *words = shlex.split(small)
        if line in audits:
            (tmp_path / "found.npz").write_bytes((tmp_path / "drill.trigger.npz").read_bytes())
        elif program == "python":
            subprocess.run([sys.executable, words[0], words[1], "12"], check=True)
        else:
            assert run(words) == 0, (line, capsys.readouterr().err)
    assert "the given trigger no longer works" in (tmp_path / "repaired" / "card.md").read_text()


@pytest.mark.long
@pytest.mark.slow
def test_the_generator_with_a_backdoor_samples_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page("generators")
    (code,) = re.findall(r'```python title="planted.py"\n(.*?)```', text, re.DOTALL)
    names: dict[str, object] = {"__name__": "planted"}
    exec(compile(code.replace("UPDATES = 200", "UPDATES = 2"), "planted.py", "exec"), names)
    samples = names["make"]().sample(2, 0)
    assert samples.shape == (2, 1, 28, 28)
    assert samples.isfinite().all()
    commands = re.findall(r"^\$ holdfast (\w+ ?\w*) ", text, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["audit", "audit", "harden", "audit"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "verbs"),
    [
        ("segmentation", {"assess": 2, "explain": 1, "certify": 1}),
        ("detection", {"assess": 3, "explain": 1}),
        ("regression", {"assess": 4, "explain": 1, "certify": 1}),
    ],
)
def test_the_tutorials_on_other_tasks_run(name, verbs, tmp_path, monkeypatch, capsys):
    """With five examples and without doubts, for the time; gates may then be unclear."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for title, block in re.findall(r"```python title=\"(.*?)\"\n(.*?)```", page(name), re.DOTALL):
        compile(block, title, "exec")
        if title.endswith(".py"):
            (tmp_path / title).write_text(block)
    found: dict[str, int] = {}
    for line in re.findall(r"^\$ (.*)$", page(name), re.MULTILINE):
        program, *words = shlex.split(line)
        if program != "holdfast":
            subprocess.run([sys.executable, *words] if program == "python" else [program, *words], check=True)
            continue
        verb = words[0]
        found[verb] = found.get(verb, 0) + 1
        if verb == "assess":
            line = re.sub(r" -n \d+| --no-doubts", "", line) + " -n 5 --no-doubts"
        expected = {0, 1, 4} if "--gate" in line else {0}
        assert run(shlex.split(line.replace("-n 50", "-n 5"))[1:]) in expected, (
            line,
            capsys.readouterr().out,
        )
    assert found == verbs
    (code,) = re.findall(r"```python\n(.*?)```", page(name), re.DOTALL)
    exec(compile(code, f"{name}.md", "exec"), {})
