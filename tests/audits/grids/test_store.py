"""What is kept of a grid: whole files, nothing of what was under way, one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from privfed.errors import ConfigError, ResumeError
from privfed_audits.grids.store import Store, locked, open_store, stored_grid


def test_a_kept_cell_has_its_small_files_and_not_the_large_ones(made: ModuleType, tmp_path: Path) -> None:
    store = open_store(tmp_path / "grid", made.grid(), resume=False)
    work = store.work("abc")
    for name in ("adapter/weights", "checkpoint/state", "transcript/1", "receipt.json"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text("x")
    store.keep("abc", {"state": "done"})
    assert sorted(p.name for p in (store.runs / "abc").iterdir()) == ["adapter", "receipt.json"]
    assert store.read() == {"abc": {"schema": 1, "key": "abc", "state": "done"}}
    store.work("def").mkdir()
    store.keep("def", {"state": "failed", "reason": "why"})
    assert not (store.runs / "def").exists() and not store.work("def").exists()
    store.forget("abc")
    assert set(store.read()) == {"def"} and not (store.runs / "abc").exists()


def test_numbers_that_json_does_not_have_are_never_written(made: ModuleType, tmp_path: Path) -> None:
    store = open_store(tmp_path / "grid", made.grid(), resume=False)
    with pytest.raises(ValueError, match="JSON"):
        store.keep("abc", {"state": "done", "x": float("nan")})
    assert store.read() == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 9, "state": "done"}', '{"schema": 1}'])
def test_a_garbled_cell_is_named(made: ModuleType, tmp_path: Path, text: str) -> None:
    store = open_store(tmp_path / "grid", made.grid(), resume=False)
    store.keep("abc", {"state": "done"})
    (store.path / "cells" / "abc.json").write_text(text)
    with pytest.raises(ConfigError, match=r"abc\.json .*remove it to run its cell again"):
        store.read()


def test_folders_that_cannot_be_used(made: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="no grid to resume"):
        open_store(tmp_path / "none", made.grid(), resume=True)
    open_store(tmp_path / "grid", made.grid(), resume=False)
    with pytest.raises(ConfigError, match="--resume"):
        open_store(tmp_path / "grid", made.grid(), resume=False)
    with pytest.raises(ResumeError, match=r"it differs in seeds, audit"):
        open_store(tmp_path / "grid", made.grid(seeds=[9], audit=False), resume=True)
    assert stored_grid(tmp_path / "grid") == made.grid()
    with pytest.raises(ConfigError, match=r"no grid\.toml"):
        stored_grid(tmp_path)
    (tmp_path / "grid" / "grid.toml").write_text("a = [")
    with pytest.raises(ConfigError, match="cannot be read"):
        stored_grid(tmp_path / "grid")


HOLD = "import sys, time; from pathlib import Path; from privfed_audits.grids.store import locked\n" + (
    "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
)


def test_one_process_at_a_time_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(ResumeError, match="Another process"), locked(tmp_path):
            pass
    finally:
        other.kill()
        other.communicate()
    with locked(tmp_path):
        pass


def test_what_was_under_way_goes(made: ModuleType, tmp_path: Path) -> None:
    store = Store(path=tmp_path)
    store.work("abc").mkdir(parents=True)
    store.shared.mkdir()
    store.clear()
    assert not store.work("abc").exists() and store.shared.exists()
    store.finish()
    assert not store.shared.exists()
    assert json.dumps(store.read()) == "{}"
