"""A grid's time against that of its cells as separate commands: what sharing work saves.

    python benchmarks/curves.py                                        # a subset of the grid "quick"
    python benchmarks/curves.py --tunings LoRA head --codecs float32   # a smaller one
    python benchmarks/curves.py --grid paper -s data.path=... --tunings LoRA

Trains and audits the same cells twice, one after the other on one core each: as ``privfed curves -j 1``, and as one
``privfed train`` and one ``privfed audit`` a cell, in fresh processes. Prints wall and CPU times of both and a ratio;
fails if a cell's scores differ or the ratio of the CPU times is above 0.6.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from privfed_audits.grids.cells import Cell, cells, distinct
from privfed_audits.grids.grid import Grid, load_grid

MOST = 0.6
ENVIRONMENT = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Seconds by the clock, and of all processes together."""

    wall: float
    cpu: float


def spent(*commands: list[str]) -> Spent:
    """Run commands one after the other and return what they took."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in commands:
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(wall=time.perf_counter() - started, cpu=cpu)


def privfed(*arguments: str) -> list[str]:
    """Return a command of privfed."""
    return [sys.executable, "-m", "privfed.cli", *arguments]


def subset(options: argparse.Namespace) -> Grid:
    """Return the grid with some labels of its axes only."""
    grid = load_grid(options.grid, options.settings)
    tunings = {label: grid.tuning[label] for label in options.tunings or grid.tuning}
    codecs = {label: grid.codec[label] for label in options.codecs or grid.codec}
    when = [each for each in grid.when if not each.tuning or set(each.tuning) <= set(tunings)]
    changes = {"tuning": tunings, "codec": codecs, "when": when, "reference": "", "seeds": grid.seeds[:1]}
    return Grid.model_validate(grid.model_dump() | changes | {"when": [each.model_dump() for each in when]})


def one_by_one(runs: dict[str, Cell], folder: Path) -> tuple[Spent, dict[str, float]]:
    """Train and audit each run by commands of its own; return what they took and the accuracies."""
    commands, scores = [], {}
    for key, cell in runs.items():
        if cell.config is None:
            raise SystemExit(f"{cell.name} is refused: {cell.refusal}")
        (folder / f"{key}.toml").write_text(cell.config.to_toml(), encoding="utf-8")
        run = str(folder / key)
        ledger = ["--ledger", str(folder / f"{key}.sqlite")] if cell.config.data.path else []
        commands += [privfed("train", str(folder / f"{key}.toml"), "-o", run, *ledger), privfed("audit", run)]
    taken = spent(*commands)
    for key in runs:
        scores[key] = float(json.loads((folder / key / "receipt.json").read_text())["utility"]["accuracy"])
    return taken, scores


def main() -> None:
    """Measure both ways and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="quick")
    parser.add_argument("-s", dest="settings", action="append", default=[])
    parser.add_argument("--tunings", nargs="+", default=["LoRA", "FFA-LoRA"])
    parser.add_argument("--codecs", nargs="+", default=["float32", "8 bit"])
    options = parser.parse_args()
    grid = subset(options)
    runs = distinct(cells(grid))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "grid.toml").write_text(grid.to_toml(), encoding="utf-8")
        together = spent(privfed("curves", str(folder / "grid.toml"), "-o", str(folder / "grid"), "-j", "1"))
        apart, scores = one_by_one(runs, folder)
        with (folder / "grid" / "tables" / "cells.csv").open(encoding="utf-8") as file:
            found = {row["key"]: float(row["accuracy"]) for row in csv.DictReader(file)}
    differ = [key for key, score in scores.items() if abs(score - found[key]) > 1e-6]
    ratio = together.cpu / apart.cpu
    print(f"{len(runs)} runs        wall s   CPU s")
    print(f"one grid      {together.wall:8.1f} {together.cpu:7.1f}")
    print(f"one by one    {apart.wall:8.1f} {apart.cpu:7.1f}")
    print(f"ratio         {together.wall / apart.wall:8.2f} {ratio:7.2f}   (at most {MOST})")
    if differ:
        raise SystemExit(f"The scores of {differ} differ: shared work is not the same work.")
    if ratio > MOST:
        raise SystemExit(f"Sharing saves too little: {ratio:.2f} of the time of separate commands.")


if __name__ == "__main__":
    main()
