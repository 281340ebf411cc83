"""Every tuning on five data sets, without privacy and at epsilon 8: the tables "Tunings" of docs/results.md.

    python benchmarks/tunings.py --data DIR                      # DIR holds the files named in DATA, at any depth
    python benchmarks/tunings.py --data DIR sst2 --only lora ffa_lora --seeds 3
    python benchmarks/tunings.py --data DIR --search pneumonia   # the search for the learning rates, one data set
    python benchmarks/tunings.py                                 # print the tables of everything run so far

A cell is one ``privfed train``: a shipped preset with the overrides named here. All cells of a data set take the same
rows, clients, rounds, batches, clip and warm start of the head, and Adam on the server with one learning rate a family
of tunings; only what is trained differs. Finished cells are kept in benchmarks/tunings.jsonl and not run again;
what is refused is kept with its reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared_work import append_row, find_file, frozen_work, interval, read_rows, share_frozen_work, subset
from tuning_cells import DATA, MAIN, SEARCHED, SEARCHED_HEADS, WAYS, settings_of

STORE = Path(__file__).with_name("tunings.jsonl")
CACHE = Path("runs/tunings")


def model_of(data_name: str, source: Path) -> list[str]:
    """Return the override that names the base model, where it is no built-in; a small ViT is trained here once."""
    if data_name == "shakespeare":
        return [f"model.name={find_file(source, 'stories260k')}"]
    if data_name != "pneumonia":
        return []
    folder = CACHE / "small_vit"
    if not folder.exists():
        from privfed.pretrain import pretrain

        CACHE.mkdir(parents=True, exist_ok=True)
        pretrain("small_vit", [f"data.path={find_file(source, 'mnist_t10k.safetensors')}"], out=folder, say=print)
    return [f"model.name=./{folder}"]


def run_cell(
    label: str, data_name: str, epsilon: float | None, seed: int, source: Path, rate: float | None
) -> dict[str, Any]:
    """Run one cell and return its row."""
    from privfed.config import load_config
    from privfed.errors import PrivfedError
    from privfed.run import train

    data = DATA[data_name]
    row: dict[str, Any] = {"data": data_name, "tuning": label, "target_epsilon": epsilon, "seed": seed, "rate": rate}
    train_path, test_path = (subset(find_file(source, name), rows, CACHE) for name, rows in data.files)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            *settings_of(label, data_name, epsilon, rate),
            *model_of(data_name, source),
            f"data.path={train_path}",
            f"data.test_path={test_path}",
            f"ledger.path={folder}/ledger.sqlite",
            f"seed={seed}",
        ]
        try:
            config = load_config(data.preset, settings)
            receipt = train(config, out=Path(folder) / "run", shared=frozen_work()).receipt
        except PrivfedError as error:
            return row | {"refused": str(error), "cpu_seconds": round(time.process_time() - started, 1)}
        metrics = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    placed = config.privacy.placed if config.privacy.on else None
    return row | {
        "placement": placed,
        "spent": receipt["views"]["release"]["epsilon"],
        **receipt["utility"],
        **read_metrics(metrics),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def read_metrics(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a row takes from metrics.jsonl."""
    start = next(line for line in metrics if line["kind"] == "start")
    rounds = [line for line in metrics if line["kind"] == "round" and line["phase"] == "train"]
    probes = [line for line in metrics if line["kind"] == "eval" and line["phase"] == "warm_start"]
    last = [line for line in metrics if line["kind"] == "eval" and line["phase"] == "train"][-1]
    meter = [line for line in metrics if line["kind"] == "simulation"]
    return {
        "trained": start["trained_parameters"],
        "bytes_up": round(statistics.mean(line["bytes_up_per_client"] for line in rounds)),
        "dropped": sum(len(line["dropped"]) for line in rounds),
        "probe": probes[-1].get("accuracy") if probes else None,
        "clients_mean": last.get("clients_mean"),
        "meter": max((line["aggregation_error_relative"] for line in meter), default=None),
        "noise_product": max((line["noise_product"] or 0.0 for line in meter), default=None),
    }


