"""Randomised masking on sentences of SST-2, with a small network that the recipe `masked-words` trained: attacks on
certified texts.
"""

import gzip
from zlib import crc32

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from holdfast.attacks.text_search import TextSearch
from holdfast.certifiers.masking import Masking
from holdfast.certifiers.smoothing import SmoothedVotes
from holdfast.core.batch import Batch, encoded
from holdfast.core.draws import Draws
from holdfast.core.model import EVERY, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.models.adapting import TextFunction
from holdfast.recipes import MaskedWords
from holdfast.recipes.training.fit import Training
from holdfast.threats.text_edits import TextEdits

KEEP, EPOCHS, BUCKETS, N = 0.3, 10, 1 << 14, 500


class HashedWords(nn.Module):
    """Mean of the embeddings of hashed words, and a network with one hidden layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.EmbeddingBag(BUCKETS, 32)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
        self.known = {}

    def forward(self, texts):
        rows = [[self.place(word) for word in text.split()] for text in texts]
        starts = np.cumsum([0, *map(len, rows)])[:-1]
        places = torch.tensor([place for row in rows for place in row])
        return self.head(self.embedding(places, torch.from_numpy(starts)))

    def place(self, word):
        if word not in self.known:
            self.known[word] = crc32(word.encode()) % BUCKETS
        return self.known[word]


def trained(texts, labels, how, threat):
    """A network that was trained on masked texts by the recipe."""
    torch.manual_seed(1)
    model = Classifier(TextFunction(HashedWords()), access="scores", batches=EVERY)
    x = encoded(texts, max(map(len, texts)))
    recipe = MaskedWords(how.keep, how.mask, training=Training(epochs=EPOCHS, batch=64))
    data = Batch(x, torch.tensor(labels), torch.arange(len(texts)))
    *_, last = recipe(model, data, threat, rng=Draws(1))
    last.put_into(model)
    return model.eval().requires_grad_(False)


@pytest.mark.slow
def test_no_attack_succeeds_on_certified_sentences(data_folder):
    path = data_folder / "sst2_sentences.csv.gz"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    with gzip.open(path) as file:
        table = pd.read_csv(file)
    train, test = table[table.split == "train"], table[table.split != "train"][:N]
    how = Masking(keep=KEEP, mask="", draws=2_000)
    edits, texts = TextEdits(edits=1, words=1), test.text.tolist()
    threat = ThreatModel(edits)
    base = trained(train.text.tolist(), train.label.tolist(), how, threat)
    width = max(map(len, texts)) + sum(edits.room)
    batch = Batch(encoded(texts, width), torch.tensor(test.label.tolist()), torch.arange(len(texts)))
    found = how.ready(base, batch, threat)(batch)
    certified = batch.take(found.certified.nonzero()[:, 0])
    assert len(certified) > 0.25 * N
    smoothed = SmoothedVotes(base, how)
    x_adv = TextSearch(queries=60)(smoothed.network(), certified, threat, rng=Draws(0))
    assert (x_adv != certified.x).any()
    assert not smoothed.refuted(certified.at(x_adv)).any()
