"""Utility of the client-level mechanisms at one (epsilon, delta): FedAvg over the users of Stack Exchange.

    python benchmarks/client_level.py --data DIR                 # DIR holds the two files named in FILES
    python benchmarks/client_level.py --data DIR --tuning ffa_lora --rounds 60
    python benchmarks/client_level.py --data DIR --clips 0.1 1 10   # how much a badly chosen clip costs
    python benchmarks/client_level.py --data DIR --memory 100 1000 10000   # peak memory by number of clients
    python benchmarks/client_level.py                            # print the table of everything run so far

Every cell is the preset "stackexchange" (1,727 users, cohorts of 100) with one mechanism, run as ``privfed train`` runs
it. Finished cells are kept in benchmarks/client_level.jsonl and not run again. Correlated noise takes the number of
bands of which the accountant and ``running_error`` say, before any data is read, that the least noise stays.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from shared_work import append_row, find_file, frozen_work, interval, read_rows, share_frozen_work, subset

STORE = Path(__file__).with_name("client_level.jsonl")
FILES = ("stackexchange_train.jsonl.gz", "stackexchange_test.jsonl.gz")
VARIANTS = ("no privacy", "gaussian", "adaptive_clipping", "banded", "banded, scheduled turns")
LORA = [
    "tuning.name=ffa_lora",
    "tuning.r=8",
    'tuning.target_modules=["query", "value"]',
    "tuning.layers_to_transform=[4, 5]",
    "head_warm_start.name=dp_probe",
    "head_warm_start.rounds=40",
    "head_warm_start.optimizer=sgd",
    "head_warm_start.learning_rate=1.0",
    "head_warm_start.local_steps=2",
    "head_warm_start.server_learning_rate=2.0",
    "client.learning_rate=0.1",
    "client.physical_batch_size=16",
]

MEMORY_ROWS = 12_000
MEMORY_TEST_ROWS = 64
# adapters of the last block through the whole model, so that a round holds what training holds
MEMORY = [
    "model.max_length=32",
    "model.cache_frozen_gib=0",
    "tuning.name=ffa_lora",
    "tuning.r=8",
    'tuning.target_modules=["query", "value"]',
    "tuning.layers_to_transform=[5]",
    "client.learning_rate=0.1",
    "client.batch_size=4",
    "client.local_steps=1",
    "server.rounds=2",
    "server.evaluate_every=2",
    "server.cohort_size=100",
    "privacy.target_epsilon=unset",
    "privacy.noise_multiplier=1.0",
    "privacy.accountant=rdp",
    "privacy.mechanism=gaussian",
]


@cache
def best_bands(epsilon: float, rounds: int, cohort: int, clients: int) -> tuple[int, float]:
    """Return the number of bands with the least noise left in the model, and that noise in clips."""
    from privfed.privacy.config import PrivacyConfig
    from privfed.privacy.mechanisms import built
    from privfed.privacy.plan import PhasePlan, make_plan

    phase = PhasePlan(
        name="train",
        rounds=rounds,
        cohort_size=cohort,
        clients=clients,
        local_steps=1,
        probabilities={"*": 1.0},
    )
    found = {}
    most = clients // cohort
    for bands in sorted({min(bands, most) for bands in (1, 2, 4, 8, 12, most)}):
        privacy = PrivacyConfig(unit="client", target_epsilon=epsilon, mechanism={"name": "banded", "bands": bands})
        noise = make_plan(privacy, [phase], masks=None).noise_multiplier
        found[bands] = built(privacy.mechanism).running_error(phase, noise)
    return min(found.items(), key=lambda entry: entry[1])


def settings_of(variant: str, options: argparse.Namespace, clients: int) -> list[str]:
    """Return the overrides of a variant."""
    if variant == "no privacy":
        return ["privacy.unit=none", "privacy.target_epsilon=unset", "privacy.mechanism=gaussian"]
    if not variant.startswith("banded"):
        return [f"privacy.mechanism={variant}"]
    if variant == "banded":
        bands, _ = best_bands(options.epsilon, options.rounds, options.cohort, clients)
        return ["privacy.mechanism=banded", f"privacy.mechanism.bands={bands}"]
    bands = clients // options.cohort
    return ["privacy.mechanism=banded", "privacy.mechanism.sampling=min_separation", f"privacy.mechanism.bands={bands}"]


def base(options: argparse.Namespace, clip: float, seed: int) -> list[str]:
    """Return the overrides that all variants share."""
    found = [
        f"data.path={find_file(options.source, FILES[0])}",
        f"data.test_path={find_file(options.source, FILES[1])}",
        f"server.rounds={options.rounds}",
        f"server.cohort_size={options.cohort}",
        f"server.evaluate_every={options.rounds}",
        f"privacy.target_epsilon={options.epsilon}",
        f"privacy.l2_clip_norm={options.clip * clip}",
        f"seed={seed}",
        *(LORA if options.tuning == "ffa_lora" else []),
        *options.set,
    ]
    return found + ([f"data.limit={options.limit}"] if options.limit else [])


def run_cell(variant: str, clip: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one cell and return its row."""
    from privfed.config import load_config
    from privfed.federation.material import gather
    from privfed.run import train

    common = base(options, clip, seed)
    clients = len(gather(load_config("stackexchange", common)).shards)
    with tempfile.TemporaryDirectory() as folder:
        mine = [*common, *settings_of(variant, options, clients), f"ledger.path={folder}/ledger.sqlite"]
        started = time.perf_counter()
        receipt = train(load_config("stackexchange", mine), out=Path(folder) / "run").receipt
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rounds = [record for record in map(json.loads, lines) if record["kind"] == "round"]
    return {
        **key(variant, clip, seed, options),
        "clients": clients,
        "spent": receipt["views"]["release"]["epsilon"],
        "events": [{k: v for k, v in event.items() if k != "parameters"} for event in receipt["events"]],
        **receipt["utility"],
        "last_terms": rounds[-1]["terms"],
        "seconds": round(time.perf_counter() - started, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "config_digest": receipt["config_digest"],
    }


def key(variant: str, clip: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return what names a cell."""
    return {
        "variant": variant,
        "tuning": options.tuning,
        "epsilon": None if variant == "no privacy" else options.epsilon,
        "rounds": options.rounds,
        "cohort": options.cohort,
        "clip": options.clip * clip,
        "limit": options.limit,
        "set": options.set,
        "seed": seed,
    }


def dealt(path: Path, clients: int, rows: int, folder: Path) -> Path:
    """Return a file of as many rows of ``path``, user by user, dealt out to so many clients in runs of equal length.

    A client has posts of one user, or of neighbours where users have few. The rows are the same for every number of
    clients; where the file has fewer they come again with a number in front, for equal rows would be one.
    """
    found = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    found.sort(key=lambda row: str(row["client_id"]))
    lines = []
    for number in range(rows):
        row = found[number % len(found)]
        text = row["text"] if number < len(found) else f"{number} {row['text']}"
        lines.append(json.dumps({**row, "text": text, "client_id": f"user{number * clients // rows:05d}"}))
    out = folder / f"{clients}-clients.jsonl"
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def memory(clients: int, source: Path) -> dict[str, Any]:
    """Train on the same rows in the hands of so many clients; return this process's peak memory."""
    from privfed.config import load_config
    from privfed.run import train

    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"data.path={dealt(find_file(source, FILES[0]), clients, MEMORY_ROWS, Path(folder))}",
            f"data.test_path={subset(find_file(source, FILES[1]), MEMORY_TEST_ROWS, Path(folder))}",
            f"ledger.path={folder}/ledger.sqlite",
            *MEMORY,
        ]
        started = time.perf_counter()
        receipt = train(load_config("stackexchange", settings), out=Path(folder) / "run", shared=frozen_work()).receipt
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    spent = receipt["views"]["release"]["epsilon"]
    return {"clients": clients, "rows": MEMORY_ROWS, "peak_mib": round(peak), "seconds": round(seconds), "spent": spent}


def memory_table(numbers: list[int], source: Path) -> str:
    """Run each number of clients in a process of its own and return their peaks as Markdown."""
    command = [sys.executable, __file__, "--data", str(source), "--json", "--memory"]
    found = []
    for clients in sorted(numbers):
        done = subprocess.run([*command, str(clients)], check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout))
        print(done.stdout.strip(), file=sys.stderr, flush=True)
    lines = ["| clients | rows | peak memory (MiB) | seconds |", "|---|---|---|---|"]
    lines += [f"| {row['clients']:,} | {row['rows']:,} | {row['peak_mib']:,} | {row['seconds']} |" for row in found]
    return "\n".join(lines)


