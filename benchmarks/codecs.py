"""Accuracy against bytes on the wire, every codec: the sections "Accuracy against bytes" of docs/results.md.

    python benchmarks/codecs.py head --data DIR             # the head, every codec, pydoc and SST-2, no privacy
    python benchmarks/codecs.py full lora --data DIR --seeds 1
    python benchmarks/codecs.py private                     # client-level noise, 250 clients
    python benchmarks/codecs.py                             # print the tables of everything run so far
    python benchmarks/codecs.py --plot docs/codecs.png      # and draw the fronts (needs matplotlib)

A cell is one ``privfed train`` of the preset "demo" or "sst2" with the overrides named here; bytes are the lengths of
the messages that it wrote, headers included, as metrics.jsonl has them. All cells of a data set without privacy take
the same rows, clients and batches, and the same rounds and local steps but for the head, of which more are cheap, and
"lora, long"; only what is trained and how it is sent differ. Finished cells are kept in benchmarks/codecs.jsonl and not
run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shared_work import append_row, find_file, frozen_work, interval, read_rows, share_frozen_work, subset

STORE = Path(__file__).with_name("codecs.jsonl")
CACHE = Path("runs/codecs")
# values that are trained: the head, and LoRA's factors in the last block; for `full`, until it has been measured
HEAD_VALUES = {"pydoc": 11 * 385, "sst2": 2 * 385}
LORA_VALUES = {
    "head": 0,
    "lora": 12_288,
    "lora, long": 12_288,
    "lora, all layers": 55_296,
    "lora, all blocks": 73_728,
    "lora, everywhere": 331_776,
    "mask": 6_144,
    "full": 22_713_216,
}
DATA = {
    "pydoc": ["model.max_length=32"],
    "sst2": ["data.limit=unset"],
}
SST2_ROWS = 8000
COMMON = [
    "partition.name=iid",
    "head_warm_start.name=none",
    "secagg.name=none",
    "server.weighting=uniform",
    "server.momentum=0.0",
    "server.evaluate_every=1000",
]
ROUNDS = {
    "full": 10,
    "lora": 10,
    "lora, long": 30,
    "lora, all layers": 10,
    "lora, all blocks": 10,
    "lora, everywhere": 10,
    "mask": 30,
    "head": 30,
}
STEPS = {
    "full": 8,
    "lora": 8,
    "lora, long": 8,
    "lora, all layers": 8,
    "lora, all blocks": 8,
    "lora, everywhere": 8,
    "mask": 8,
    "head": 16,
}
PLAIN = [
    *COMMON,
    "partition.clients=5",
    "privacy.unit=none",
    "privacy.target_epsilon=unset",
    "client.optimizer=adamw",
    "client.sampling_probability=unset",
    "client.batch_size=16",
    "server.learning_rate=1.0",
]
RATES = {
    "full": (2e-4, 5e-3),
    "lora": (2e-3, 1e-2),
    "lora, long": (2e-3, 1e-2),
    "lora, all layers": (2e-3, 1e-2),
    "lora, all blocks": (2e-3, 1e-2),
    "lora, everywhere": (1e-3, 1e-2),
    "mask": (0.1, 1e-2),
    "head": (2e-2, 2e-2),
}
LORA = ["tuning.name=lora", "tuning.r=8", "tuning.layers_to_transform=[5]"]
TUNINGS = {
    "full": ["tuning.name=full"],
    "lora": [*LORA, 'tuning.target_modules=["query", "value"]'],
    "lora, long": [*LORA, 'tuning.target_modules=["query", "value"]'],
    "lora, all layers": [*LORA, 'tuning.target_modules=["query", "key", "value", "dense"]'],
    "lora, everywhere": [
        "tuning.name=lora",
        "tuning.r=8",
        'tuning.target_modules=["query", "key", "value", "dense"]',
    ],
    "lora, all blocks": ["tuning.name=lora", "tuning.r=8", 'tuning.target_modules=["query", "value"]'],
    "mask": [
        "tuning.name=bernoulli_mask",
        "tuning.r=8",
        "tuning.layers_to_transform=[5]",
        'tuning.target_modules=["query", "value"]',
    ],
    "head": ["tuning.name=head"],
}
# 250 clients of which 50 take part; each codec takes the better of these clips, with equal steps of the model
CLIPS = (1.0, 0.25)
PRIVATE_RATE = 5.0  # of the server at a clip of 1: the best of three for `identity`
PRIVATE = [
    *COMMON,
    "partition.clients=250",
    "partition.min_size=1",
    "tuning.name=head",
    "client.optimizer=sgd",
    "client.learning_rate=1.0",
    "client.sampling_probability=unset",
    "client.batch_size=16",
    "client.local_steps=2",
    "server.rounds=40",
    "server.cohort_size=50",
    "privacy.unit=client",
    "privacy.placement=central",
    "privacy.mechanism=gaussian",
]


def quantised(bits: int, top: float) -> dict[str, Any]:
    """Return a nested quantiser."""
    return {"name": "stochastic_quantizer", "bits": bits, "max_value": top}


def codecs(top: float, length: int) -> dict[str, dict[str, Any]]:
    """Return every codec with one or two settings, for updates of ``length`` values that are rarely beyond ``top``."""
    return {
        "identity": {"name": "identity"},
        "cast bfloat16": {"name": "cast"},
        "stochastic_quantizer 8 bit": quantised(8, top),
        "stochastic_quantizer 4 bit": quantised(4, top),
        "stochastic_quantizer 1 bit": quantised(1, top),
        "rotated_quantizer 4 bit": {"name": "rotated_quantizer", "bits": 4, "max_norm": 40 * top},
        "sign": {"name": "sign", "magnitude": top / 4},
        "sign, feedback": {"name": "sign", "magnitude": top / 4, "vote": "mean", "error_feedback": True},
        "random_k 10%": {"name": "random_k", "density": 0.1, "unbiased": False, "error_feedback": True},
        "random_k 25% + 4 bit": {"name": "random_k", "density": 0.25, "unbiased": False, "inner": quantised(4, top)},
        "random_k 10% + 4 bit, feedback": {
            "name": "random_k",
            "density": 0.1,
            "unbiased": False,
            "error_feedback": True,
            "inner": quantised(4, 4 * top),
        },
        "top_k 10%": {"name": "top_k", "density": 0.1},
        "top_k 2% + 4 bit": {"name": "top_k", "density": 0.02, "inner": quantised(4, 4 * top)},
        "global_mask 10%": {"name": "global_mask", "density": 0.1, "refresh": 10},
        "count_sketch 1/4": {"name": "count_sketch", "rows": 3, "columns": length // 12, "density": 0.1},
        "count_sketch 1/1": {"name": "count_sketch", "rows": 3, "columns": length // 3, "density": 0.1},
        "seed_projection 1/8": {"name": "seed_projection", "directions": length // 8, "error_feedback": True},
        "seed_projection 1/32": {"name": "seed_projection", "directions": length // 32, "error_feedback": True},
        "powersgd rank 1": {"name": "powersgd", "rank": 1},
        "powersgd rank 4": {"name": "powersgd", "rank": 4},
        "svd_truncate rank 1": {"name": "svd_truncate", "rank": 1, "error_feedback": True},
    }


MASKS = {"bernoulli_mask": {"name": "bernoulli_mask"}}
DOWNLINK = {"identity, 8 bit down": {"name": "stochastic_quantizer", "bits": 8, "max_value": 1.0}}
FEW = {
    "mask": ("identity", "bernoulli_mask"),
    "full": ("identity",),
    "lora, long": ("stochastic_quantizer 8 bit", "stochastic_quantizer 4 bit"),
    "lora, all layers": ("stochastic_quantizer 8 bit", "stochastic_quantizer 4 bit", "identity"),
    "lora, everywhere": ("sign, feedback",),
    "lora, all blocks": ("sign, feedback", "stochastic_quantizer 4 bit"),
    "lora": (
        "identity",
        "stochastic_quantizer 8 bit",
        "stochastic_quantizer 4 bit",
        "random_k 25% + 4 bit",
        "random_k 10% + 4 bit, feedback",
        "sign, feedback",
        "top_k 2% + 4 bit",
        "seed_projection 1/8",
        "powersgd rank 1",
    ),
}


def private_codecs(clip: float) -> dict[str, dict[str, Any]]:
    """Return the codecs compared under client-level noise: at all bytes, about 1/8 and about 1/32 of them."""
    length = HEAD_VALUES["pydoc"]
    return {
        "identity": {"name": "identity"},
        "stochastic_quantizer 4 bit": quantised(4, 0.1 * clip),
        "random_k 12.5%": {"name": "random_k", "density": 0.125},
        "stochastic_quantizer 1 bit": quantised(1, 0.05 * clip),
        "sign": {"name": "sign", "magnitude": 0.01 * clip, "vote": "mean"},
        "svd_truncate rank 1": {"name": "svd_truncate", "rank": 1},
        "top_k 8%": {"name": "top_k", "density": 0.08},
        "random_k 12.5% + 8 bit": {"name": "random_k", "density": 0.125, "inner": quantised(8, 0.2 * clip)},
        "seed_projection 1/8": {"name": "seed_projection", "directions": length // 8},
        "seed_projection 1/32": {"name": "seed_projection", "directions": length // 32},
        "global_mask 12.5%": {"name": "global_mask", "density": 0.125, "refresh": 20},
        "powersgd rank 1": {"name": "powersgd", "rank": 1},
        "count_sketch 1/8": {
            "name": "count_sketch",
            "rows": 3,
            "columns": length // 24,
            "density": 0.1,
            "max_norm": 2.0 * clip,
        },
        "random_k 12.5%, biased": {"name": "random_k", "density": 0.125, "unbiased": False},
        "random_k 3%": {"name": "random_k", "density": 0.03125},
        "rotated_quantizer 4 bit": {"name": "rotated_quantizer", "bits": 4, "max_norm": clip},
        "cast bfloat16": {"name": "cast"},
    }


def toml(value: Any) -> str:
    """Return a value as TOML, nested tables inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + "}"
    return json.dumps(value)


