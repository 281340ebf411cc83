"""The tables of docs/results.md: test accuracy of five ways to tune, three seeds each, on three data sets.

    python benchmarks/results.py pydoc
    python benchmarks/results.py pydoc sst2 banking77 --data DIR   # DIR holds the files named in FILES
    python benchmarks/results.py                                   # print the table of everything run so far

Every cell is a shipped preset with the overrides named below, run as ``privfed train`` runs it; finished cells are kept
in benchmarks/results.jsonl and not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from shared_work import append_row, frozen_work, read_rows, share_frozen_work

STORE = Path(__file__).with_name("results.jsonl")
PRESETS = {"pydoc": "demo", "sst2": "sst2", "banking77": "banking77"}
FILES = {
    "sst2": ("sst2_train.jsonl.gz", "sst2_dev.jsonl.gz"),
    "banking77": ("banking77_train.jsonl.gz", "banking77_test.jsonl.gz"),
}
# without privacy there is no noise to share a budget over: plain local AdamW steps
PLAIN = [
    "privacy.unit=none",
    "privacy.target_epsilon=unset",
    "client.optimizer=adamw",
    "client.sampling_probability=unset",
    "client.batch_size=32",
    "server.optimizer=sgd",
    "server.learning_rate=1.0",
]
HEAD = [
    *PLAIN,
    "head_warm_start.name=none",
    "tuning.name=head",
    "client.learning_rate=2e-2",
    "client.local_steps=20",
    "client.physical_batch_size=64",
    "server.rounds=20",
    "server.evaluate_every=20",
    "server.momentum=0.5",
]
# both factors, in the blocks that the preset tunes, after the same (noiseless) warm start of the head
LORA = [*PLAIN, "client.learning_rate=2e-3", "client.head_learning_rate=5e-3", "server.momentum=0.0"]


def lora(layers: str, rounds: int, steps: int) -> list[str]:
    """Return the overrides of non-private LoRA on some blocks."""
    return [
        *LORA,
        "tuning.name=lora",
        'tuning.target_modules=["query", "value"]',
        f"tuning.layers_to_transform={layers}",
        f"server.rounds={rounds}",
        f"server.evaluate_every={rounds}",
        f"client.local_steps={steps}",
    ]


VARIANTS: dict[str, dict[str, list[str]]] = {
    "head only, no privacy": {"*": HEAD},
    "LoRA, no privacy": {"pydoc": lora("[5]", 10, 12), "sst2": lora("[4, 5]", 5, 8), "banking77": lora("[5]", 6, 8)},
    "epsilon 8": {"*": ["privacy.target_epsilon=8.0"]},
    "epsilon 2": {"*": ["privacy.target_epsilon=2.0"]},
}


def run_cell(data: str, variant: str, seed: int, source: Path | None) -> dict[str, Any]:
    """Run one cell through the same function as ``privfed train`` and return its row."""
    from privfed.config import load_config
    from privfed.run import train

    with tempfile.TemporaryDirectory() as folder:
        settings = [*VARIANTS[variant].get(data, VARIANTS[variant].get("*", [])), f"seed={seed}"]
        if data in FILES:
            settings += [f"data.path={source}/{FILES[data][0]}", f"data.test_path={source}/{FILES[data][1]}"]
            settings += [f"ledger.path={folder}/ledger.sqlite"]
        started = time.perf_counter()
        config = load_config(PRESETS[data], settings)
        receipt = train(config, out=Path(folder) / "run", shared=frozen_work()).receipt
        row = {"data": data, "variant": variant, "seed": seed, "epsilon": receipt["views"]["release"]["epsilon"]}
        row |= {**receipt["utility"], "seconds": round(time.perf_counter() - started, 1)}
        return row | {"config_digest": receipt["config_digest"]}


def table() -> str:
    """Return the table of the finished cells, as Markdown."""
    found = read_rows(STORE)
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
    parser.add_argument("data", nargs="*", choices=[*PRESETS, []])
    parser.add_argument("--data", dest="source", type=Path, help="folder with the data files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="run only this variant")
    options = parser.parse_args()
    if options.data:
        done = {(r["data"], r["variant"], r["seed"]) for r in read_rows(STORE)}
        todo = [
            (data, variant, seed)
            for seed in range(1, options.seeds + 1)
            for data in options.data
            for variant in VARIANTS
            if (data, variant, seed) not in done and options.only in (None, variant)
        ]
        with (
            tempfile.TemporaryDirectory() as shared,
            ProcessPoolExecutor(
                options.jobs, mp_context=get_context("spawn"), initializer=share_frozen_work, initargs=(shared,)
            ) as pool,
        ):
            for finished in as_completed([pool.submit(run_cell, *cell, options.source) for cell in todo]):
                row = finished.result()
                append_row(STORE, row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    print(table())


if __name__ == "__main__":
    main()
