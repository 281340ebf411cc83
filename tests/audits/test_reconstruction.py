"""The audit of a recorded run by inversion, from the command line to its file."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from privfed.cli import main
from privfed.errors import ConfigError
from privfed_attacks.inversion import Reconstruction
from privfed_attacks.scoring import Batch
from privfed_attacks.sealed import Sealed
from privfed_audits.gallery import EXAMPLES, _spread
from privfed_audits.gallery_page import marked, render
from privfed_audits.reconstruction import paired, reconstruct


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, text_csv: Path) -> Path:
    """Return a recorded run: full fine-tuning, one step a round, two clients with few texts."""
    from privfed.config import parse_config
    from privfed.run import train

    folder = tmp_path_factory.mktemp("recorded")
    raw: dict[str, Any] = {
        "model": {"name": str(tiny_bert), "max_length": 24},
        "data": {"path": str(text_csv), "client": "client"},
        "partition": {"name": "iid", "clients": 60},
        "tuning": {"name": "full"},
        "client": {"optimizer": "sgd", "learning_rate": 0.5, "batch_size": 2, "local_steps": 1},
        "server": {"rounds": 2, "cohort_size": 2, "evaluate_every": 2},
        "privacy": {"unit": "none"},
        "secagg": {"name": "none"},
        "audit": {"record": True},
        "ledger": {"path": str(folder / "ledger.sqlite")},
    }
    return train(parse_config(raw, where="test"), out=folder / "run").folder


def test_the_command_prints_one_object_and_writes_it(run: Path) -> None:
    result = CliRunner().invoke(main, ["audit", str(run), "--attacks", "span", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["views"] == {}
    (view,) = found["reconstruction"]
    entry = found["reconstruction"][view]
    assert (view, entry["attack"]) == ("individual", "span")
    assert entry["token_recall"] > entry["prior_token_recall"] or entry["token_precision"] > 0.5
    assert entry["examples"]
    assert {"truth", "found", "prior", "score"} <= set(entry["examples"][0])
    assert json.loads((run / "audit" / "audit.json").read_text())["reconstruction"] == found["reconstruction"]
    written = json.loads((run / "audit" / "reconstruction.json").read_text())
    rows = {row["attack"]: row for row in written["results"]}
    assert set(rows) == {"span", "prior"}
    assert rows["span"]["token_recall"] == entry["token_recall"]
    assert "train/000001.msgpack" in written["transcript"]
    assert "texts" not in rows["span"]
    assert entry["examples"][0]["place"] == "worst"
    shown = (run / "audit" / "gallery.html").read_text()
    assert entry["examples"][0]["truth"] in unescape(shown)
    assert "The worst leaks" in shown
    report = (run / "report.html").read_text()
    assert "What an audit read out of the updates" in report
    assert all(example["truth"] not in unescape(report) for example in entry["examples"])


def test_a_gallery_loads_nothing_and_what_is_in_it_is_text() -> None:
    example = {"truth": "<b>Snow</b>, falls", "found": "falls <i>rain</i> Snow", "prior": "rain", "score": 0.5}
    scores = dict.fromkeys(("token_recall", "token_precision", "rouge_l"), 0.5)
    entry = {**scores, **{f"prior_{name}": 0.1 for name in scores}, "attack": "span"}
    entry["examples"] = [{**example, "ordered": True, "place": place} for place in ("worst", "median")]
    page = render("<s>run</s>", {"aggregate": entry})
    for raw in ("<b>Snow", "<i>", "<s>"):
        assert raw not in page
    assert not re.search(r"(src|href)=.(?!data:)|https?://|@import|url\(", page)
    assert page.count("<mark>falls</mark>") == 2
    assert "Around the median" in page
    assert page == render("<s>run</s>", {"aggregate": entry})


def test_words_are_marked_without_their_case_and_punctuation() -> None:
    assert marked("Snow, (falls) ... here", "snow falls: there ...") == [
        ("Snow,", True), ("(falls)", True), ("...", False), ("here", False)
    ]  # fmt: skip


def test_a_gallery_shows_the_worst_leaks_and_the_median_once() -> None:
    for count in (1, 2, 5, 12, 13, 40):
        examples = [{"score": -float(number)} for number in range(count)]
        chosen = _spread(examples)
        scores = [each["score"] for each in chosen]
        assert len(set(scores)) == len(scores) == min(count, EXAMPLES)
        assert chosen[0] == {"place": "worst", "score": 0.0}
        middle = [each["score"] for each in chosen if each["place"] == "median"]
        assert count < 3 or min(middle) <= -(count // 2) <= max(middle)


def test_what_cannot_be_audited(run: Path) -> None:
    with pytest.raises(ConfigError, match="looks for labels"):
        reconstruct(run, ["labels"])
    with pytest.raises(ConfigError, match="Unknown attack 'spam'"):
        reconstruct(run, ["spam"])


class _Words:
    """A tokenizer of one word a token."""

    all_special_ids = (0,)
    words = ("[PAD]", "the", "cat", "sat", "down", "here")

    def decode(self, tokens: list[int]) -> str:
        return " ".join(self.words[token] for token in tokens)


def test_a_text_is_shown_by_whatever_says_more_of_it() -> None:
    truth = Sealed(Batch(texts=((1, 2, 3), (1, 4, 5))))
    guess = Reconstruction(tokens=frozenset({1, 2, 3}), sequences=((1, 2, 3), (1, 1)))
    first, second = paired(guess, truth, _Words())
    assert first == {"truth": "the cat sat", "found": "the cat sat", "score": 1.0, "ordered": True}
    assert second["ordered"] and second["score"] == 0.3333  # the tokens say no more: one of three
    more = Reconstruction(tokens=frozenset({1, 4, 5}), sequences=((1, 2, 3), (1, 1)))
    second = paired(more, truth, _Words())[1]
    assert second == {"truth": "the down here", "found": "the down here", "score": 1.0, "ordered": False}
    part = Reconstruction(tokens=frozenset({4, 5}), sequences=((2, 2),))
    assert paired(part, truth, _Words())[1]["found"] == "\u00b7 down here"
