"""A grid's folder: what is kept of each finished cell, so that a grid can be killed at any time and resumed.

grid.toml      the grid, every default included
cells/KEY.json what one run gave, written whole when it is finished
runs/KEY/      of its run folder what is small: configuration, receipt, metrics, adapter, ledger, audit
work/          runs under way; emptied when the grid starts
shared/        what the cells' processes share; removed when the grid is through
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privfed.errors import ConfigError, ResumeError
from privfed.files import write_atomic
from privfed_audits.grids.grid import Grid, parse_grid

Record = dict[str, Any]
DROPPED = ("checkpoint", "transcript", "clients")
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A grid's folder on disk."""

    path: Path

    @property
    def shared(self) -> Path:
        """What the cells' processes share."""
        return self.path / "shared"

    @property
    def runs(self) -> Path:
        """What is kept of run folders."""
        return self.path / "runs"

    def work(self, key: str) -> Path:
        """Return the folder of a run that is under way."""
        return self.path / "work" / key

    def read(self) -> dict[str, Record]:
        """Return the finished cells by key.

        Raises:
            ConfigError: If a file of a cell is garbled: files are written whole, so somebody changed it.
        """
        return {path.stem: _read(path) for path in sorted((self.path / "cells").glob("*.json"))}

    def keep(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep what a cell gave; whoever reads sees all of it or nothing.

        The small files of its run folder are moved first, so that a kept cell has them.
        """
        work, run = self.work(key), self.runs / key
        if record["state"] != "done":
            shutil.rmtree(work, ignore_errors=True)
        elif work.exists():
            for name in DROPPED:
                shutil.rmtree(work / name, ignore_errors=True)
            shutil.rmtree(run, ignore_errors=True)
            run.parent.mkdir(exist_ok=True)
            work.replace(run)
        folder = self.path / "cells"
        folder.mkdir(exist_ok=True)
        content = {"schema": SCHEMA, "key": key, **record}
        write_atomic(folder / f"{key}.json", (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def forget(self, key: str) -> None:
        """Drop a cell, which is to be run again."""
        (self.path / "cells" / f"{key}.json").unlink(missing_ok=True)
        shutil.rmtree(self.runs / key, ignore_errors=True)

    def clear(self) -> None:
        """Remove what runs left that were killed."""
        shutil.rmtree(self.path / "work", ignore_errors=True)

    def finish(self) -> None:
        """Remove what only running cells need."""
        self.clear()
        shutil.rmtree(self.shared, ignore_errors=True)


def open_store(path: Path, grid: Grid, *, resume: bool) -> Store:
    """Return the folder of a grid, made or, with ``resume``, the one that is there.

    Raises:
        ConfigError: If a new grid's folder is not empty.
        ResumeError: If there is no grid to resume, or it is another one.
    """
    described = path / "grid.toml"
    if resume:
        if not described.is_file():
            raise ResumeError(f"There is no grid to resume in {path}: leave --resume out to start one.")
        stored = stored_grid(path)
        changed = [key for key in Grid.model_fields if getattr(stored, key) != getattr(grid, key)]
        if changed:
            raise ResumeError(
                f"The grid in {path} is another one (it differs in {', '.join(changed)}): resume with the same one, "
                "or take another folder."
            )
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is not empty: continue the grid in it with --resume, or take another folder (-o).")
    path.mkdir(parents=True, exist_ok=True)
    write_atomic(described, grid.to_toml().encode())
    return Store(path=path)


def stored_grid(path: Path) -> Grid:
    """Return the grid of a folder.

    Raises:
        ConfigError: If there is none, or it is garbled.
    """
    described = path / "grid.toml"
    try:
        raw = tomllib.loads(described.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is not the folder of a grid: it has no grid.toml.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{described} cannot be read: {error}.") from error
    return parse_grid(raw, where=str(described))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a folder for one grid at a time; the system lets go when the process ends, however it does.

    Raises:
        ResumeError: If another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with (path / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ResumeError(f"Another process runs the grid in {path}: wait for it, or stop it first.") from error
        yield


def _read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error}): remove it to run its cell again.") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA or "state" not in record:
        raise ConfigError(f"{path} is not a finished cell of format {SCHEMA}: remove it to run its cell again.")
    return record