def table() -> str:
    """Return the table of the finished cells, as Markdown."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    names = ("tuning", "epsilon", "rounds", "cohort", "clients", "clip", "variant")
    for row in read_rows(STORE):
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    lines = [f"| {' | '.join(names)} | accuracy | macro F1 |", "|---" * (len(names) + 2) + "|"]
    for group, found in groups.items():
        cells = [interval([row[score] for row in found]) for score in ("accuracy", "macro_f1")]
        shown = ["-" if value is None else f"{value:g}" if isinstance(value, float) else str(value) for value in group]
        lines.append(f"| {' | '.join([*shown, *cells])} |")
    if groups:
        lines.append(f"\nMajority class: {read_rows(STORE)[-1]['majority']:.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", dest="source", type=Path, help="folder with the data files")
    parser.add_argument("--tuning", choices=["head", "ffa_lora"], default="head")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--clip", type=float, default=1.0, help="the clip, or with adaptive clipping the first one")
    parser.add_argument("--clips", type=float, nargs="+", default=[1.0], help="factors on the clip, a cell for each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="train on so many rows only, to try it out")
    parser.add_argument("--only", choices=VARIANTS, action="append", help="run only this variant (may be repeated)")
    parser.add_argument("-s", "--set", action="append", default=[], help="a further override of the preset, key=value")
    parser.add_argument("--memory", type=int, nargs="+", help="peak memory with so many clients, instead of the cells")
    parser.add_argument("--json", action="store_true", help="one number of clients: print its figures as JSON")
    options = parser.parse_args()
    if options.memory:
        if options.json and len(options.memory) == 1:
            print(json.dumps(memory(options.memory[0], options.source)))
        else:
            print(memory_table(options.memory, options.source))
        return
    if options.source:
        done = [{name: row[name] for name in key("", 1.0, 0, options)} for row in read_rows(STORE)]
        with tempfile.TemporaryDirectory() as shared:
            share_frozen_work(shared)
            for seed in range(1, options.seeds + 1):
                for variant in options.only or VARIANTS:
                    for clip in options.clips if variant != "no privacy" else [1.0]:
                        if key(variant, clip, seed, options) in done:
                            continue
                        row = run_cell(variant, clip, seed, options)
                        append_row(STORE, row)
                        print(json.dumps(row), file=sys.stderr, flush=True)
    print(table())


if __name__ == "__main__":
    main()
