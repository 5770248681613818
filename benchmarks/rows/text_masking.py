"""Random masks on sentences of SST-2: certified accuracy after usual training and after the recipe `masked-words`, and
attacks inside the certificates.
"""

import time
from zlib import crc32

import torch
from torch import Tensor, nn

from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.texts import texts_of
from holdfast.attacks import TextSearch
from holdfast.certifiers.masking import Masking
from holdfast.certifiers.smoothing import SmoothedVotes
from holdfast.core.batch import Batch, encoded
from holdfast.core.draws import Draws
from holdfast.core.model import EVERY, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.models.adapting import TextFunction
from holdfast.recipes import MaskedWords, Standard
from holdfast.recipes.training.fit import Training
from holdfast.recipes.training.recipe import Recipe
from holdfast.threats.text_edits import TextEdits

WHAT = (
    "Random masks on SST-2: certified accuracy with and without the recipe `masked-words`, and attacks inside"
)
HOW, EDITS, N, SEED = Masking(0.3, "", draws=2_000), TextEdits(edits=1, words=1), 500, 0
ATTACK, TRAINING, BUCKETS = TextSearch(queries=60), Training(epochs=10, batch=64), 1 << 14


def measured() -> Outcome:
    train, test = (_batch(texts, labels) for texts, labels in texts_of("sst2_sentences.csv.gz", "1"))
    test = test.take(torch.arange(N))
    recipes = {
        "standard": Standard(training=TRAINING),
        "masked-words": MaskedWords(HOW.keep, HOW.mask, training=TRAINING),
    }
    table = [_certified(name, recipe, train, test) for name, recipe in recipes.items()]
    usual, with_masks = (row["certified, %"] for row in table)
    claims = [
        Claim("successes inside certificates, both recipes <= 0", sum(row["successes"] for row in table), 0),
        Claim("certified after masked-words, % >= after standard", with_masks, usual, least=True),
    ]
    config: Cells = {
        "threat": str(EDITS),
        "draws": HOW.draws,
        "queries": ATTACK.queries,
        "n": N,
        "seed": SEED,
    }
    return Outcome(table, claims, {**config, "keep": HOW.keep, "epochs": TRAINING.epochs})


def _batch(texts: list[str], labels: list[int]) -> Batch:
    width = max(map(len, texts)) + sum(EDITS.room)
    return Batch(encoded(texts, width), torch.tensor(labels), torch.arange(len(texts)))


def _certified(name: str, recipe: Recipe, train: Batch, test: Batch) -> Cells:
    """Accuracy and certificates of the smoothed classifier of a network, and successes of attacks on certified texts:
    texts whose most frequent class in new draws is shown to be wrong.
    """
    start, threat = time.process_time(), ThreatModel(EDITS)
    torch.manual_seed(SEED)
    model = Classifier(TextFunction(_HashedWords()), access="scores", batches=EVERY)
    *_, last = recipe(model, train, threat, rng=Draws(SEED))
    last.put_into(model)
    model.eval().requires_grad_(requires_grad=False)
    trained_s = time.process_time() - start
    proofs = HOW.ready(model, test, threat)(test)
    smoothed = SmoothedVotes(model, HOW)
    right = smoothed(test.x).argmax(1) == test.y
    inside = test.take(proofs.certified.nonzero()[:, 0])
    x_adv = ATTACK(smoothed.network(), inside, threat, rng=Draws(SEED))
    return {
        "recipe": name,
        "n": len(test),
        "clean, %": 100 * float(right.double().mean()),
        "certified, %": 100 * float(proofs.certified.double().mean()),
        "draws": float(proofs.work.double().mean()),
        "attacked": len(inside),
        "successes": int(smoothed.refuted(inside.at(x_adv)).sum()),
        "training, CPU s": trained_s,
        "CPU s": time.process_time() - start,
    }


class _HashedWords(nn.Module):
    """Mean of the embeddings of hashed words, and a network with one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(BUCKETS, 32)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
        self.places: dict[str, int] = {}

    def forward(self, texts: list[str]) -> Tensor:
        """Logits of texts."""
        rows = [[self._place(word) for word in text.split()] for text in texts]
        lengths = torch.tensor([0, *map(len, rows[:-1])])
        places = torch.tensor([place for row in rows for place in row])
        logits: Tensor = self.head(self.embedding(places, lengths.cumsum(0)))
        return logits

    def _place(self, word: str) -> int:
        if word not in self.places:
            self.places[word] = crc32(word.encode()) % BUCKETS
        return self.places[word]
