"""The built-in data set, loaded for real."""

from __future__ import annotations

import sys
import time
from collections import Counter
from types import ModuleType

import numpy as np
import pytest

from privfed.data import DataConfig, TextDataset, load_dataset
from privfed.data.duplicates import NEAR_JACCARD, jaccard, normalise, shingles
from privfed.data.sources import pydoc as source
from privfed.data.sources.pydoc_topics import LEFT_OUT, TOPIC_OF, TOPICS, public_name


@pytest.fixture(scope="module")
def pydoc() -> TextDataset:
    return load_dataset(DataConfig(name="pydoc"), seed=1)


def test_size_and_topics(pydoc: TextDataset) -> None:
    assert 7_000 < len(pydoc.train) + len(pydoc.test) < 13_000
    assert pydoc.label_names == tuple(sorted(TOPICS))
    counts = np.bincount(np.concatenate([pydoc.train.labels, pydoc.test.labels]))
    assert counts.min() >= 150
    assert counts.max() < 0.25 * counts.sum()
    assert 0.15 < len(pydoc.test) / counts.sum() < 0.25


def test_natural_clients_are_modules_of_one_topic(pydoc: TextDataset) -> None:
    assert pydoc.train.clients is not None
    for client, label in zip(pydoc.train.clients, pydoc.train.labels, strict=True):
        assert TOPIC_OF[client] == pydoc.label_names[label]
    assert len(set(pydoc.train.clients)) > 100


def test_texts_are_docstrings_of_three_words_or_more(pydoc: TextDataset) -> None:
    assert all(len(text.split()) >= 3 and text == " ".join(text.split()) for text in pydoc.train.texts)
    texts = {*pydoc.train.texts, *pydoc.test.texts}
    assert "Return the arc cosine (measured in radians) of x. The result is between 0 and pi." in texts
    assert "Parse a URL into 6 components:" in {text[:30] for text in texts}
    assert not any(text.startswith("Return self==value") for text in texts)


def test_no_text_twice_and_no_near_duplicate_across_the_split(pydoc: TextDataset) -> None:
    everything = [normalise(text) for text in pydoc.train.texts + pydoc.test.texts]
    assert len(set(everything)) == len(everything)
    train = [shingles(normalise(text)) for text in pydoc.train.texts]
    for text in pydoc.test.texts[::20]:
        mine = shingles(normalise(text))
        assert all(jaccard(mine, other) < NEAR_JACCARD for other in train)


def test_loads_fast_and_equal_whatever_the_seed_and_the_state_of_the_interpreter(
    pydoc: TextDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What shells, debuggers and test runners leave behind is not part of the standard library.
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    monkeypatch.setattr("builtins._", "A string that some shell left here.", raising=False)
    start = time.process_time()
    again = load_dataset(DataConfig(name="pydoc"), seed=2)
    assert time.process_time() - start < 20  # 3 s where nothing else runs
    assert again.digest == pydoc.digest
    assert again.test.texts == pydoc.test.texts
    assert again.source == pydoc.source


def test_every_public_module_of_this_python_has_a_topic() -> None:
    missing = {name for name in sys.stdlib_module_names - LEFT_OUT if public_name(name) not in TOPIC_OF}
    assert not missing


def test_a_module_of_another_version_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_from_files", lambda: [("novel", "A docstring of the future.")] * 2)
    raw = source.read_pydoc(DataConfig(name="pydoc"))
    assert raw.notes == ("modules without a topic left out: novel",)
    assert "A docstring of the future." not in raw.train.columns["text"]


def test_introspection_takes_members_and_leaves_what_others_put_there() -> None:
    module = ModuleType("math", "A module docstring.")
    vars(module).update(pi=3.14, floor=abs, path="text", late=lambda: None)
    assert list(source._introspected(module)) == ["A module docstring."]
    found = Counter(source._introspected(sys.modules["itertools"]))
    assert any(text.startswith("Alternative chain() constructor") for text in found)
