"""The tables of docs/results.md: test accuracy of five ways to tune, three seeds each, on three data sets.

    python benchmarks/results.py pydoc
    python benchmarks/results.py sst2 --data DIR       # DIR holds sst2_train.jsonl.gz and sst2_dev.jsonl.gz
    python benchmarks/results.py banking77 --data DIR
    python benchmarks/results.py --table               # print the table of everything run so far

Every cell is a ``privfed train`` of a shipped preset with the overrides named below; finished cells are kept in
benchmarks/results.jsonl and not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STORE = Path(__file__).with_name("results.jsonl")
PRESETS = {"pydoc": "demo", "sst2": "sst2", "banking77": "banking77"}
FILES = {
    "sst2": ("sst2_train.jsonl.gz", "sst2_dev.jsonl.gz"),
    "banking77": ("banking77_train.jsonl.gz", "banking77_test.jsonl.gz"),
}
# without privacy there is no noise to share a budget over: plain local AdamW, and LoRA with both factors
PLAIN = [
    "privacy.unit=none",
    "privacy.target_epsilon=unset",
    "head_warm_start.name=none",
    "client.optimizer=adamw",
    "client.sampling_probability=unset",
    "client.batch_size=32",
    "server.optimizer=sgd",
    "server.learning_rate=1.0",
]
LORA = [*PLAIN, "tuning.name=lora", "client.learning_rate=2e-3", "client.head_learning_rate=5e-3"]
HEAD = [
    *PLAIN,
    "tuning.name=head",
    "client.learning_rate=2e-2",
    "client.head_learning_rate=unset",
    "client.local_steps=20",
    "server.rounds=20",
    "server.evaluate_every=20",
    "client.physical_batch_size=64",
]
VARIANTS = {
    "head only, no privacy": {"*": HEAD},
    "LoRA, no privacy": {
        "pydoc": [*LORA, "server.rounds=4", "client.local_steps=25", "server.evaluate_every=4"],
        "sst2": [*LORA, "server.rounds=3", "client.local_steps=12", "server.evaluate_every=3"],
        "banking77": [*LORA, "server.rounds=6", "client.local_steps=12", "server.evaluate_every=6"],
    },
    "epsilon 8": {"*": ["privacy.target_epsilon=8.0"]},
    "epsilon 2": {"*": ["privacy.target_epsilon=2.0"]},
}


def command(data: str, variant: str, seed: int, folder: str, source: Path | None) -> list[str]:
    """Return the ``privfed train`` command of a cell."""
    settings = VARIANTS[variant].get(data, VARIANTS[variant].get("*", []))
    settings = [*settings, f"seed={seed}"]
    if data in FILES:
        train, test = FILES[data]
        settings += [f"data.path={source}/{train}", f"data.test_path={source}/{test}"]
        settings += [f"ledger.path={folder}/ledger.sqlite"]
    parts = [sys.executable, "-m", "privfed.cli", "train", PRESETS[data], "-o", f"{folder}/run", "--json"]
    for setting in settings:
        parts += ["-s", setting]
    return parts


def run_cell(data: str, variant: str, seed: int, source: Path | None) -> dict[str, object]:
    """Run one cell and return its row."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        done = subprocess.run(
            command(data, variant, seed, folder, source), capture_output=True, text=True, env=environment, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{data}, {variant}, seed {seed}: {done.stdout[-500:]} {done.stderr[-500:]}")
        receipt = json.loads(done.stdout)["receipt"]
        epsilon = receipt["views"]["release"]["epsilon"]
        row = {"data": data, "variant": variant, "seed": seed, "epsilon": epsilon, **receipt["utility"]}
        row["seconds"] = round(time.perf_counter() - started, 1)
        row["config_digest"] = receipt["config_digest"]
        return row


def rows() -> list[dict[str, object]]:
    """Return the finished cells."""
    if not STORE.exists():
        return []
    return [json.loads(line) for line in STORE.read_text().splitlines()]


def table() -> str:
    """Return the table of the finished cells, as Markdown."""
    found = rows()
    lines = ["| data | majority | " + " | ".join(VARIANTS) + " |", "|---|---|" + "---|" * len(VARIANTS)]
    for data in PRESETS:
        mine = [r for r in found if r["data"] == data]
        if not mine:
            continue
        cells = []
        for variant in VARIANTS:
            scores = [float(str(r["accuracy"])) for r in mine if r["variant"] == variant]
            spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
            cells.append(f"{statistics.mean(scores):.3f}{spread} ({len(scores)})" if scores else "not run")
        lines.append(f"| {data} | {mine[0]['majority']:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", choices=list(PRESETS))
    parser.add_argument("--data", dest="source", type=Path, help="folder with the data files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="run only this variant")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.data:
        done = {(r["data"], r["variant"], r["seed"]) for r in rows()}
        todo = [
            (options.data, variant, seed)
            for seed in range(1, options.seeds + 1)
            for variant in VARIANTS
            if (options.data, variant, seed) not in done and options.only in (None, variant)
        ]
        with ThreadPoolExecutor(options.jobs) as pool:
            for row in pool.map(lambda cell: run_cell(*cell, options.source), todo):
                with STORE.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), file=sys.stderr, flush=True)
    print(table())


if __name__ == "__main__":
    main()
