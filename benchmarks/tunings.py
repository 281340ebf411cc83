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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared_work import append_row, find_file, interval, read_rows, share_frozen_work, subset

STORE = Path(__file__).with_name("tunings.jsonl")
CACHE = Path("runs/tunings")


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """One data set.

    Attributes:
        preset: The preset whose model, data, partition and warm start are taken.
        files: Training and test file, and of how many rows each a fixed subset is taken (0 for all).
        settings: Overrides of the preset.
        blocks: Which transformer blocks are tuned; empty for all, by each tuning's own default.
        targets: Names of the query and value layers.
        unit: The privacy unit.
        metric: What is shown.
    """

    preset: str
    files: tuple[tuple[str, int], tuple[str, int]]
    settings: tuple[str, ...]
    blocks: tuple[int, ...] = ()
    targets: tuple[str, ...] = ("query", "value")
    unit: str = "example"
    metric: str = "accuracy"


DATA = {
    "sst2": Data(
        preset="sst2",
        files=(("sst2_train.jsonl.gz", 8000), ("sst2_dev.jsonl.gz", 0)),
        settings=(
            "data.limit=unset",
            "partition.clients=10",
            "client.sampling_probability=0.06",
            "server.rounds=10",
            "head_warm_start.rounds=20",
            "head_warm_start.server_learning_rate=0.1",
        ),
        blocks=(5,),
    ),
    "medquad": Data(
        preset="medquad",
        files=(("medquad_train.jsonl.gz", 3000), ("medquad_test.jsonl.gz", 800)),
        settings=(
            "model.max_length=40",
            "client.sampling_probability=0.1",
            "server.rounds=8",
            "head_warm_start.rounds=20",
        ),
        blocks=(5,),
    ),
    "stackexchange": Data(
        preset="stackexchange",
        files=(("stackexchange_train.jsonl.gz", 0), ("stackexchange_test.jsonl.gz", 800)),
        settings=(
            "model.max_length=32",
            "server.rounds=8",
            "client.local_steps=1",
            "head_warm_start.name=dp_probe",
            "head_warm_start.rounds=25",
            "head_warm_start.optimizer=sgd",
            "head_warm_start.learning_rate=1.0",
            "head_warm_start.local_steps=2",
            "head_warm_start.server_learning_rate=2.0",
            "privacy.mechanism=gaussian",
        ),
        blocks=(5,),
        unit="client",
    ),
    "shakespeare": Data(
        preset="shakespeare",
        files=(("shakespeare_train.jsonl.gz", 0), ("shakespeare_test.jsonl.gz", 500)),
        settings=(
            "partition.clients=10",
            "client.sampling_probability=0.1",
            "server.rounds=12",
            "evaluate.generate=0",
        ),
        targets=("q_proj", "v_proj"),
        metric="perplexity",
    ),
    "pneumonia": Data(
        preset="pneumonia",
        files=(("pneumoniamnist_train.safetensors", 0), ("pneumoniamnist_test.safetensors", 0)),
        settings=(
            "client.sampling_probability=0.25",
            "server.rounds=12",
            "head_warm_start.rounds=10",
            "privacy.target_delta=1e-4",
        ),
        targets=("q_proj", "v_proj"),
    ),
}
COMMON = [
    "client.optimizer=sgd",
    "client.learning_rate=1.0",
    "client.local_steps=1",
    "client.physical_batch_size=128",
    "server.optimizer=adam",
    "server.momentum=0.0",
    "server.evaluate_clients=10",
]
PLAIN = ["privacy.unit=none", "privacy.target_epsilon=unset", "secagg.name=none", "server.weighting=examples"]
# one share of the noise from each client: the sum has about the noise that one trusted server would add
DISTRIBUTED = ["privacy.placement=distributed", "server.weighting=uniform", "secagg.dropped=0.2"]
# the whole noise from each client: for the rules that distributed noise does not take, and what they are compared with
LOCAL = ["privacy.placement=local", "server.weighting=examples"]
CENTRAL = ["privacy.placement=central"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One row of the tables.

    Attributes:
        name: ``tuning.name``.
        family: Which learning rate it takes.
        options: Of the tuning, by key.
        rule: ``server.aggregation``.
        local: Whether its private run has the whole noise on each client.
        short: For a model of which only some blocks are tuned: how the tuning is told so. ``targets``: by name and
            number of block; ``names``: by the patterns below; ``all``: it cannot be told and takes all blocks.
        meter: Whether the meter of averaged factors runs along (not with distributed noise).
    """

    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    rule: str = "fedavg"
    local: bool = False
    short: str = "targets"
    meter: bool = False


WAYS = {
    "head": Way(name="head", family="head", short="all"),
    "ffa_lora": Way(name="ffa_lora", family="low rank", meter=True),
    "lora (FedIT)": Way(name="lora", family="low rank", meter=True),
    "fed_sb": Way(name="fed_sb", family="low rank", options={"r": 16}, meter=True),
    "bitfit": Way(name="bitfit", family="vectors", short="names"),
    "ia3": Way(name="ia3", family="vectors", short="names"),
    "adapter (Houlsby)": Way(name="adapter", family="low rank", options={"bottleneck": 16}, short="names"),
    "full": Way(name="full", family="whole", short="names"),
    "rolora, local noise": Way(name="lora", family="low rank", rule="rolora", local=True, meter=True),
    "ffa_lora, local noise": Way(name="ffa_lora", family="low rank", local=True, meter=True),
    "lora (FedIT), local noise": Way(name="lora", family="low rank", local=True, meter=True),
    "fedsa_lora, local noise": Way(name="lora", family="low rank", rule="fedsa_lora", local=True),
    "dora": Way(name="dora", family="low rank"),
    "rslora": Way(name="rslora", family="low rank"),
    "vera": Way(name="vera", family="vectors", options={"r": 64}),
    "ln_tuning": Way(name="ln_tuning", family="vectors", short="names"),
    "oft": Way(name="oft", family="low rank"),
    "boft": Way(name="boft", family="low rank"),
    "prefix_tuning": Way(name="prefix_tuning", family="prompts", options={"num_virtual_tokens": 8}, short="all"),
    "prompt_tuning": Way(name="prompt_tuning", family="prompts", options={"num_virtual_tokens": 8}, short="all"),
}
# Adam's on the server, by family and whether there is privacy: the best of three on PneumoniaMNIST, seed 0 (--search),
# with the first tuning of the family; prompts were not searched. Private heads take the presets' own of the warm start
RATES = {
    True: {"low rank": 1e-2, "vectors": 1e-2, "whole": 3e-3, "prompts": 1e-2},
    False: {"low rank": 3e-3, "vectors": 3e-3, "whole": 1e-3, "prompts": 1e-2},
}
HEAD_RATES = {
    True: {"sst2": 0.05, "medquad": 0.3, "stackexchange": 0.05, "pneumonia": 0.1},
    False: {"sst2": 0.03, "medquad": 0.03, "stackexchange": 0.03, "pneumonia": 0.03},
}
SEARCHED = {"low rank": (1e-3, 3e-3, 1e-2), "vectors": (1e-3, 3e-3, 1e-2), "whole": (3e-4, 1e-3, 3e-3)}
SEARCHED_HEADS = (0.01, 0.03, 0.1)
# parts of BERT's block {} for tunings that are told by name
NAMES: dict[str, dict[str, list[str]]] = {
    "ia3": {
        "target_modules": ["layer.{}.attention.self.key", "layer.{}.attention.self.value", "layer.{}.output.dense"],
        "feedforward_modules": ["layer.{}.output.dense"],
    },
    "adapter": {"target_modules": ["layer.{}.attention.output.dense", "layer.{}.output.dense"]},
    "ln_tuning": {"target_modules": ["layer.{}.attention.output.LayerNorm", "layer.{}.output.LayerNorm"]},
    "bitfit": {"select": ["layer.{}.*.bias"]},
    "full": {"select": ["layer.{}.*"]},
}


def tuning_settings(way: Way, data: Data) -> list[str]:
    """Return the overrides that choose what is trained."""
    name, options = way.name, dict(way.options)
    if data.blocks and way.short == "names":
        blocks = {key: [p.format(b) for b in data.blocks for p in parts] for key, parts in NAMES[name].items()}
        options |= blocks
        name = "select" if "select" in blocks else name
    elif way.short == "targets":
        options["target_modules"] = list(data.targets)
        if data.blocks:
            options["layers_to_transform"] = list(data.blocks)
    return [f"tuning.name={name}", *(f"tuning.{key}={json.dumps(value)}" for key, value in options.items())]


def settings_of(label: str, data_name: str, epsilon: float | None, rate: float | None) -> list[str]:
    """Return all overrides of a cell but its files and seed."""
    way, data = WAYS[label], DATA[data_name]
    private = epsilon is not None
    rate = rate or (HEAD_RATES[private].get(data_name) if way.family == "head" else RATES[private][way.family])
    rate = rate or 0.01  # a head where the task has none: refused
    if epsilon is None:
        privacy = [*PLAIN, *warm_rate(way, data_name)]
    else:
        placed = CENTRAL if data.unit == "client" else LOCAL if way.local else DISTRIBUTED
        privacy = [f"privacy.target_epsilon={epsilon}", *placed]
    metered = way.meter and (epsilon is None or (way.local and data.unit == "example"))
    return [
        *COMMON,
        *data.settings,
        *tuning_settings(way, data),
        f"server.aggregation={way.rule}",
        f"server.learning_rate={rate}",
        f"server.meter={json.dumps(metered)}",
        "server.evaluate_every=1000",
        *(head_alone(data) if way.name == "head" else []),
        *privacy,
    ]


def head_alone(data: Data) -> list[str]:
    """Return the overrides of a head alone: no warm start, and the whole budget for the steps that a warm start takes.

    Its features are computed once, so all examples take part in each of its steps.
    """
    steps = ["server.rounds=30"] if data.unit == "client" else ["server.rounds=30", "client.sampling_probability=1.0"]
    return ["head_warm_start.name=none", "client.physical_batch_size=1024", *steps]


def warm_rate(way: Way, data_name: str) -> list[str]:
    """Return the override of a warm start without noise: Adam's step there as of a head alone, without privacy."""
    if data_name not in HEAD_RATES[False] or way.name == "head" or data_name == "stackexchange":
        return []
    return [f"head_warm_start.server_learning_rate={HEAD_RATES[False][data_name]}"]


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
            receipt = train(config, out=Path(folder) / "run").receipt
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
    mine = [row for row in rows if row["data"] == data_name and row["rate"] is None]
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
    print("\n\n".join([*(table(name, rows) for name in DATA if any(r["data"] == name for r in rows)), meters(rows)]))


if __name__ == "__main__":
    main()
