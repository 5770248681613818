"""Rotation from the command line, end to end: what a user types, and what is said, written and returned."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch

from holdfast.cli.app import run
from holdfast.core.errors import UsageError
from holdfast.rotation.pool import Pool
from holdfast.rotation.steps import draw as training
from holdfast.rotation.steps.collect import Collected

pytestmark = [pytest.mark.usefixtures("elsewhere"), pytest.mark.slow]

COLLECT = [
    "rotate", "collect", "mnist-cnn", "mnist-mini", "--threat", "linf:0.1", "--recipe", "standard",
    "--set", "recipe.training.epochs=3", "--set", "source.seeds=2", "--set", "source.sets=4",
]  # fmt: skip
QUICK = ["--set", "codec.steps=400", "--set", "generator.steps=200"]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_pool(folder):
    """Collect a pool that has a generator."""
    assert run([*COLLECT, "--run", str(folder / "pool")]) == 0
    assert run(["rotate", "train", str(folder / "pool"), *QUICK]) == 0


@pytest.fixture
def made(shelf):
    return shelf.folder("pool", make_pool) / "pool"


@pytest.fixture
def pool(made, tmp_path):
    shutil.copytree(made, tmp_path / "pool")
    shutil.copy(made.with_name("pool.key"), tmp_path / "pool.key")
    return tmp_path / "pool"


def test_the_steps_one_after_another(pool, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["rotate", "draw", "pool/", "--sets", "2", "--immunise"]) == 0
    said = capsys.readouterr()
    assert re.match(
        r"2 candidates sampled from the generator, selected from \d+, immunised against 2 sets\n", said.out
    )
    assert "holdfast rotate admit pool/" in said.err
    held = Pool.open(Path("pool"))
    names = [member.name for member in held.ledger.members if member.state == "candidate"]
    for name in names:
        held.admit(name)
    assert run(["rotate", "swap", "pool/", "--why", "the first"]) == 0
    said = capsys.readouterr()
    assert re.match(r"[0-9a-f]{16} serves as epoch 1\n", said.out)
    assert "note: number of admitted sets that wait: 1, and at least 2 are recommended" in said.err
    serving = said.out.split()[0]
    assert run(["rotate", "expose", "pool/", serving, "--why", "laptop stolen"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{serving} is listed as exposed: laptop stolen\n"
    assert "it is still the serving set; replace it: holdfast rotate swap pool/" in said.err
    assert "1 waiting sets must be judged again: holdfast rotate admit pool/" in said.err
    assert run(["rotate", "swap", "pool/"]) == 4, "the one that waits was not judged against it"
    assert "--unjudged" in capsys.readouterr().err
    assert run(["rotate", "swap", "pool/", "--unjudged"]) == 0
    assert "note: it was not judged against all sets that are now listed as stolen" in capsys.readouterr().err
    assert run(["rotate", "swap", "pool/", "--unjudged"]) == 4, "none waits any more"
    assert "contains no waiting admitted set" in capsys.readouterr().err
    assert run(["rotate", "status", "pool/", "-o", "-", "-o", "status.json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads(Path("status.json").read_text())
    assert shown["serving"]["epoch"] == 2 and [term["epoch"] for term in shown["terms"]] == [1, 2]
    for width in ("80", "110"):
        monkeypatch.setenv("COLUMNS", width)
        assert run(["rotate", "status", "pool/"]) == 0
        said = capsys.readouterr()
        assert "exposed: laptop stolen" in " ".join(said.out.split()) and "serves as epoch 2" in said.out
        assert serving in said.out


def test_a_pool_is_verified_with_its_key_and_without_and_against_a_head_of_before(pool, capsys, monkeypatch):
    shutil.copytree("pool", "before")
    shutil.copy("pool.key", "before.key")
    base = next(member.name for member in Pool.open(Path("pool")).ledger.members if member.role == "base")
    assert run(["rotate", "expose", "pool", base, "--why", "laptop stolen"]) == 0
    capsys.readouterr()
    assert run(["rotate", "head", "pool"]) == 0
    head = capsys.readouterr().out.strip()
    assert re.fullmatch("[0-9a-f]{64}", head)
    assert run(["verify", "pool", "--expect-head", head]) == 0
    assert "chain consistent and authenticated; 2 sets decrypted" in capsys.readouterr().out
    for words in (
        ["rotate", "swap"],
        ["rotate", "status"],
        ["rotate", "draw"],
        ["rotate", "admit"],
        ["verify"],
    ):
        assert run([*words, "before", "--expect-head", head]) == 3, words
        assert "the folder is an older copy, or another pool" in capsys.readouterr().err
    assert run([*COLLECT, "--run", "before", "--resume", "--expect-head", head]) == 3
    assert run([*COLLECT, "--run", "nowhere", "--expect-head", head]) == 3, "nor is a missing one begun"
    assert run(["rotate", "swap", "pool", "--expect-head", "abc"]) == 2
    assert run(["verify", "before"]) == 0
    Path("pool.key").rename("elsewhere")
    capsys.readouterr()
    assert run(["verify", "pool"]) == 0
    said = capsys.readouterr()
    assert "chain consistent, not authenticated" in said.out and "HOLDFAST_POOL_KEY" in said.err
    lines = Path("pool/ledger.jsonl").read_bytes().splitlines(keepends=True)
    Path("pool/ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    assert run(["verify", "pool"]) == 3
    assert "entries at the end are missing" in capsys.readouterr().err
    monkeypatch.setenv("HOLDFAST_POOL_KEY", "0" * 64)
    assert run(["verify", "pool"]) == 3, "a key that is not the pool's"


def test_stored_attacks_and_judgements_are_readable_for_the_owner_only(pool):
    Pool.open(Path("pool")).drop("generator")
    assert run(["rotate", "draw", "pool", "--sets", "1"]) == 0
    assert run(["rotate", "admit", "pool", "--set", "n_judged=20"]) in (0, 4)
    files = list(Path("pool").rglob("*"))
    assert any(path.suffix == ".safetensors" for path in files)
    assert not [path for path in files if path.stat().st_mode & 0o077]
    for path in files:
        if path.suffix == ".safetensors":
            columns = safetensors.torch.load_file(path)
            assert not len(columns.get("gallery.x_adv", ())) and "adversarial.x" not in columns


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--source", "subset", "--threat", "linf:0.1"],
            "source subset needs names, and none was given; give --set source.names=VALUE",
        ),
        (["--threat", "linf:0"], "threat linf:0 allows no change"),
    ],
)
def test_a_collection_that_cannot_be_is_refused_before_anything_is_trained(elsewhere, capsys, words, says):
    assert run([*COLLECT[:4], *words, "--run", "pool"]) == 2
    assert says in capsys.readouterr().err and not Path("pool").exists()


def test_run_does_all_of_it_and_ends_where_once_is_enough(pool, capsys):
    words = [
        "rotate",
        "run",
        *COLLECT[2:],
        "--run",
        "pool",
        "--resume",
        "--min-waiting",
        "1",
        "--set",
        "n_judged=200",
    ]
    assert run([*words, "--once"]) in (0, 4)
    said = capsys.readouterr().err
    assert "serves as epoch 1: the first" in said or "was admitted" in said or "were refused in a row" in said
    assert run(words) == 2
    assert "no condition for swaps is given" in capsys.readouterr().err
    assert run([*words, "--every", "50"]) == 2
    assert "expected answers to one principal or a duration" in capsys.readouterr().err
    assert run([*words, "--every", "24h", "--gate", "transfer_success <= 0.5 of it"]) == 2
    assert run([*words, "--every", "24h", "--accept-doubt", "odd"]) == 2


def test_run_refuses_data_and_budgets_that_are_too_small_before_it_trains(capsys, replace_step):
    replace_step("train", lambda *given, **more: pytest.fail("nothing may be trained"))
    words = ["rotate", "run", *COLLECT[2:8], "--run", "small", "--once", "--immunise", "--budget", "1s"]
    assert run(words) == 2
    said = capsys.readouterr().err
    assert "need at least 2,852 held-out examples, and there are 1,000, one in 5 of 5,000" in said
    assert "at least 14,260 are needed" in said and "immunisation trains each set for " in said
    assert said.rstrip().endswith("give --anyway to start nevertheless") and not Path("small").exists()
    assert run([*words, "--anyway"]) == 2
    said = capsys.readouterr().err
    assert "expected total time: 1 s for 12 trainings, which the budget limits; then, not limited by" in said
    assert "a budget of 1 s is too small" in said and said.count("expected total time") == 1


def test_run_learns_a_generator_of_one_run_of_several_sets(pool, capsys, replace_step):
    held = Pool.open(Path("pool"))
    held.drop("generator")

    def learn(*given, **more):
        raise UsageError("it is learned")

    collected = Collected(1, 4, 3, (1.0,), (1.0,) * 4, held)
    replace_step("collect", lambda *given, **more: collected)
    replace_step("train", learn)
    words = ["rotate", "run", *COLLECT[2:8], "--source", "seeds", "--run", "pool", "--resume", "--once"]
    assert run(words) == 2
    assert "it is learned" in capsys.readouterr().err


def test_run_trains_sets_anew_where_no_generator_can_be_learned(pool, capsys, replace_step):
    Pool.open(Path("pool")).drop("generator")
    seen = []
    replace_step("RotationLoop.fill", lambda self: seen.append(self.settings.by))
    words = ["rotate", "run", *COLLECT[2:], "--run", "pool", "--resume", "--once", "--set", "codec.steps=1"]
    assert run([*words, "--set", "codec.dims=1"]) == 0
    said = capsys.readouterr().err
    assert (
        seen == ["retraining"]
        and "note: sets lose" in said
        and "sets are trained from fresh random weights" in said
    )


@pytest.mark.parametrize("by", ["retraining", "generator"])
def test_run_makes_sets_by_the_given_method(pool, capsys, replace_step, by):
    Pool.open(Path("pool")).drop("generator")
    seen = []
    replace_step("RotationLoop.fill", lambda self: seen.append(self.settings.by))
    replace_step("train", lambda *given, **more: seen.append("learned"))
    words = ["rotate", "run", *COLLECT[2:], "--run", "pool", "--resume", "--once", "--by", by]
    assert run(words) == 0
    assert seen == (["retraining"] if by == "retraining" else ["learned", "generator"])


def test_a_stopped_training_states_the_whole_command(pool, capsys, monkeypatch, command_line):
    words = ["rotate", "train", "pool", *QUICK]
    command_line(["holdfast", *words])
    monkeypatch.setattr(training, "train", lambda *given, **more: signal.raise_signal(signal.SIGINT))
    assert run(words) == 130
    said = capsys.readouterr().err
    assert "stopped by SIGINT; an earlier generator is kept, start again with: holdfast rotate train" in said
    assert said.endswith("pool --set codec.steps=400 --set generator.steps=200\n")


def test_a_finished_collection_reports_its_sets_again(pool, capsys):
    assert run([*COLLECT, "--run", "pool/", "--resume"]) == 0
    assert "8 sets of 2 trainings of 3 epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["rotate", "swap", "nowhere"], 3, "'nowhere' is not a pool, or its creation was interrupted"),
        (["rotate", "status", "no pool"], 3, "create it with holdfast rotate collect MODEL DATA --run 'no pool'"),
        (["rotate", "collect", "mnist-cnn", "mnist-mini", "--source", "basin"], 2, "there is no source 'basin'"),
        (["rotate", "collect", "mnist-cnn", "mnist-mini", "--set", "source.seed=3"], 2, "has no setting 'seed'"),
        (["rotate", "collect", "mnist-cnn", "mnist-mini", "--recipe", "auto"], 2, "recipe auto selects a recipe"),
        (["rotate", "run", "mnist-cnn", "mnist-mini", "--recipe", "robust-gan"], 2, "only classifiers are rotated"),
        (["rotate", "collect", "mnist-cnn", "mnist-mini", "--threat", "l0:10"], 2, "recipes train for the threats"),
        (["rotate", "collect", "mnist-cnn", "mnist-mini", "--resume"], 2, "its folder is not given; give --run DIR"),
        ([*COLLECT, "--budget", "1min", "--run", "new"], 2, "recipe.training.epochs is 3, and the budget is 1min"),
        ([*COLLECT, "--run", "pool"], 2, "contains a pool already; give --resume, or give --run DIR"),
        ([*COLLECT, "--seed", "1", "--run", "pool", "--resume"], 2, "was created with another"),
        (["rotate", "train", "pool", "--set", "codec.rank=0"], 2, "codec: rank"),
        (["rotate", "train", "pool", "--set", "n_judged=9"], 2, "not use n_judged .rotate collect and"),
        (["rotate", "admit", "pool", "--set", "immunise.weight=2"], 2, "rotate admit does not use immunise"),
        (["rotate", "train", "pool", "--set", "generator.regulariser=on"], 2, "generator: regulariser"),
        (["rotate", "train", "pool", "--set", "codec.dims=1", "--set", "codec.steps=1"], 4, "sets lose .* points"),
        (["rotate", "train", "pool", *QUICK, "--set", "generator.lr=1e30"], 3, "NaN or infinite"),
        (["rotate", "train", "pool", "--set", "threat=linf:0.3"], 2, "threat is linf:0.1 in 'pool', .* linf:0.3 was"),
        (["rotate", "draw", "pool", "--set", "seed=3"], 2, "seed is 0 in 'pool', and 3 was given"),
        (["rotate", "admit", "pool", "--set", "source.seeds=9"], 2, "source is .*'seeds': 2.* leave it out"),
        (["rotate", "draw", "pool", "--sets", "0"], 2, "x>=1"),
        (["rotate", "expose", "pool", "0000", "--why", "lost"], 2, "'0000' is not a set of this ledger"),
        (["rotate", "expose", "pool", "0000"], 2, "Missing option '--why'"),
        (["rotate", "status", "pool", "-o", "s.html"], 2, "write -o FILE.json"),
        (["rotate", "swop"], 2, "swop"),
    ],
)  # fmt: skip
def test_impossible_settings_are_reported(pool, capsys, words, code, says):
    assert run(words) == code
    said = capsys.readouterr().err
    assert re.search(says, said), said
    assert "Traceback" not in said and "internal error" not in said


def test_a_damaged_pool_is_refused_by_every_verb(pool, capsys):
    ledger = pool / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join([lines[0], lines[1].replace("candidate", "admitted"), *lines[2:]]))
    for words in (["train"], ["draw"], ["swap"], ["status"], ["admit"]):
        assert run(["rotate", words[0], "pool"]) == 3
        assert "entry 2 of" in capsys.readouterr().err
    ledger.write_text("".join(lines))
    (pool.with_name("pool.key")).write_text("0" * 64 + "\n")
    assert run(["rotate", "draw", "pool"]) == 3
    assert "key" in capsys.readouterr().err


def test_a_truncated_file_is_named(pool, capsys):
    for name in ("generator", "run_1"):
        file = pool / f"{name}.sealed"
        whole = file.read_bytes()
        file.write_bytes(whole[:-100])
        words = ["rotate", "train", "pool", *QUICK] if name == "run_1" else ["rotate", "draw", "pool"]
        assert run(words) == 3
        assert f"{name}.sealed" in capsys.readouterr().err
        file.write_bytes(whole)


def test_code_in_a_pool_runs_only_where_it_is_trusted(capsys, monkeypatch):
    Path("net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))\n"
    )
    words = ["rotate", "collect", "net.py:make", *COLLECT[3:], "--run", "pool2"]
    assert run(words) == 0
    assert run(["rotate", "train", "pool2", *QUICK]) == 2
    assert "Code from a pool is not run; give --trust-code" in capsys.readouterr().err
    assert run(["rotate", "train", "pool2", *QUICK, "--trust-code"]) == 0
