"""Cells of the benchmarks of attacks: one batch of texts under one attack each, kept when it is done and not run again.

Every row of benchmarks/attacks.jsonl names its table, cell, attack and batch, and a digest of the scene and of the
attack's options: a row of other settings is not taken for one of these. A benchmark that was interrupted, or is asked
for more batches, goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from attacks_victims import Scene, Victims
from shared_work import append_row, read_rows

from privfed_attacks.inversion import ATTACKS, Reconstruction, Setting
from privfed_attacks.observation import Observation
from privfed_attacks.scoring import score_texts

STORE = Path(__file__).with_name("attacks.jsonl")
SHOWN = ("token_recall", "token_precision", "bag_recall", "rougeL", "exact")
Outside = Callable[[Sequence[Observation], Any, Setting], Reconstruction]


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """One attack as it is run.

    Attributes:
        name: What the table calls it.
        attack: Its name in the registry, or a function from elsewhere that takes the same.
        options: Its options.
        skip: Observed rounds that it does not get, the first ones.
    """

    name: str
    attack: str | Outside
    options: Mapping[str, Any] = field(default_factory=dict)
    skip: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One line of a table.

    Attributes:
        table: Which table.
        name: Which line.
        scene: What is attacked.
        tries: How.
    """

    table: str
    name: str
    scene: Scene
    tries: tuple[Try, ...]


def run_cells(cells: Iterable[Cell], batches: int, budget: float) -> None:
    """Run what is missing of some cells, until ``budget`` seconds of the processor are spent."""
    started = time.process_time()
    for cell in cells:
        missing = [(seed, each) for seed in range(batches) for each in cell.tries if not _done(cell, each, seed)]
        if not missing:
            continue
        victims = Victims(cell.scene)
        for seed in sorted({seed for seed, _ in missing}):
            played = victims.play(seed)
            for each in [one for number, one in missing if number == seed]:
                if time.process_time() - started > budget:
                    print(f"stopped after {budget:.0f} s: call again to go on", file=sys.stderr)
                    return
                row = {**_key(cell, each, seed), **_scored(victims, each, played)}
                append_row(STORE, row)
                print(json.dumps(row), file=sys.stderr, flush=True)


def table(cells: Iterable[Cell], shown: Sequence[str] = ("token_recall", "token_precision", "bag_recall")) -> str:
    """Return the finished rows of some cells as a table: means with 95 % bootstrap intervals over batches."""
    rows = read_rows(STORE)
    lines = [f"| scene | attack | batches | {' | '.join(name.replace('_', ' ') for name in shown)} | CPU s |"]
    lines.append("|" + "---|" * (4 + len(shown)))
    for cell in cells:
        for each in cell.tries:
            key = {name: value for name, value in _key(cell, each, 0).items() if name != "batch"}
            mine = [row for row in rows if all(row.get(name) == value for name, value in key.items())]
            if mine:
                parts = [mean_text([row[name] for row in mine]) for name in shown]
                seconds = np.mean([row["cpu_seconds"] for row in mine])
                lines.append(f"| {cell.name} | {each.name} | {len(mine)} | {' | '.join(parts)} | {seconds:.1f} |")
    return "\n".join(lines)


def means(cell: Cell, name: str, key: str) -> list[float]:
    """Return one score of one attack on a cell's finished batches."""
    each = next(one for one in cell.tries if one.name == name)
    wanted = _key(cell, each, 0)
    return [
        float(row[key])
        for row in read_rows(STORE)
        if all(row.get(field) == value for field, value in wanted.items() if field != "batch")
    ]


def _key(cell: Cell, each: Try, seed: int) -> dict[str, Any]:
    settings = json.dumps([asdict(cell.scene), dict(each.options), each.skip], sort_keys=True, default=str)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    return {"table": cell.table, "cell": cell.name, "attack": each.name, "settings": digest, "batch": seed}


def _done(cell: Cell, each: Try, seed: int) -> bool:
    key = _key(cell, each, seed)
    return any(all(row.get(name) == value for name, value in key.items()) for row in read_rows(STORE))


def _scored(victims: Victims, each: Try, played: Any) -> dict[str, Any]:
    seen, truth, setting = played
    started = time.process_time()
    if callable(each.attack):
        guess = each.attack(seen[each.skip :], victims.model, setting)
    else:
        plugin = ATTACKS.get(each.attack)
        options = plugin.config.model_validate(dict(each.options))
        guess = plugin.run(seen[each.skip :], victims.model, setting, options)
    seconds = round(time.process_time() - started, 2)
    scores = score_texts(guess, truth, victims.model.tokenizer)
    facts = {name: value for name, value in guess.facts.items() if name in ("rank", "members", "left", "loss")}
    return {**{name: round(scores[name], 4) for name in SHOWN}, **facts, "cpu_seconds": seconds}


def mean_text(values: Sequence[float], draws: int = 2000) -> str:
    """Return the mean with its 95 % bootstrap interval."""
    given = np.asarray(values)
    sample = given[np.random.default_rng(0).integers(0, len(given), (draws, len(given)))].mean(axis=1)
    low, high = np.quantile(sample, [0.025, 0.975])
    return f"{given.mean():.3f} [{low:.2f}, {high:.2f}]"
