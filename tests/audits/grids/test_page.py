"""The page and the tables: one file that loads nothing, says everything, escapes what it is given, and repeats."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from privfed_audits.grids.page.write import render, write_figures
from privfed_audits.grids.tables import tables


@pytest.fixture(scope="module")
def page(results: Any) -> str:
    return render(results, tables(results))


def figures(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    values: dict[str, Any] = json.loads(found.group(1))
    return values


def without_scripts(page: str) -> str:
    return re.sub(r"<script\b[^>]*>.*?</script>", "", page, flags=re.DOTALL)


def test_one_file_that_loads_nothing(page: str) -> None:
    assert "default-src 'none'" in page
    for tag, value in re.findall(r'<(\w+)[^>]*?\b(?:src|href|action)="([^"]*)"', without_scripts(page)):
        assert value.startswith(("#", "data:")), (tag, value)
    assert "@import" not in without_scripts(page) and "<script src" not in page


def test_equal_results_give_equal_bytes(results: Any, page: str) -> None:
    assert render(results, tables(results)) == page


def test_every_plot_is_there_with_its_words_and_its_table(page: str, results: Any) -> None:
    shown = figures(page)
    assert list(shown) == sorted(shown) and set(shown) == {
        "utility", "leakage", "roc", "front-bytes", "front-leakage", "matched",
    }  # fmt: skip
    for name, figure in shown.items():
        assert figure["data"], name
        assert re.search(rf'id="plot-{name}" role="img" aria-label="[^"]{{40,}}"', page), name
    made = tables(results)
    for name in ("utility", "leakage", "roc", "front", "matched", "cells"):
        link = re.search(rf'href="data:text/csv;base64,([^"]*)" download="{name}\.csv"', page)
        assert link is not None and base64.b64decode(link.group(1)).decode() == made[name].csv()
    assert results.choice.sentence.split(":")[0] in page


def test_every_trace_answers_to_the_filters(page: str) -> None:
    for name, figure in figures(page).items():
        for trace in figure["data"]:
            meta = trace.get("meta")
            if meta is None:
                assert name in ("leakage", "roc", "front-bytes", "front-leakage")  # what is equal, guessing, the ring
            elif "privacy" not in meta and name == "leakage":
                assert set(meta) == {"view"}  # a ceiling
            else:
                assert {"tuning", "codec"} <= set(meta)
    for axis in ("tuning", "codec", "privacy", "view"):
        assert f'<fieldset data-axis="{axis}">' in page
    assert 'data-axis="secagg"' not in page  # nothing to choose there


def test_the_accounted_curve_lies_over_what_attacks_got(page: str, results: Any) -> None:
    thick = [t for t in figures(page)["roc"]["data"] if "allows" in (t.get("name") or "")]
    private = [point for point in results.points if point.epsilon is not None]
    assert len(thick) == sum(len(point.leaks) for point in private)
    assert all(a <= b + 1e-9 for t in thick for a, b in zip(t["y"], t["y"][1:], strict=False))


def test_names_are_text_and_never_markup(page: str) -> None:
    visible = without_scripts(page)
    assert "random &lt;25 %&gt;" in visible and "random <25" not in visible
    assert "&lt;b&gt;sat&lt;/b&gt;" in visible and "<b>sat</b>" not in page
    assert "</script" not in re.search(r'id="figures">(.*?)</script>', page, re.DOTALL).group(1)  # type: ignore[union-attr]


def test_failures_and_an_early_look_are_said(made: ModuleType, tmp_path: Path) -> None:
    grid = made.grid(seeds=[1])
    found = made.read(made.write(tmp_path / "grid", grid, waiting=5, failed=2), grid)
    text = render(found, tables(found))
    assert "An early look" in text and "5 runs are not finished" in text
    assert "2 cells without a full result" in text and "too few clients &lt;survived&gt;" in text
    assert "<b>31</b> of <b>36</b> runs finished" in text
    states = [row[5] for row in csv.reader(io.StringIO(tables(found)["cells"].csv()))]
    assert states.count("waiting") == 5 and states.count("failed") == 2 and states.count("done") == 29


def test_a_broken_promise_comes_first(made: ModuleType, tmp_path: Path) -> None:
    from privfed_audits.grids.command import lines, summary

    grid = made.grid(seeds=[1])
    store = made.write(tmp_path / "grid", grid)
    key, record = next((k, r) for k, r in store.read().items() if r["promises"]["release"]["epsilon"] is not None)
    record["audit"]["contradicted"] = True
    entry = record["audit"]["views"]["release"]
    entry |= {"contradicted": True, "empirical_epsilon": entry["accounted_epsilon"] + 1}
    store.keep(key, record)
    found = made.read(store, grid)
    ((cell, state, why),) = found.troubles()
    assert (cell.key, state) == (key, "contradicted") and "epsilon of the view release is at least" in why
    assert "An audit proves more than is promised of 1 cell<" in render(found, tables(found))
    answer = summary(found, store.path)
    assert answer["contradicted"] == [cell.name] and any(cell.name in line for line in lines(answer))


def test_a_grid_without_a_result_yet_has_a_page(made: ModuleType, tmp_path: Path) -> None:
    grid = made.grid(seeds=[1])
    found = made.read(made.write(tmp_path / "grid", grid, waiting=36), grid)
    text = render(found, tables(found))
    assert "No cell has finished yet." in text and figures(text) == {}
    write_figures(found, tmp_path / "figures")


def test_tables_hold_numbers_with_intervals_and_nothing_of_time(results: Any) -> None:
    made = tables(results)
    rows = list(csv.DictReader(io.StringIO(made["utility"].csv())))
    assert len(rows) == 36 and {row["interval_over"] for row in rows} == {"seeds"}
    for row in rows:
        assert float(row["accuracy_low"]) < float(row["accuracy"]) < float(row["accuracy_high"])
        assert (row["epsilon"] == "") == (row["privacy"] == "none")
    assert not any("second" in column for table in made.values() for column in table.columns)
    leakage = list(csv.DictReader(io.StringIO(made["leakage"].csv())))
    assert {row["view"] for row in leakage} == {"aggregate", "release"} and len(leakage) == 72
    front = list(csv.DictReader(io.StringIO(made["front"].csv())))
    assert sum(int(row["chosen"]) for row in front) == 1
    assert all(row["on_front"] == "1" for row in front if row["chosen"] == "1")


def test_a_single_seed_says_what_its_intervals_are_over(made: ModuleType, tmp_path: Path) -> None:
    grid = made.grid(seeds=[1])
    found = made.read(made.write(tmp_path / "grid", grid), grid)
    rows = list(csv.DictReader(io.StringIO(tables(found)["utility"].csv())))
    assert {row["interval_over"] for row in rows} == {"test rows"}
    assert "for there is one seed" in render(found, tables(found))


def test_the_figures_for_a_paper(results: Any, tmp_path: Path) -> None:
    write_figures(results, tmp_path)
    names = {"utility", "leakage", "roc", "front", "matched"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}.{end}" for n in names for end in ("png", "svg")}
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert all(b"<svg" in content and len(content) > 5000 for content in before.values())
    write_figures(results, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")} == before


def test_figures_number_their_axes_in_plain_text(results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: dict[str, list[str]] = {}
    saved = Figure.savefig

    def savefig(self: Any, path: Path, **options: Any) -> None:
        saved(self, path, **options)
        axes = self.axes[0]
        ticks = [*axes.get_xticklabels(which="both"), *axes.get_yticklabels(which="both")]
        drawn[path.stem] = [label.get_text() for label in ticks]

    monkeypatch.setattr(Figure, "savefig", savefig)
    write_figures(results, tmp_path)
    assert set(drawn) == {"utility", "leakage", "roc", "front", "matched"}
    assert not [text for texts in drawn.values() for text in texts if "$" in text or "\\" in text]
    assert any(text.endswith("B") for text in drawn["front"])


def test_the_leakage_figure_shows_what_is_proved_however_long_the_bars(
    results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    tops: dict[str, float] = {}
    saved = Figure.savefig

    def savefig(self: Any, path: Path, **options: Any) -> None:
        saved(self, path, **options)
        tops[path.stem] = self.axes[0].get_ylim()[1]

    monkeypatch.setattr(Figure, "savefig", savefig)
    write_figures(results, tmp_path)
    leaks = [leak for point in results.points for leak in point.leaks.values()]
    most = max([leak.empirical for leak in leaks] + [leak.accounted for leak in leaks if leak.accounted is not None])
    assert most < tops["leakage"] <= 1.3 * max(most, *(leak.ceiling or 0.0 for leak in leaks))