def table_settings(place: str, table: dict[str, Any]) -> list[str]:
    """Return the overrides that choose a table of the configuration, its name first."""
    return [f"{place}.{key}={toml(value)}" for key, value in table.items()]


def settings_of(cell: dict[str, Any]) -> list[str]:
    """Return a cell's overrides."""
    if cell["epsilon"] is not None:
        chosen = private_codecs(cell["clip"])[cell["codec"]]
        return [
            *DATA[cell["data"]],
            *PRIVATE,
            f"privacy.target_epsilon={cell['epsilon']}",
            f"privacy.l2_clip_norm={cell['clip']}",
            f"server.learning_rate={PRIVATE_RATE / cell['clip']}",
            *table_settings("compression", chosen),
        ]
    rate, head_rate = RATES[cell["tuning"]]
    # AdamW moves a value by about its rate in each step, so this bounds all but a few values of an update
    length = LORA_VALUES[cell["tuning"]] + HEAD_VALUES[cell["data"]]
    top = STEPS[cell["tuning"]] * head_rate
    masks = {name: {**table, "max_value": top} for name, table in MASKS.items()}
    chosen = {**codecs(top, length), **masks}[cell["codec"].split(", 8 bit down")[0]]
    down = table_settings("downlink", DOWNLINK[cell["codec"]]) if cell["codec"] in DOWNLINK else []
    return [
        *DATA[cell["data"]],
        *PLAIN,
        *TUNINGS[cell["tuning"]],
        f"server.rounds={ROUNDS[cell['tuning']]}",
        f"client.local_steps={STEPS[cell['tuning']]}",
        f"client.learning_rate={rate}",
        f"client.head_learning_rate={head_rate}",
        *table_settings("compression", chosen),
        *down,
    ]


