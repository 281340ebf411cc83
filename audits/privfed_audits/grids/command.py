"""``privfed curves``: run a grid, or the rest of one, and show what it says."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from privfed_audits.grids.cells import Cell, cells, distinct
from privfed_audits.grids.grid import Grid, load_grid
from privfed_audits.grids.page.write import write_figures, write_page
from privfed_audits.grids.recommend import Constraint, parse, recommend, write_runs
from privfed_audits.grids.results import CONTRADICTED, Results, results
from privfed_audits.grids.schedule import Progress, run_all
from privfed_audits.grids.store import Store, locked, open_store
from privfed_audits.grids.tables import tables, write_tables

# while cells are running, the page is written anew at most this often, and for at most this share of the time
EARLY_LOOK_SECONDS = 10.0
EARLY_LOOK_SHARE = 0.05
Say = Callable[[str], None]


def curves(
    source: str | Mapping[str, Any],
    *,
    out: Path,
    settings: Sequence[str] = (),
    resume: bool = False,
    jobs: int | None = None,
    constraints: str | None = None,
    say: Say = lambda _line: None,
) -> dict[str, Any]:
    """Run a grid and write its page, tables and figures.

    Args:
        source: A TOML file, a preset, or the tables of a grid.
        out: The grid's folder: new, or with ``resume`` the one to continue.
        settings: More settings for every cell, ``key=value``; a resumed grid needs the same.
        resume: Continue the grid; its finished cells stand, failed ones are run again.
        jobs: At most so many cells at once; None for as many as there are cores and memory for.
        constraints: Recommend under these, and write the run.toml of the best.
        say: Told how far it is.

    Returns:
        What came of it, as ``--json`` prints it.

    Raises:
        ConfigError: If the grid, the constraints or the folder cannot be used.
    """
    asked = parse(constraints) if constraints is not None else ()
    grid = load_grid(source, settings)
    found = cells(grid)
    store = open_store(out, grid, resume=resume)
    with locked(out):
        store.clear()
        _run(grid, found, store, jobs, say)
        done = results(grid, found, store.read())
        show(done, store)
        write_figures(done, out / "figures")
        store.finish()
    return summary(done, out, asked)


def show(found: Results, store: Store) -> None:
    """Write the tables and the page as they stand."""
    made = tables(found)
    write_tables(made, store.path / "tables")
    write_page(found, made, store.path / "curves.html")


def summary(found: Results, out: Path, asked: tuple[Constraint, ...] = ()) -> dict[str, Any]:
    """Return what came of a grid, with the recommendation, whose run.toml files are written."""
    states = [found.state(cell) for cell in found.cells]
    answer: dict[str, Any] = {
        "folder": str(out),
        "page": str(out / "curves.html"),
        "cells": len(found.cells),
        **{state: states.count(state) for state in ("done", "refused", "failed")},
        "contradicted": [cell.name for cell, state, _ in found.troubles() if state == CONTRADICTED],
        "choice": None if found.choice is None else found.choice.sentence,
        "recommendation": None,
    }
    if asked:
        advice = recommend(found.settings, asked, found.utility)
        paths = write_runs(advice.best, out / "recommended")
        answer["recommendation"] = {
            "lines": list(advice.lines),
            "best": [each.name for each in advice.best],
            "files": [str(path) for path in paths],
        }
    return answer


def lines(answer: dict[str, Any]) -> list[str]:
    """Return the answer in words."""
    counted = f"{answer['done']} of {answer['cells']} done, {answer['refused']} refused, {answer['failed']} failed."
    found = [f"Cells:      {counted}", f"Page:       {answer['page']}"]
    if answer["contradicted"]:
        found.append(f"CONTRADICTED: the audit proves more than is promised of {'; '.join(answer['contradicted'])}.")
    if answer["choice"]:
        found.append(f"To take:    {answer['choice']}")
    advice = answer["recommendation"]
    if advice is not None:
        found += advice["lines"]
        found += [f"Written:    {path}" for path in advice["files"]]
    return found


def _run(grid: Grid, found: tuple[Cell, ...], store: Store, jobs: int | None, say: Say) -> None:
    """Run what is not finished; failed cells get another chance."""
    runs, records = distinct(found), store.read()
    for key, record in records.items():
        if record["state"] == "failed" and key in runs:
            store.forget(key)
    left = {key: cell for key, cell in runs.items() if records.get(key, {}).get("state") not in ("done", "refused")}
    refused = sum(cell.config is None for cell in found)
    say(
        f"{len(found)} cells, {refused} refused by their configuration, {len(runs)} different runs, "
        f"{len(runs) - len(left)} finished before."
    )
    progress = Progress(total=len(runs), done=len(runs) - len(left))
    shown = _Shown(grid, found, store)

    def finished(key: str, state: str, _seconds: float) -> None:
        note = "" if state == "done" else f" {state.upper()}: {store.read()[key].get('reason', '')}"
        say(f"{progress.line()}. {runs[key].name}{note}")
        if progress.done < progress.total:
            shown.now_and_then()

    todo = {key: cell.config.to_toml() for key, cell in left.items() if cell.config is not None}
    run_all(todo, store, jobs=jobs, audit=grid.audit, attacks=grid.attacks, finished=finished, progress=progress)


class _Shown:
    """Rebuilds the page while cells are running, but not all the time."""

    def __init__(self, grid: Grid, found: tuple[Cell, ...], store: Store) -> None:
        self._grid, self._cells, self._store = grid, found, store
        self._next = 0.0

    def now_and_then(self) -> None:
        """Write the page, unless it was written just now."""
        started = time.monotonic()
        if started < self._next:
            return
        show(results(self._grid, self._cells, self._store.read()), self._store)
        took = time.monotonic() - started
        self._next = time.monotonic() + max(EARLY_LOOK_SECONDS, took / EARLY_LOOK_SHARE)


__all__ = ["curves", "lines", "show", "summary"]