def cells(options: argparse.Namespace) -> Iterator[tuple[str, str, float | None, int, float | None]]:
    """Yield (tuning, data, epsilon, seed, learning rate or None for its family's), what decides most first."""
    if options.search:
        for family, rates in {"head": SEARCHED_HEADS, **SEARCHED}.items():
            label = next(name for name, way in WAYS.items() if way.family == family and not way.local)
            for rate in rates:
                for epsilon in options.epsilons:
                    yield label, options.search, epsilon or None, 0, rate
        return
    for seed in range(1, options.seeds + 1):
        for label in options.only or WAYS:
            for data in options.datasets or DATA:
                for epsilon in options.epsilons:
                    if not (WAYS[label].local and DATA[data].unit == "client" and WAYS[label].rule == "fedavg"):
                        yield label, data, epsilon or None, seed, None


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what names a cell."""
    return tuple(row[name] for name in ("tuning", "data", "target_epsilon", "seed", "rate"))


def value_of(row: dict[str, Any]) -> float | None:
    """Return the row's score: of clients' own models where they have some, else of the one model."""
    if "refused" in row:
        return None
    personal = WAYS[row["tuning"]].rule == "fedsa_lora"
    found = row["clients_mean"] if personal else row[DATA[row["data"]].metric]
    return None if found is None else float(found)


def table(data_name: str, rows: list[dict[str, Any]]) -> str:
    """Return a data set's table, as Markdown."""
    mine = [row for row in rows if row["data"] == data_name and row["rate"] is None and row["target_epsilon"] in MAIN]
    epsilons = sorted({row["target_epsilon"] for row in mine}, key=lambda e: -1 if e is None else -e)
    heads = ["no privacy" if epsilon is None else f"epsilon {epsilon:g}" for epsilon in epsilons]
    lines = [f"| {data_name} | {' | '.join(heads)} | trained | kB up |", "|---" * (len(heads) + 3) + "|"]
    for label in WAYS:
        found = [row for row in mine if row["tuning"] == label]
        if not found:
            continue
        shown = [cell([row for row in found if row["target_epsilon"] == epsilon]) for epsilon in epsilons]
        done = [row for row in found if "refused" not in row]
        sent = [row["bytes_up"] for row in done if row["target_epsilon"]] or [row["bytes_up"] for row in done]
        size = f"{done[0]['trained']:,} | {sent[0] / 1000:.1f}" if done else "- | -"
        lines.append(f"| {label} | {' | '.join(shown)} | {size} |")
    return "\n".join(lines)


def cell(found: list[dict[str, Any]]) -> str:
    """Return what a table says of a cell's seeds."""
    refused = [row["refused"] for row in found if "refused" in row]
    if refused:
        return f"refused: {refused[0]}"
    values = [value for row in found if (value := value_of(row)) is not None]
    if not values:
        return "not run" if not found else "no figure"
    return interval(values, 2 if DATA[found[0]["data"]].metric == "perplexity" else 3)


def comparison(rows: list[dict[str, Any]]) -> str:
    """Return FFA-LoRA against FedIT where each client adds its whole noise, as Markdown."""
    names = [f"{name}, local noise" for name in ("ffa_lora", "lora (FedIT)")]
    mine = [row for row in rows if row["tuning"] in names and row["rate"] is None and row["target_epsilon"]]
    groups = sorted({(row["data"], -row["target_epsilon"]) for row in mine})
    lines = [f"| data | epsilon | {' | '.join(names)} | difference, seed by seed |", "|---|---|---|---|---|"]
    for data, minus in groups:
        found = [{row["seed"]: value_of(row) for row in mine if key(row)[:3] == (name, data, -minus)} for name in names]
        both = sorted(found[0].keys() & found[1].keys())
        cells = [interval([float(each[seed] or 0) for seed in both]) for each in found if both]
        gaps = [float(found[0][seed] or 0) - float(found[1][seed] or 0) for seed in both]
        if both:
            lines.append(f"| {data} | {-minus:g} | {' | '.join(cells)} | {interval(gaps)} |")
    return "\n".join(lines)


def meters(rows: list[dict[str, Any]]) -> str:
    """Return the largest relative reading of the meter by tuning."""
    lines = ["| tuning | runs | largest ‖mean(BA) - mean(B) mean(A)‖ / ‖mean(BA)‖ |", "|---|---|---|"]
    for label in WAYS:
        found = [row["meter"] for row in rows if row["tuning"] == label and row.get("meter") is not None]
        if found:
            lines.append(f"| {label} | {len(found)} | {max(found):.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*", choices=[*DATA, []])
    parser.add_argument("--data", dest="source", type=Path, help="folder with the data files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[8.0, 0.0], help="0 for no privacy")
    parser.add_argument("--only", nargs="+", choices=WAYS, help="run only these tunings")
    parser.add_argument("--search", choices=DATA, help="search the families' learning rates on this data set")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after so long")
    options = parser.parse_args()
    if options.source:
        done, started = {key(row) for row in read_rows(STORE)}, time.monotonic()
        CACHE.mkdir(parents=True, exist_ok=True)
        share_frozen_work(str(CACHE))
        for each in cells(options):
            if each in done or time.monotonic() - started > 60 * options.minutes:
                continue
            row = run_cell(*each[:4], options.source, each[4])
            append_row(STORE, row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    rows = read_rows(STORE)
    print(
        "\n\n".join(
            [
                *(table(name, rows) for name in DATA if any(r["data"] == name for r in rows)),
                comparison(rows),
                meters(rows),
            ]
        )
    )


if __name__ == "__main__":
    main()
