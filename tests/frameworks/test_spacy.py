"""spaCy's text classifier, trained with fastopt in place of thinc's Adam."""

import sys
from pathlib import Path

import numpy as np
import pytest
import spacy
from spacy.training import Example
from thinc.api import NumpyOps, fix_random_seed

sys.path.append(str(Path(__file__).parent / "clients"))

import with_thinc

UPDATES = 20
TEXTS = [
    ("I loved every minute of it", "good"),
    ("a warm and funny story, well told", "good"),
    ("the best thing that I have seen this year", "good"),
    ("go and see it, you will be glad", "good"),
    ("dull, loud and far too long", "bad"),
    ("I want my money back", "bad"),
    ("nobody in it can act", "bad"),
    ("the worst film of the decade", "bad"),
]


def train(monkeypatch, adam):
    """Return the losses of the updates, and the scores of each text afterwards."""
    monkeypatch.setattr(NumpyOps, "adam", adam)
    fix_random_seed(0)
    nlp = spacy.blank("en")
    nlp.add_pipe("textcat")
    examples = [
        Example.from_dict(nlp.make_doc(text), {"cats": {c: c == label for c in ("good", "bad")}})
        for text, label in TEXTS
    ]
    optimizer = nlp.initialize(lambda: examples)
    losses = [nlp.update(examples, sgd=optimizer)["textcat"] for _ in range(UPDATES)]
    return losses, [nlp(text).cats for text, _ in TEXTS]


def test_training_gives_the_same_losses(monkeypatch):
    theirs, their_scores = train(monkeypatch, NumpyOps.adam)
    before = with_thinc.calls
    ours, our_scores = train(monkeypatch, with_thinc.adam)
    assert (with_thinc.calls - before) % UPDATES == 0
    assert with_thinc.calls - before > 5 * UPDATES  # one of each parameter
    # Theirs fuses, in float32. A loss is the mean square of errors of scores that near 1, whose own
    # last bit is all that tells the errors apart in the end.
    np.testing.assert_allclose(np.sqrt(ours), np.sqrt(theirs), rtol=1e-4, atol=2.0**-22)
    assert ours[-1] < 0.5 * ours[0]
    for ours, theirs, (_, label) in zip(our_scores, their_scores, TEXTS, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
        assert max(ours, key=ours.get) == label
