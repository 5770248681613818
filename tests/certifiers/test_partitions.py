"""Certificates against changes of the training set: proved by the votes, and never beaten by a change that is made."""

import json
from itertools import combinations, product

import pytest
import torch
from torch import nn

import holdfast
from holdfast.certifiers.partitions import PartitionVotes, unchanged_under
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import NoBounds, TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.models.composed import Ensemble
from holdfast.recipes import Partitions
from holdfast.recipes.partitions import parts_of, restarted
from holdfast.recipes.training.fit import Saving, Training
from holdfast.runs.documents.stored_runs import runs_in
from holdfast.runs.harden.held_out import split_by_content
from holdfast.threats.parsing import parse_threat
from holdfast.threats.triggers import TrainingSet

TINY = Training(epochs=4, batch=4, lr=1.0, optimizer="sgd", averaging="none")
THREAT = ThreatModel(TrainingSet(1))


def toy(n=10, seed=0):
    """Points of two classes with a few wrong labels."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, generator=rng)
    y = (x.sum(1) > 1).long()
    return x, torch.where(torch.rand(n, generator=rng) < 0.2, 1 - y, y)


def batch_of(x, y):
    return Batch(x, y, torch.arange(len(x)))


def network(features=2, classes=2):
    torch.manual_seed(1)
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(features, classes)))


def trained(x, y, k=5, training=TINY, model=None, after=None):
    """The ensemble that the recipe trains."""
    model = network() if model is None else model
    recipe = Partitions(k, training=training)
    (checkpoint,) = recipe(model, batch_of(x, y), THREAT, rng=Draws(0), after=after)
    new = recipe.network(model)
    checkpoint.put_into(new)
    return new.eval()


@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_the_certificate_is_the_largest_number_of_changed_votes_that_never_suffices(k):
    for votes in product(range(3), repeat=k):
        counts = torch.bincount(torch.tensor(votes), minlength=3)
        radius, winner = int(unchanged_under(counts[None])[0]), int(counts.argmax())
        for changes in range(k + 1):
            others = [
                torch.bincount(torch.tensor(changed), minlength=3)
                for changed in product(range(3), repeat=k)
                if sum(a != b for a, b in zip(votes, changed, strict=True)) <= changes
            ]
            held = all(int(other.argmax()) == winner for other in others)
            assert held == (changes <= radius)


@pytest.mark.parametrize("r", [1, 2])
def test_no_change_of_the_training_set_beats_the_certificate(r):
    x, y = toy(10, seed=1)
    tried = torch.cartesian_prod(torch.linspace(0, 1, 5), torch.linspace(0, 1, 5))
    more, more_y = toy(2, seed=9)
    ensemble = trained(x, y, k=4)
    with torch.no_grad():
        predicted = ensemble(tried).argmax(1)
        radius = unchanged_under(ensemble.net.votes(tried))
    assert set(radius.tolist()) == {0, 1, 2}
    changes = [("remove", row) for row in range(len(x))] + [("add", row) for row in range(len(more))]
    changes += [("label", 0)]  # counts once, because the part of an example depends on its input
    beaten = torch.zeros_like(radius, dtype=torch.bool)
    for made in combinations(changes, r):
        kept = [row for row in range(len(x)) if ("remove", row) not in made]
        added = [row for kind, row in made if kind == "add"]
        labels = torch.cat((1 - y[:1] if ("label", 0) in made else y[:1], y[1:]))
        changed = trained(torch.cat((x[kept], more[added])), torch.cat((labels[kept], more_y[added])), k=4)
        with torch.no_grad():
            beaten |= changed(tried).argmax(1) != predicted
        assert not beaten[radius >= r].any(), made
    assert beaten.any()  # some changes do harm


def test_a_changed_example_changes_one_member_and_the_order_of_the_rows_none():
    x, y = toy(40)
    x[7] = x[3]  # equal inputs are in the same part
    parts, digest = parts_of(batch_of(x, y), 5)
    assert sorted(row for part in parts for row in part.tolist()) == list(range(40))
    assert any({3, 7} <= set(part.tolist()) for part in parts)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(digest, parts_of(batch_of(x[order], y[order]), 5)[1])
    model, shuffled, fewer = trained(x, y), trained(x[order], y[order]), trained(x[1:], y[1:])

    def differing(other):
        pairs = zip(model.net.members, other.net.members, strict=True)
        return sum(not torch.equal(a[1].weight, b[1].weight) for a, b in pairs)

    assert (differing(shuffled), differing(fewer)) == (0, 1)
    assert not torch.equal(model.net.training_set, fewer.net.training_set)


def test_members_forget_what_the_given_network_has_learned():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return x * self.scale

    x, y = toy()
    model, other = network(), network()
    with torch.no_grad():
        other.net[1].weight.fill_(3.0)
    for one, two in zip(
        trained(x, y, model=model).parameters(), trained(x, y, model=other).parameters(), strict=True
    ):
        assert torch.equal(one, two)
    with pytest.raises(TargetError, match="reset_parameters"):
        restarted(Classifier(Scaled()), Draws(0))


def test_an_empty_part_has_a_random_member_and_a_training_resumes_exactly():
    x, y = toy(4)
    saved = []
    training = TINY.__class__(**{**vars(TINY), "saving": Saving(1, saved.append)})
    whole = trained(x, y, k=8, training=training)
    assert saved and saved[0].step > 0
    for stopped in (saved[0], saved[-1]):
        again = trained(x, y, k=8, after=stopped)
        assert all(
            torch.equal(a, b)
            for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
        )


def test_of_equal_votes_the_smallest_class_wins_with_a_positive_margin():
    class Constant(nn.Module):
        def __init__(self, label):
            super().__init__()
            self.label = label

        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), self.label), 3).float()

    def shares(*labels, **options):
        return Ensemble([Constant(label) for label in labels], **options)(torch.zeros(2, 4))[0]

    tie = shares(2, 1, 1, 2)
    assert tie[1] > tie[2] > tie[0] == 0
    torch.testing.assert_close(tie, torch.tensor([0, 0.5, 0.5]), rtol=1e-5, atol=0)
    assert shares(2, 2, 0).argmax() == 2
    mean = shares(2, 1, combine="mean")
    torch.testing.assert_close(mean[1], mean[2])
    assert mean[2] > mean[0] and float(mean.sum()) == pytest.approx(1.0)
    with pytest.raises(UsageError, match="at least one member"):
        Ensemble([])


def test_nothing_is_certified_about_another_model():
    x, y = toy()
    sample = batch_of(x, y)
    for other in (network(), Classifier(Ensemble([network().net], partitioned=True))):
        proofs = PartitionVotes().ready(other, sample, THREAT)(sample)
        assert not proofs.certified.any()
    with pytest.raises(UsageError, match="training-set:20"):
        PartitionVotes().ready(network(), sample, ThreatModel(Linf(0.1)))
    with pytest.raises(NoBounds, match="--recipe partitions"):
        holdfast.certify(network().net, (x, y), "training-set:1")
    with pytest.raises(NoBounds, match="--recipe partitions"):
        holdfast.assess(network().net, (x, y), "training-set:1")
    with pytest.raises(UsageError, match="no attack applies"):
        holdfast.assess(network().net, (x, y), "training-set:1", suite="fast")


def test_the_threat_is_written_and_read_and_needs_a_number():
    constraint = parse_threat("training-set:20").opened().constraint
    assert constraint == TrainingSet(20) and str(constraint) == "training-set:20" and constraint.eps == 20
    for text in ("training-set", "training-set:0", "training-set:x"):
        with pytest.raises(UsageError, match="training-set:20"):
            parse_threat(text)
    x = torch.rand(2, 3)
    assert constraint.distance(torch.stack((x[0], x[1] + 1)), x).tolist() == [0, float("inf")]


def test_whether_an_example_is_held_out_depends_on_it_alone():
    x = torch.rand(600, 3, generator=torch.Generator().manual_seed(0))
    whole, fewer = (
        batch_of(x, torch.zeros(600, dtype=torch.int64)),
        batch_of(x[1:], torch.zeros(599, dtype=torch.int64)),
    )
    _, held = split_by_content(whole)
    _, others = split_by_content(fewer)
    first = [name for name in held.fingerprints() if name != whole.fingerprints()[0]]
    assert first == list(others.fingerprints()) and 0 < len(held) < 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a model that harden trained on partitions of the small MNIST."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    recipe = {"use": "partitions", "partitions": 6, "training": {"epochs": 1, "batch": 64, "lr": 0.01}}
    run = tmp_path_factory.mktemp("runs") / "run"
    hardened = holdfast.harden(net, "mnist-mini", recipe=recipe, n=200, run=run)
    place = hardened.write(tmp_path_factory.mktemp("partitions"))
    return hardened, place


@pytest.mark.slow
def test_harden_returns_an_ensemble_that_opens_from_its_folder_without_code(folder, tmp_path):
    hardened, place = folder
    assert hardened.folder is not None and holdfast.verify(hardened.folder).complete
    assert hardened.verdict == "improved"
    assert hardened.card["threat"] == "training-set:1"  # a fifth of the parts
    assert hardened.model.access == "scores"
    result = holdfast.certify(str(place), "mnist-mini", "training-set:1", n=200)
    assert result["certified_accuracy"].value == hardened.after["certified_accuracy"].value > 0.3
    assert result.metrics["certified_accuracy"].value <= result.metrics["clean_accuracy"].value
    radii = result.evidence["certified_radius"]
    assert radii.max() <= 3 and torch.equal(radii >= 1, result.evidence["certified"])
    curve = result.summary()["certification"]["training_set"]["curve"]
    assert [point["changes"] for point in curve] == [1, 10, 20, 40]
    opened = holdfast.open_model(str(place))
    assessed = holdfast.assess(opened, "mnist-mini", "training-set:1", n=50, run=tmp_path / "assessed")
    (entry,) = runs_in(tmp_path)
    assert entry.exit_code == 0 and entry.robust is None  # no attack on inputs was measured
    assert assessed.evidence["certified"].tolist() == result.evidence["certified"][:50].tolist()


@pytest.mark.slow
def test_an_ensemble_with_other_members_is_refused(folder, tmp_path):
    import safetensors
    from safetensors.torch import load_file, save_file

    _, place = folder
    file = place / "model.safetensors"
    with safetensors.safe_open(file, "pt") as content:
        metadata = content.metadata()
    entries = json.loads(metadata["holdfast"])
    assert len(entries["ensemble"]["partitions"]["members"]) == 6
    tensors = load_file(file)
    for path in place.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    name = next(name for name in tensors if name.startswith("members.2"))
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "model.safetensors", metadata)
    with pytest.raises(TargetError, match="not those that the recipe partitions trained"):
        holdfast.certify(str(tmp_path), "mnist-mini", "training-set:1", n=10)
    entries["ensemble"]["members"] = 100_000
    save_file(tensors, tmp_path / "model.safetensors", {"holdfast": json.dumps(entries)})
    with pytest.raises(TargetError, match="100,000 members"):
        holdfast.certify(str(tmp_path), "mnist-mini", "training-set:1", n=10)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": "1min"}, "leave out budget"),
        ({"threat": "l2:1"}, "training-set:20"),
        ({"suite": "fast"}, "no attack"),
    ],
)
def test_what_does_not_fit_partitions_is_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        holdfast.harden(
            nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), "mnist-mini", recipe="partitions", **settings
        )
