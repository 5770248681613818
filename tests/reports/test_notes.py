"""Notes that a person is told, and details that are kept for whoever looks them up."""

import torch
from torch import nn

from holdfast.attacks.parts.fast_networks import quickened
from holdfast.core.model import Classifier
from holdfast.reports.run import shown_notes


def test_whatever_makes_the_attacks_quick_is_a_detail():
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).eval()
    for weight in net.parameters():
        weight.data.copy_(torch.rand(weight.shape, generator=g) - 0.5)
    _, did = quickened(Classifier(net), torch.rand(4, 3, 8, 8, generator=g))
    assert set(did) == {
        "batch norm is folded into the layer before it",
        "convolutions run channels last",
        "convolutions of few channels give their input gradient as a matrix product",
    }


def test_no_sentence_is_repeated():
    fast, late = "convolutions run channels last", "time ran out: PGD finished none"
    doubts = [{"state": "raised", "message": late}, {"state": "clear", "message": "other"}]
    summary = {"notes": ["a note", late, "other"], "details": [fast], "doubts": doubts}
    assert shown_notes(summary) == ["a note", "other"]
    assert shown_notes(summary, verbose=True) == ["a note", "other", fast]
