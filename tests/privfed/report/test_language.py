"""The report of a language model: lower is better, the base model is the comparison, and texts stay texts."""

from __future__ import annotations

import html
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from privfed.report import charts, measures, text
from privfed.report.html import write_report
from privfed.report.load import load_run

HOSTILE = "<script>alert('x')</script> & \"quoted\""
UTILITY = {"perplexity": 41.27, "base_perplexity": 82.5, "token_accuracy": 0.312, "tokens": 9000.0, "n_test": 1418.0}


@pytest.fixture
def folder(folders: ModuleType, tmp_path: Path) -> Path:
    """A finished run of a language model: the usual one with its scores exchanged."""
    made: Path = folders.write_run(tmp_path / "lm", folders.facts(utility=UTILITY, beats_probe=None))
    lines: list[dict[str, Any]] = []
    for line in map(json.loads, (made / "metrics.jsonl").read_text().splitlines()):
        if line.get("phase") == "warm_start":
            continue
        if line["kind"] == "eval":
            line = _eval(line["round"])
        if line["kind"] == "finish":
            sample = {"prompt": "To be,", "reference": "or not to be", "generated": HOSTILE}
            scores = {"rouge1": 0.25, "rouge2": 0.1, "rougeL": 0.2, "bleu": 3.21}
            line = {"kind": "finish", "seconds": 9.0, "generation": scores, "samples": [sample], "per_class": []}
        lines.append(line)
    lines.insert(1, _eval(0))
    (made / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    partition = json.loads((made / "partition.json").read_text())
    partition["label_names"] = []
    for client in partition["clients"]:
        client["label_counts"] = []
    (made / "partition.json").write_text(json.dumps(partition))
    write_report(made)
    return made


def _eval(number: int) -> dict[str, Any]:
    perplexity = 41.27 + 41.23 * 0.5**number
    return {
        "kind": "eval",
        "phase": "train",
        "round": number,
        "metric": "perplexity",
        "perplexity": perplexity,
        "token_accuracy": 0.312,
        "loss": 3.7,
        "tokens": 9000.0,
        "n": 1418,
    }


def test_its_words_are_those_of_a_language_model(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    for words in (
        "41.3 <small>perplexity</small>",
        "smaller is better; on 1,418 test examples; the next token is right 31.2% of the time",
        "The base model, before tuning <b>82.5</b>",
        "This model <b>41.3</b>",
        "-50.0%",
        "ROUGE-1 0.250, ROUGE-2 0.100, ROUGE-L 0.200, BLEU 3.2",
        "rows of training data",
    ):
        assert words in page, words
    for words in ("commonest answer", "right and wrong", "accuracy after"):
        assert words not in page.lower(), words


def test_what_the_model_wrote_cannot_become_markup(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page and HOSTILE in html.unescape(page)


def test_the_bar_of_the_better_model_is_the_shorter_one(folder: Path) -> None:
    base, this = measures.bars(load_run(folder))
    assert (base.percent, this.main) == (100.0, True)
    assert this.percent == pytest.approx(50.0, abs=0.1)


def test_the_chart_is_of_perplexity_and_starts_at_the_base_model(folder: Path) -> None:
    metrics = load_run(folder).metrics
    chart = charts.quality_chart(metrics)
    assert chart is not None and "lower is better" in chart.title
    assert "perplexity goes from 82.5 to 41.3" in chart.alt and "the base model before any tuning" in chart.alt
    assert len(chart.rows) == len(metrics.evals)
    assert charts.accuracy_chart(metrics) is None


def test_an_infinite_perplexity_leaves_a_gap_and_no_error(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace(json.dumps(_eval(0)), json.dumps({**_eval(0), "perplexity": None})))
    chart = charts.quality_chart(load_run(folder).metrics)
    assert chart is not None and chart.rows[0][1] == "1"
    assert write_report(folder)


def test_the_closing_line(folders: ModuleType) -> None:
    from privfed.report.receipt import build_receipt

    line = text.summarise(build_receipt(folders.facts(utility=UTILITY)))[2]
    assert line == (
        "Model:      perplexity 41.3 on 1,418 test examples (the base model before tuning: 82.5), "
        "next token right 31.2% of the time."
    )
    assert text.perplexity_text(12345.6) == "12,346"


def test_what_privacy_cost_a_language_model(folder: Path) -> None:
    view = load_run(folder)
    assert view.receipt is not None
    assert measures.lost(view).value == "-50.0%"  # type: ignore[union-attr]
    view.receipt["utility"]["non_private_perplexity"] = 30.0
    lost = measures.lost(view)
    assert lost is not None and (lost.value, lost.label) == ("+11.27", "of perplexity lost to privacy")
    assert [bar.label for bar in measures.bars(view)][-1] == "Same training, no privacy"
