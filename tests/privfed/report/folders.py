"""Run folders as ``privfed train`` leaves them, made up but of the real shape and size."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from privfed.report.receipt import ReceiptFacts, ViewFacts, build_receipt, write_receipt
from privfed.types import PrivacyEvent

LABELS = ("text", "math", "network", "files", "data types", "concurrency", "language")
ROUNDS = 10
DELTA = 1e-5

CONFIG = """seed = 7

[model]
name = "minilm"
task = "sequence_classification"
max_length = 128

[data]
name = "pydoc"

[partition]
name = "dirichlet"
clients = {clients}
alpha = 0.5

[tuning]
name = "ffa_lora"
r = 8

[server]
rounds = 10
cohort_size = 8

[privacy]
unit = "{unit}"
target_epsilon = 8.0
target_delta = 1e-5
noise = "{noise}"
"""


def gaussian_curve(mu: float) -> tuple[tuple[float, float], ...]:
    """Return the exact (epsilon, delta) curve of a Gaussian mechanism."""

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    grid = [0.25 * i for i in range(41)]
    return tuple((e, normal(mu / 2 - e / mu) - math.exp(e) * normal(-mu / 2 - e / mu)) for e in grid)


def facts(**changes: Any) -> ReceiptFacts:
    """Return the facts of a finished run with local noise for one example."""
    view = ViewFacts(epsilon=7.314, curve=gaussian_curve(1.75), mu=1.75, mu_exact=False)
    base = ReceiptFacts(
        run_id="demo-7f3a",
        created="2026-03-14T09:26:53+00:00",
        config_digest="c0" * 32,
        data_name="pydoc",
        data_digest="da" * 32,
        partition_digest="9a" * 32,
        ledger_head="1e" * 32,
        unit="example",
        placement="local",
        secagg=True,
        relation="add_or_remove_one",
        accountant="pld",
        delta=DELTA,
        mechanism="gaussian",
        noise_multiplier=0.8125,
        l2_clip_norm=1.0,
        noise_source="csprng",
        noise_description="float64 Gaussian noise, rounded to the grid of the codec",
        sampling="poisson",
        views={"individual": view, "aggregate": view, "release": view},
        per_client={f"client_{i:02d}": 7.314 - 0.11 * i for i in range(20)},
        events=(PrivacyEvent(unit="example", noise_multiplier=0.8125, sampling_probability=0.091, steps=40),),
        rounds_planned=ROUNDS,
        rounds_done=ROUNDS,
        clients=20,
        versions={
            "privfed": "0.1.0",
            "python": "3.11.9",
            "torch": "2.9.0",
            "opacus": "1.6.0",
            "dp-accounting": "0.6.0",
            "peft": "0.21.0",
            "transformers": "5.0.0",
        },
        utility={
            "accuracy": 0.7127,
            "macro_f1": 0.683,
            "majority": 0.187,
            "n_test": 1500,
            "probe_accuracy": 0.641,
            "non_private_accuracy": 0.762,
        },
        adapter_digest="ad" * 32,
        beats_probe=True,
        sentinels={"clipping": "passed", "noise scale": "passed"},
        notes=(),
    )
    return replace(base, **changes)


def central(**changes: Any) -> ReceiptFacts:
    """Return the facts of a run that protects clients with noise from the server."""
    return facts(
        unit="client",
        placement="central",
        views={
            "individual": ViewFacts(epsilon=None, why="the noise is added after a client's update has arrived"),
            "aggregate": ViewFacts(epsilon=None, why="the server sees the sum before it adds the noise"),
            "release": ViewFacts(epsilon=3.2, curve=gaussian_curve(0.8), mu=0.8, mu_exact=True),
        },
        per_client={},
        events=(PrivacyEvent(unit="client", noise_multiplier=1.4, sampling_probability=0.4, steps=10),),
        **changes,
    )


def no_privacy(**changes: Any) -> ReceiptFacts:
    """Return the facts of a run without any noise."""
    return facts(
        unit="none",
        mechanism="none",
        noise_multiplier=None,
        noise_source="none",
        noise_description="none",
        views={},
        per_client={},
        events=(),
        **changes,
    )


def write_run(
    folder: Path,
    run: ReceiptFacts | None,
    *,
    unit: str = "example",
    noise: str = "secret",
    clients: int = 20,
    labels: tuple[str, ...] = LABELS,
    first_client: str = "client_00",
    rounds: int = ROUNDS,
    epsilon: float = 7.314,
) -> Path:
    """Write a run folder; ``run=None`` leaves it unfinished: no receipt and no last line."""
    folder.mkdir(parents=True, exist_ok=True)
    private = unit != "none"
    (folder / "config.toml").write_text(CONFIG.format(clients=clients, unit=unit, noise=noise), encoding="utf-8")
    (folder / "partition.json").write_text(json.dumps(_partition(clients, labels, first_client)), encoding="utf-8")
    lines = _metrics(clients, labels, rounds, epsilon if private else None, first_client)
    if run is not None:
        lines.append(_finish(labels))
        write_receipt(folder / "receipt.json", build_receipt(run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def _partition(clients: int, labels: tuple[str, ...], first_client: str) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    shares = rng.dirichlet([0.5] * len(labels), size=clients)
    sizes = rng.integers(120, 620, size=clients)
    counts = [[int(size * share) for share in row] for size, row in zip(sizes, shares, strict=True)]
    names = [first_client, *(f"client_{i:02d}" for i in range(1, clients))]
    return {
        "label_names": list(labels),
        "clients": [
            {"client_id": name, "size": sum(row), "label_counts": row} for name, row in zip(names, counts, strict=True)
        ],
        "partitioner": "dirichlet",
        "note": "",
    }


def _metrics(
    clients: int, labels: tuple[str, ...], rounds: int, epsilon: float | None, first_client: str
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {
            "kind": "start",
            "time": "2026-03-14T09:24:50+00:00",
            "clients": clients,
            "trained_parameters": 40714,
            "model_parameters": 22753156,
            "rounds": ROUNDS,
            "tuning": "ffa_lora",
            "planned_epsilon": 8.0 if epsilon else None,
            "train_rows": 6000,
            "test_rows": 1500,
        },
        _eval("warm_start", 0, 0.152),
    ]
    spent = [None if epsilon is None else epsilon * (0.3 + 0.7 * math.sqrt(i / ROUNDS)) for i in range(rounds + 1)]
    lines += [_round("warm_start", 1, spent[0], ()), _eval("warm_start", 1, 0.41)]
    for number in range(1, rounds + 1):
        dropped = ((first_client, "took longer than its deadline of 30 s"),) if number in (3, 7) else ()
        lines.append(_round("train", number, spent[number], dropped))
        lines.append(_eval("train", number, 0.7127 - 0.3 * math.exp(-number / 2.6) * (number < ROUNDS)))
    return lines


def _eval(phase: str, number: int, accuracy: float) -> dict[str, Any]:
    return {
        "kind": "eval",
        "phase": phase,
        "round": number,
        "accuracy": accuracy,
        "macro_f1": accuracy - 0.03,
        "loss": 2.1 - accuracy,
        "n": 1500,
        "majority": 0.187,
    }


def _round(phase: str, number: int, epsilon: float | None, dropped: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    return {
        "kind": "round",
        "phase": phase,
        "round": number,
        "survivors": 8 - len(dropped),
        "cohort": 8,
        "dropped": [{"client_id": name, "reason": reason} for name, reason in dropped],
        "epsilon": epsilon,
        "seconds": {"total": 4.2, "train": 3.9, "secagg": 0.1, "checkpoint": 0.02},
        "bytes_up": 1310720,
        "bytes_up_per_client": 163840,
        "bytes_down": 1302848,
        "update_norm": 0.12,
        "saturated": 0,
    }


def _finish(labels: tuple[str, ...]) -> dict[str, Any]:
    return {
        "kind": "finish",
        "seconds": 123.4,
        "accuracy": 0.7127,
        "macro_f1": 0.683,
        "per_class": [
            {
                "label": label,
                "precision": 0.83 - 0.4 * i / len(labels),
                "recall": 0.86 - 0.5 * i / len(labels),
                "f1": 0.84 - 0.45 * i / len(labels),
                "support": 280 - 200 * i // len(labels),
            }
            for i, label in enumerate(labels)
        ],
        "bytes_up": 14417920,
        "adapter_sha256": "ad" * 32,
    }
