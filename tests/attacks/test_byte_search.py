"""ByteSearch finds the exact worst case on linear models of bytes, and returns only allowed files."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdfast.attacks import ByteSearch
from holdfast.attacks.parts.embeddings import located
from holdfast.core.batch import Batch, decoded_files, encoded_files
from holdfast.core.constraints import allowed
from holdfast.core.draws import Draws
from holdfast.core.meter import Metered, margin
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.threats.byte_changes import ByteChanges

FILES = [b"%PDF-hello world, this is a file", b"PK\3\4 another file with more bytes than this", bytes(40)]
WEIGHTS = torch.randn(257, generator=torch.Generator().manual_seed(0))
WEIGHTS[256] = 0


class Linear(nn.Module):
    """Mean of the weights of the first and of the last 16 bytes as the logit of class 1."""

    def forward(self, x):
        ends = [content[:16] + content[-16:] for content in decoded_files(x)]
        tokens = torch.tensor([list(end) for end in ends])
        logit = F.embedding(tokens, WEIGHTS[:, None]).mean(1) + 5
        return torch.cat((torch.zeros_like(logit), logit), 1)


class Parts(nn.Module):
    """The same, with an embedding of positions before that of bytes, which is looked up for each end."""

    def forward(self, x):
        F.embedding(torch.arange(32)[None], torch.ones(512, 1))
        (content,) = decoded_files(x) if len(x) == 1 else (None,)
        if content is None:
            return torch.cat([self(row[None]) for row in x])
        ends = [torch.tensor(list(end)) for end in (content[:16], content[-16:])]
        logit = sum(F.embedding(end, WEIGHTS[:, None]).mean(0, keepdim=True) for end in ends) / 2 + 5
        return torch.cat((torch.zeros_like(logit), logit), 1)


def attacked(constraint, files=FILES, access="gradients", queries=400, net=Linear):
    x = encoded_files(files, max(map(len, FILES)) + constraint.growth)
    batch = Batch(
        x, torch.ones(len(files), dtype=torch.int64), torch.tensor([FILES.index(each) for each in files])
    )
    model = Classifier(net(), bounds=Bounds(0.0, 256.0), classes=2, access=access)
    threat = ThreatModel(constraint, access=access, queries=queries)
    meter = Metered(model, batch, threat)
    x_adv = ByteSearch()(meter, batch, threat, rng=Draws(0))
    assert allowed(constraint, x_adv, batch.x, model.bounds).all()
    assert int(meter.spent.queries.max()) <= queries
    return decoded_files(x_adv), margin(model(x_adv), batch)


def worst(content, n_changed, values):
    """The lowest margin of a linear model after changes of its first 16 and its last 16 bytes."""
    read = content[:16] + content[-16:]
    gains = sorted((WEIGHTS[byte] - WEIGHTS[list(values)].min() for byte in read), reverse=True)
    return float(WEIGHTS[list(read)].mean() - sum(gains[:n_changed]) / 32 + 5)


@pytest.mark.parametrize("net", [Linear, Parts])
def test_gradients_find_the_exact_worst_case_of_a_linear_model(net):
    _, margins = attacked(ByteChanges(change=5), net=net)
    expected = [worst(content, 5, range(256)) for content in FILES]
    assert np.allclose(margins, expected, atol=1e-5)


@pytest.mark.parametrize("access", ["gradients", "scores", "labels"])
def test_files_are_allowed_and_do_not_depend_on_the_other_files(access):
    rules = '{"rules": [{"change": [[4, 12]], "append": true, "insert": [8], "values": "[a-f]"}]}'
    constraint = ByteChanges(3, 6, 4, "rules.json", rules)
    files, margins = attacked(constraint, access=access)
    alone, _ = attacked(constraint, FILES[1:2], access=access)
    assert alone == files[1:2]
    if access != "labels":
        clean = attacked(ByteChanges(change=1), queries=1)[1]
        assert (margins < clean).all()


def test_tokens_are_located_in_a_file_of_which_a_model_reads_both_ends():
    content = bytes(range(256)) + b"  "
    tokens = np.array([*range(1, 41), 0, 0, *range(217, 257)])  # bytes plus one, and 0 as the padding
    offsets, shift = located(tokens, content)
    assert shift == 1 and offsets.tolist() == [*range(40), -1, -1, *range(216, 256)]


def test_tokens_of_the_end_of_a_file_are_located_where_the_same_bytes_occur_before():
    content = b"begin" + bytes(50) + b"middle" + bytes(40) + b"end"
    offsets, _ = located(np.frombuffer(content[-30:], np.uint8).astype(np.int64), content)
    assert offsets.tolist() == [*range(len(content) - 30, len(content))]


@pytest.mark.parametrize("breaks", [lambda new: new.endswith(b"%%EOF\n"), lambda new: len(new) == 7])
def test_appended_bytes_of_other_lengths_and_signatures_at_the_end_of_a_file_are_tried(breaks):
    class Scores(nn.Module):
        def forward(self, x):
            broken = [breaks(content[len(FILES[0]) :]) for content in decoded_files(x)]
            return torch.tensor([[float(each), 1.0 - each] for each in broken])

    _, margins = attacked(ByteChanges(append=16), FILES[:1], access="scores", queries=1000, net=Scores)
    assert margins < 0
