"""Arguments in another place or under another name are refused with the right spelling."""

import pytest
import torch

import holdfast
from holdfast.cli.app import run
from holdfast.config.misspelt import with_eps
from holdfast.core.errors import UsageError

NET = torch.nn.Linear(4, 3)
X = torch.rand(8, 4)
Y = NET(X).argmax(1)


@pytest.mark.parametrize("verb", ["assess", "certify", "harden", "doctor"])
@pytest.mark.parametrize("labels", [Y, Y.numpy(), Y.tolist()], ids=["tensor", "array", "list"])
def test_labels_are_a_part_of_the_data(verb, labels):
    function = getattr(holdfast, verb)
    for call in (lambda: function(NET, X, labels), lambda: function(NET, x=X, y=labels)):
        with pytest.raises(UsageError, match=rf"holdfast.{verb}\(model, \(x, y\)\)"):
            call()


def test_attack_has_an_argument_for_labels():
    with pytest.raises(UsageError, match=r"holdfast.attack\(model, x, y, 'pgd'\)"):
        holdfast.attack(NET, (X, Y), "pgd")
    assert len(holdfast.attack(NET, (X, Y), attack="fgsm")) == len(X)


def test_settings_are_given_where_an_attack_is_named():
    def steps(attack, **settings):
        return holdfast.attack(NET, X, Y, attack, **settings).result.attacks[0].settings["steps"]

    assert (
        steps("pgd", steps=3) == steps(holdfast.attacks.PGD, steps=3) == steps({"use": "pgd"}, steps=3) == 3
    )
    with pytest.raises(UsageError, match="pgd has no setting 'step'; did you mean 'steps'"):
        steps("pgd", step=3)
    with pytest.raises(UsageError, match=r"give PGD\(steps=...\)"):
        steps(holdfast.attacks.PGD(), steps=3)
    for several in ("standard", "pgd,square", ["pgd", "square"]):
        with pytest.raises(UsageError, match="is a setting of one attack"):
            steps(several, steps=3)


@pytest.mark.parametrize(
    ("threat", "eps", "text"),
    [
        (None, 8 / 255, "linf:8/255"),
        ("l2", 0.5, "l2:0.5"),
        ("l2:1,queries=20", 0.5, "l2:0.5,queries=20"),
        (holdfast.L1(3), 2, "l1:2"),
        ("linf:8/255", "4/255", "linf:4/255"),
    ],
)
def test_eps_is_a_part_of_the_threat(threat, eps, text):
    assert with_eps(threat, eps) == text


@pytest.mark.parametrize(
    ("words", "spelling"),
    [
        (["--eps", "8/255"], "give --threat linf:8/255"),
        (["--eps=0.1"], "give --threat linf:0.1"),
        (["--attack", "pgd"], "give --suite pgd"),
        (["--steps", "10"], "give --set 'attacks=[{use: PGD, steps: 10}]'"),
        (["--gates", "x"], "give --gate x"),
        (["--eps"], "give --threat linf:VALUE"),
    ],
)
def test_options_of_other_programs_are_refused_with_their_spelling(words, spelling, capsys):
    assert run(["assess", "mnist-cnn", "mnist-mini", *words]) == 2
    assert spelling in capsys.readouterr().err


def test_a_file_of_code_needs_the_name_of_a_function(tmp_path):
    path = tmp_path / "net.py"
    path.write_text("raise ImportError\n\ndef helper(x): return x\n\ndef make(width=3): return None\n")
    torch.save(NET.state_dict(), tmp_path / "w.pt")
    for model in (str(path), holdfast.open_model(str(tmp_path / "w.pt"), arch=str(path))):
        with pytest.raises(UsageError, match=r"it defines make, helper: give .*net\.py:make"):
            holdfast.doctor(model, (X, Y))
    path.write_text("net = 3\n")
    with pytest.raises(UsageError, match=r"give .*net\.py:make, and define it"):
        holdfast.doctor(str(path), (X, Y))