def files_of(data: str, source: Path | None) -> list[str]:
    """Return the overrides that name the files of a data set that is not built in."""
    if data == "pydoc":
        return []
    if source is None:
        raise SystemExit("SST-2 does not come with privfed: pass the folder of its files as --data, or take pydoc.")
    train = subset(find_file(source, "sst2_train.jsonl.gz"), SST2_ROWS, CACHE)
    return [f"data.path={train}", f"data.test_path={find_file(source, 'sst2_dev.jsonl.gz')}"]


def run_cell(cell: dict[str, Any], source: Path | None) -> dict[str, Any]:
    """Run one cell as ``privfed train`` does and return its row."""
    from privfed.config import load_config
    from privfed.errors import PrivfedError
    from privfed.run import train

    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        settings = [*settings_of(cell), *files_of(cell["data"], source), f"seed={cell['seed']}"]
        try:
            config = load_config(
                "demo" if cell["data"] == "pydoc" else "sst2", [*settings, f"ledger.path={folder}/ledger.sqlite"]
            )
            receipt = train(config, out=Path(folder) / "run", shared=frozen_work()).receipt
        except PrivfedError as error:
            return cell | {"refused": str(error)}
        metrics = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in metrics if line["kind"] == "round"]
    sent = [line for line in rounds if line["survivors"]]
    return cell | {
        "accuracy": receipt["utility"]["accuracy"],
        "trained": next(line for line in metrics if line["kind"] == "start")["trained_parameters"],
        "bytes_up": statistics.mean(line["bytes_up"] / line["survivors"] for line in sent),
        "bytes_down": statistics.mean(line["bytes_down"] / line["cohort"] for line in rounds),
        "rounds": len(rounds),
        "lost": sum(bool(line["lost"]) for line in rounds),
        "dropped": sum(len(line["dropped"]) for line in rounds),
        "saturated": sum(line["saturated"] or 0 for line in rounds),
        "spent": receipt["views"]["release"]["epsilon"],
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def cells(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the cells asked for, seed by seed."""
    for seed in range(1, options.seeds + 1):
        for what in options.what:
            for data in ["pydoc"] if what == "private" else options.sets:
                every = private_codecs(1.0) if what == "private" else [*codecs(1.0, 1), *DOWNLINK]
                names: Sequence[str] = FEW.get(what, list(every))
                for codec in names:
                    for clip in CLIPS if what == "private" else (None,):
                        if options.only is None or codec in options.only:
                            yield {
                                "data": data,
                                "tuning": "head" if what == "private" else what,
                                "codec": codec,
                                "epsilon": options.epsilon if what == "private" else None,
                                "clip": clip,
                                "seed": seed,
                            }


def grouped(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the finished rows of each (tuning, codec)."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "refused" not in row:
            found.setdefault((row["tuning"], row["codec"]), []).append(row)
    return found


def mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Return the mean of a column."""
    return statistics.mean(row[key] for row in rows)


def reference(data: str, rows: Sequence[dict[str, Any]]) -> float:
    """Return the bytes that full fine-tuning sends up a client and round: measured, or 4 a value before it has run."""
    measured = [row["bytes_up"] for row in rows if row["data"] == data and row["tuning"] == "full"]
    return statistics.mean(measured) if measured else 4.0 * (LORA_VALUES["full"] + HEAD_VALUES[data])


def front(points: dict[Any, tuple[float, float]]) -> set[Any]:
    """Return the points (bytes, accuracy) that no other beats in one without being worse in the other."""
    return {
        name
        for name, (size, score) in points.items()
        if not any(
            (s <= size and a >= score) and (s < size or a > score) for other, (s, a) in points.items() if other != name
        )
    }


def plain_table(data: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return a data set's table without privacy, most bytes first."""
    found = grouped([row for row in rows if row["data"] == data and row["epsilon"] is None])
    whole = reference(data, rows)
    points = {name: (mean(each, "bytes_up"), mean(each, "accuracy")) for name, each in found.items()}
    best = front(points)
    lines = [
        f"| {data}: tuning | codec | accuracy | bytes up | of full | bytes down | front |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted(found, key=lambda name: -points[name][0]):
        each, size = found[name], points[name][0]
        part = "1" if round(whole / size) == 1 else f"1/{whole / size:,.0f}"
        lines.append(
            f"| {name[0]} | {name[1]} | {interval([row['accuracy'] for row in each])} | {size:,.0f} | {part} "
            f"| {mean(each, 'bytes_down'):,.0f} | {'yes' if name in best else ''} |"
        )
    return "\n".join(lines)


def private_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table under client-level noise, most bytes first."""
    mine = [row for row in rows if row["epsilon"] is not None]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for clip in CLIPS:
        for name, each in grouped([row for row in mine if row["clip"] == clip]).items():
            if name not in found or mean(each, "accuracy") > mean(found[name], "accuracy"):
                found[name] = each
    whole = mean(found["head", "identity"], "bytes_up") if ("head", "identity") in found else float("nan")
    lines = ["| codec | accuracy | clip | bytes up | of identity |", "|---|---|---|---|---|"]
    for name, each in sorted(found.items(), key=lambda item: -mean(item[1], "bytes_up")):
        size = mean(each, "bytes_up")
        lines.append(
            f"| {name[1]} | {interval([row['accuracy'] for row in each])} | {each[0]['clip']:g} "
            f"| {size:,.0f} | 1/{whole / size:.1f} |"
        )
    lines += [f"| {row['codec']} | refused: {row['refused']} | - | - | - |" for row in mine if "refused" in row]
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw accuracy against bytes, each data set with its front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sets = [name for name in DATA if any(row["data"] == name and row["epsilon"] is None for row in rows)]
    figure, axes = plt.subplots(1, len(sets), figsize=(5 * len(sets), 4.2), layout="constrained", squeeze=False)
    for axis, data in zip(axes[0], sets, strict=True):
        found = grouped([row for row in rows if row["data"] == data and row["epsilon"] is None])
        points = {name: (mean(each, "bytes_up"), mean(each, "accuracy")) for name, each in found.items()}
        for (tuning, _), marker in zip(TUNINGS.items(), "*s^DPo", strict=True):
            mine = [point for name, point in points.items() if name[0] == tuning]
            if mine:
                axis.scatter(*zip(*mine, strict=True), marker=marker, s=110 if marker == "*" else 30, label=tuning)
        best = sorted((points[name], name) for name in front(points))
        axis.step(*zip(*[point for point, _ in best], strict=True), where="post", color="0.6", lw=1, zorder=0)
        for point, (_, codec) in best:
            axis.annotate(codec, point, fontsize=6, xytext=(3, 4), textcoords="offset points")
        axis.set(xscale="log", xlabel="bytes up, a client and round", ylabel="test accuracy", title=data)
        axis.grid(alpha=0.2)
        axis.legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is asked for and not there yet; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*TUNINGS, "private", []])
    parser.add_argument("--data", dest="source", type=Path, help="folder with the files of SST-2")
    parser.add_argument("--sets", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--only", nargs="+", help="only these codecs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilon", type=float, default=8.0, help="of the private cells")
    parser.add_argument("--plot", type=Path, help="draw the fronts into this file")
    options = parser.parse_args()
    if options.what:
        CACHE.mkdir(parents=True, exist_ok=True)
        share_frozen_work(str(CACHE))
        for cell in cells(options):
            if any(all(row.get(key) == value for key, value in cell.items()) for row in read_rows(STORE)):
                continue
            row = run_cell(cell, options.source)
            append_row(STORE, row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    rows = read_rows(STORE)
    tables = [plain_table(name, rows) for name in DATA if any(r["data"] == name and r["epsilon"] is None for r in rows)]
    print("\n\n".join([*tables, private_table(rows)]))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
