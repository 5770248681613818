"""Training of models of texts on random masks: networks, linear pipelines, and what cannot be trained."""

import numpy as np
import pytest
import torch

from holdfast.certifiers.masking import masked
from holdfast.core.batch import LARGEST, Batch, encoded
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.loaders import as_data
from holdfast.io.models.adapting import TextFunction
from holdfast.io.models.models import Declared
from holdfast.recipes import MaskedWords
from holdfast.recipes.training.fit import Training
from holdfast.runs.harden.attempt_training import refuse_untrainable, with_trainable_texts
from holdfast.runs.harden.held_out import without_judged
from holdfast.threats.text_edits import TextEdits

THREAT = ThreatModel(TextEdits(edits=1, words=1))
TEXTS = [f"{'win cash prize' if k % 2 else 'see you home'} w{k % 7} w{k % 5} w{k % 3} now" for k in range(64)]
LABELS = [k % 2 for k in range(64)]


class Words(torch.nn.Module):
    """Sum of an embedding of each word, with a tokenizer of its own."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.EmbeddingBag(256, 2, mode="sum")

    def forward(self, texts):
        rows = [[sum(map(ord, word)) % 256 for word in text.split()] for text in texts]
        starts = np.cumsum([0, *map(len, rows)])[:-1]
        return self.embedding(torch.tensor([w for row in rows for w in row]), torch.from_numpy(starts))


def network():
    torch.manual_seed(0)
    return Classifier(TextFunction(Words()), access="scores")


def batch(texts=TEXTS, width=40):
    return Batch(encoded(texts, width), torch.tensor(LABELS[: len(texts)]), torch.arange(len(texts)))


def recipe(**settings):
    return MaskedWords(keep=0.3, training=Training(epochs=6, batch=16, lr=0.1), **settings)


def test_it_learns_texts_with_masks_as_the_certificate_classifies_them():
    model, last = network(), None
    for checkpoint in recipe()(model, batch(), THREAT, rng=Draws(0)):
        last = checkpoint
    before = model(batch().x)
    last.put_into(model)
    assert not torch.equal(model(batch().x), before)
    rows = encoded(masked(TEXTS, keep=0.5, rng=Draws(1)), 80)
    assert (
        model(rows).argmax(1) == torch.tensor(LABELS)
    ).double().mean() > 0.8  # of most masks, words of a class are kept


def test_a_training_that_is_resumed_ends_with_the_same_weights():
    whole = list(recipe(clean=0.5)(network(), batch(), THREAT, rng=Draws(0)))
    rest = list(recipe(clean=0.5)(network(), batch(), THREAT, rng=Draws(0), after=whole[2]))
    for name, value in whole[-1].tensors.items():
        assert torch.equal(value, rest[-1].tensors[name])


def test_a_mask_of_two_words_is_refused():
    with pytest.raises(UsageError, match="one word"):
        MaskedWords(mask="two words")


@pytest.mark.parametrize("kind", ["LogisticRegression", "LinearSVC", "MultinomialNB"])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_linear_pipeline_is_trained_as_a_layer_with_the_same_scores(kind, classes):
    pipeline = fitted(kind, [k % classes for k in range(len(TEXTS))])
    given = Declared(texts=True).wrap(pipeline)
    trainable = with_trainable_texts(given)
    refuse_untrainable(trainable)
    expected = pipeline.predict_log_proba(TEXTS) if kind != "LinearSVC" else pipeline.decision_function(TEXTS)
    logits = trainable(batch().x)
    if kind == "LinearSVC":
        assert torch.equal(logits.argmax(1), given(batch().x).argmax(1))
    else:
        torch.testing.assert_close(
            logits.log_softmax(1), torch.tensor(expected).float(), atol=1e-4, rtol=1e-4
        )
    with torch.no_grad():
        trainable.net.model.bias += 3.0 * torch.arange(1, len(trainable.net.model.bias) + 1)
    again = Declared(texts=True).wrap(trainable.net.model.fitted_pipeline())
    assert torch.equal(again(batch().x).argmax(1), trainable(batch().x).argmax(1))
    assert torch.equal(given(batch().x), Declared(texts=True).wrap(pipeline)(batch().x))


def fitted(kind, labels):
    pytest.importorskip("sklearn")
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    classifiers = {each.__name__: each for each in (LogisticRegression, LinearSVC, MultinomialNB)}
    classifier = classifiers.get(kind, RandomForestClassifier)()
    return make_pipeline(TfidfVectorizer(), classifier).fit(TEXTS, labels)


def test_a_pipeline_with_another_classifier_is_refused():
    with pytest.raises(TargetError, match="ends with RandomForestClassifier, which has no weights"):
        with_trainable_texts(Declared(texts=True).wrap(fitted("forest", LABELS)))


def test_a_function_that_hides_its_network_is_refused_with_a_way_out():
    words = Words()
    model = Declared(texts=True).wrap(lambda texts: words(texts).detach())
    with pytest.raises(
        TargetError, match="a function from texts to scores, which hides its weights.*forward"
    ):
        refuse_untrainable(model)


def test_equal_texts_of_another_width_are_duplicates():
    longer, shorter = batch(width=60), batch(TEXTS[:3], width=40)
    for data, test in ((longer, shorter), (batch(width=40), batch(TEXTS[:3], width=60))):
        fresh, note = without_judged(
            data, as_data(test.x, test.y, expected=DeclaredData(Bounds(0, LARGEST), 2))
        )
        assert "training examples are also test examples" in note and len(fresh) < len(TEXTS)
