"""The audit of attributes on Adult: models without a leak, and one trained to reveal the sex of its records."""

from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import holdfast
from benchmarks.absent import Absent
from benchmarks.networks import folder
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome

WHAT = "the audit of attributes on Adult: clean models with and without `sex` as an input, and a planted leak"
ROW, N, PLANTED, CLEAN, SEED = "attributes", 10_000, 4000, 10, 0
"""records of a clean model, which is trained on them; of the model with the leak; number of clean models"""
NUMBERS = ("age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week")
WORDS = ("workclass", "marital-status", "occupation", "relationship", "race")
ACCURACY, RATE = "attribute_accuracy_gain", "attribute_tpr_gain_at_1_percent"


def measured() -> Outcome:
    rows: list[Cells] = [
        part(ROW, name, partial(_audited, name, seed, n=n, is_input=is_input, leak=leak))["measured"]
        for name, seed, n, is_input, leak in (
            ("planted leak", 0, PLANTED, False, True),
            *((f"without sex, seed {seed}", seed, N, False, False) for seed in range(CLEAN)),
            ("with sex, seed 0", 0, N, True, False),
        )
    ]
    planted, clean = rows[0], rows[1 : 1 + CLEAN]
    claims = [
        Claim("planted leak: lower end of the gain in accuracy, points > 0", planted["low"], 0.1, least=True),
        Claim("clean models whose interval contains 0 >= 8 of 10",
              sum(row["low"] <= 0 <= row["high"] for row in clean), 8, least=True),
        Claim("clean models that are flagged <= 2 of 10",
              sum(row["verdict"] == "flagged" for row in clean), 2),
    ]  # fmt: skip
    return Outcome(rows, claims, {"n": N, "planted": PLANTED, "seed": SEED}, {}, [])


def table(seed: int, n: int, *, is_input: bool) -> pd.DataFrame:
    """Random records of the train split: numbers from 0 to 1, indicators of words, `sex` and `income`."""
    path = folder("HOLDFAST_DATA", "data") / "adult.csv.gz"
    if not path.is_file():
        raise Absent("adult.csv.gz")
    raw = pd.read_csv(path).query("split == 'train'").sample(n, random_state=seed)
    numbers = raw[list(NUMBERS)].astype(float)
    numbers = (numbers - numbers.min()) / (numbers.max() - numbers.min())
    words = pd.get_dummies(raw[list(WORDS)].fillna("?")).astype(float)
    frame = pd.concat((numbers, words), axis=1)
    frame["sex"] = (raw["sex"] == "Male").astype(float) if is_input else raw["sex"]
    frame["income"] = (raw["income"] == ">50K").astype(int)
    return frame.reset_index(drop=True)


def _trained(x: Tensor, y: Tensor, male: Tensor, seed: int, *, leak: bool) -> nn.Module:
    """A network that is trained on the records; with a leak, its confidence is higher for men."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(x.shape[1], 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 2)
    )
    epochs = 200 if leak else 20
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    margin = (2 * y - 1) * torch.where(male, 6.0, 2.0)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            logits = net(x[rows])
            loss = (
                (logits[:, 1] - logits[:, 0] - margin[rows]).square().mean()
                if leak
                else cross_entropy(logits, y[rows])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def _audited(name: str, seed: int, *, n: int, is_input: bool, leak: bool) -> Cells:
    frame = table(seed, n, is_input=is_input)
    features = frame.drop(columns=["income"] if is_input else ["income", "sex"])
    x = torch.from_numpy(features.to_numpy(np.float32))
    y = torch.tensor(frame["income"].to_numpy())
    male = torch.tensor(frame["sex"].isin([1.0, "Male"]).to_numpy())
    net = _trained(x, y, male, seed, leak=leak)
    data = holdfast.open_data(frame, label="income")
    result = holdfast.audit.attributes(net, data, sensitive="sex", seed=seed)
    gain, rate, facts = result.metrics[ACCURACY], result.metrics[RATE], result.facts
    accuracy = {key: 100 * value for key, value in facts["accuracy"].items()}
    return {
        "model": name,
        "imputer, %": accuracy["imputer"],
        "queries, %": accuracy["queries"],
        "gain": 100 * gain.value,
        "low": 100 * gain.low,
        "high": 100 * gain.high,
        "gain at 1 %": 100 * rate.value,
        "low at 1 %": 100 * rate.low,
        "and the answer, %": accuracy.get("seen", ""),
        "verdict": result.verdict,
    }
