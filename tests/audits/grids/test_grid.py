"""The grid's table: what it takes, what it refuses in which words, and the cells that it means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from privfed.errors import ConfigError, UnknownNameError
from privfed_audits.grids.cells import cells, distinct
from privfed_audits.grids.grid import AS_BASE, Grid, grid_presets, load_grid, parse_grid, place_name


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tunings": {}}, r"Unknown key 'tunings' of a grid\. Did you mean 'tuning'\?"),
        ({"seeds": []}, "seeds = "),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\] names a seed twice"),
        ({"seeds": [-1]}, r"seeds\.0 = -1"),
        ({"reference": "DoRA"}, "reference = 'DoRA' is no tuning of the grid: LoRA, FFA-LoRA"),
        ({"when": [{"tuning": ["Lora"], "settings": ["a=1"]}]}, r"names the tuning 'Lora'.*Did you mean 'LoRA'\?"),
        ({"when": [{"tuning": ["LoRA"]}]}, r"when\.0\.settings"),
        ({"when": [{"zzz": ["x"], "settings": ["a=1"]}]}, r"Unknown key 'when\.0\.zzz' of a grid\. Known: .*settings"),
        ({"codec": {"float32": "compression.name=identity"}}, r"codec\.float32 = "),
    ],
)
def test_what_a_grid_refuses(made: ModuleType, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        made.grid(**changes)


def test_files_and_presets_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'quick'"):
        load_grid("quik")
    with pytest.raises(ConfigError, match="There is no file"):
        load_grid("nowhere.toml")
    (tmp_path / "bad.toml").write_text("seeds = [")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_grid(str(tmp_path / "bad.toml"))
    (tmp_path / "latin.toml").write_bytes(b'base = "\xe9"')
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_grid(str(tmp_path / "latin.toml"))


def test_a_grid_comes_back_from_its_own_toml(made: ModuleType) -> None:
    import tomllib

    grid = made.grid(when=[{"tuning": ["LoRA"], "settings": ["seed=4"]}])
    assert parse_grid(tomllib.loads(grid.to_toml()), where="itself") == grid


def test_the_presets_are_as_large_as_they_say_and_none_of_their_cells_is_refused() -> None:
    sizes = {"quick": (4, 3, 2, 1), "paper": (6, 5, 4, 3)}
    assert set(sizes) <= set(grid_presets())
    for name, (tunings, codecs, budgets, seeds) in sizes.items():
        grid = load_grid(name)
        found = cells(grid)
        assert (len(grid.tuning), len(grid.codec), len(grid.privacy), len(grid.seeds)) == sizes[name]
        assert [(cell.name, cell.refusal) for cell in found if cell.refusal] == []
        assert len(distinct(found)) == len(found) == tunings * codecs * budgets * seeds


def test_later_settings_win_and_a_seed_is_a_run(made: ModuleType) -> None:
    grid = made.grid(
        seeds=[5, 6],
        settings=["server.rounds=4"],
        codec={"float32": ["server.rounds=5"]},
        privacy={"epsilon 8": ["privacy.target_epsilon=8.0"]},
        when=[{"tuning": ["head"], "settings": ["server.rounds=6"]}],
    )
    found = [(cell.tuning, cell.seed, cell.config) for cell in cells(grid)]
    assert [seed for _, seed, _ in found] == [5] * 4 + [6] * 4
    for tuning, seed, config in found:
        assert config is not None
        assert config.seed == seed and config.server.rounds == (6 if tuning == "head" else 5)


def test_a_refused_cell_keeps_its_sentence_and_equal_cells_are_one_run(small_grid: Callable[..., Path]) -> None:
    twice = {"float32": ["compression.name=identity"], "the default": [], "top": ["compression.name=top_k"]}
    found = cells(load_grid(str(small_grid(codec=twice))))
    refused = [cell for cell in found if cell.config is None]
    assert len(found) == 12 and {cell.codec for cell in refused} == {"top"} and len(refused) == 4
    assert all("do not add up in a ring" in cell.refusal and not cell.key for cell in refused)
    assert len(distinct(found)) == 4


def test_a_grid_without_a_base_or_a_cell_is_an_error(small_grid: Callable[..., Path]) -> None:
    with pytest.raises(UnknownNameError, match="preset 'demmo'"):
        cells(Grid(base="demmo"))
    with pytest.raises(ConfigError, match=r"Every cell of the grid is refused, the first one so: .*Unknown key"):
        cells(load_grid(str(small_grid(settings=["server.round=3"]))))


def test_data_whose_holder_keeps_a_ledger_are_refused(small_grid: Callable[..., Path], text_csv: Path) -> None:
    ledger = text_csv.with_name(f"{text_csv.name}.privfed-ledger.sqlite")
    ledger.touch()
    try:
        with pytest.raises(ConfigError, match="have a ledger"):
            cells(load_grid(str(small_grid())))
        named = small_grid(settings=[f"ledger.path={ledger}"])
        assert any(cell.config is not None for cell in cells(load_grid(str(named))))
    finally:
        ledger.unlink()


def test_names_leave_out_what_there_is_no_choice_of() -> None:
    assert place_name(("LoRA", AS_BASE, "epsilon 8", AS_BASE)) == "LoRA, epsilon 8"
    assert place_name((AS_BASE,)) == AS_BASE
