"""Accuracy of every robust rule with and without clients that flip the sign of their update.

    python benchmarks/robust.py                          # pydoc, 10 clients, 2 of them flip, 3 seeds
    python benchmarks/robust.py --factor 1 --only median # flipped, but no longer than an honest update
    python benchmarks/robust.py --alpha 1                # uneven clients (Dirichlet)

The data and model of the preset "demo", without privacy: a linear head on MiniLM's features, or with ``--tuning lora``
the last block's adapter. A flipping client trains like the others and sends its update times ``-factor``. One model is
loaded for each seed; every cell starts from the same values and trains the same rounds, but for "krum, slow", which
takes steps of 0.3 and three times the rounds: Krum's update is one client's, and as noisy. Prints the table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

SLOW = (0.3, 3)
"""Server's learning rate, and times as many rounds: the model then averages over rounds what a round does not."""
PACE = {"krum, slow": SLOW}
RULES: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg"},
    "krum": {"name": "krum", "byzantine": 2},
    "krum, slow": {"name": "krum", "byzantine": 2},
    "multi_krum": {"name": "multi_krum", "byzantine": 2},
    "trimmed_mean": {"name": "trimmed_mean", "trim_share": 0.2},
    "trimmed_mean, 30 %": {"name": "trimmed_mean", "trim_share": 0.3},
    "median": {"name": "median"},
    "geometric_median": {"name": "geometric_median"},
    "norm_bound, clip": {"name": "norm_bound", "action": "clip"},
    "norm_bound, clip to the median": {"name": "norm_bound", "action": "clip", "factor": 1.0},
    "norm_bound, filter": {"name": "norm_bound", "action": "filter"},
}
TUNINGS = {
    "head": ["tuning.name=head", "client.learning_rate=2e-2"],
    "lora": [
        "tuning.name=lora",
        'tuning.target_modules=["query", "value"]',
        "tuning.layers_to_transform=[5]",
        "client.learning_rate=2e-3",
        "client.head_learning_rate=1e-2",
    ],
}


@dataclass(frozen=True)
class Flipping:
    """A client's real training, its result turned around."""

    trainer: Any
    factor: float

    def run(self, *arguments: Any) -> Any:
        """Train, and return the update times ``-factor``."""
        return (-self.factor * self.trainer.run(*arguments)).astype(np.float32)


def settings_of(options: argparse.Namespace, seed: int) -> list[str]:
    """Return the overrides of the preset."""
    partition = ["iid"] if options.alpha is None else ["dirichlet", f"partition.alpha={options.alpha}"]
    return [
        "privacy.unit=none",
        "privacy.target_epsilon=unset",
        "secagg.name=none",
        "head_warm_start.name=none",
        f"partition.name={partition[0]}",
        *partition[1:],
        f"partition.clients={options.clients}",
        "client.optimizer=adamw",
        "client.sampling_probability=unset",
        "client.batch_size=32",
        f"client.local_steps={options.steps}",
        "server.aggregation=median",  # any rule that sees single updates: each cell puts its own in its place
        "server.weighting=uniform",
        "server.learning_rate=1.0",
        "server.momentum=0.0",
        f"server.rounds={options.rounds}",
        *TUNINGS[options.tuning],
        f"seed={seed}",
    ]


@contextmanager
def prepared(options: argparse.Namespace, seed: int) -> Iterator[tuple[Any, Any, tuple[str, ...]]]:
    """Yield the phase to train, the data holder and the label names, set up as ``privfed train`` does."""
    from privfed.config import load_config
    from privfed.federation import material as materials
    from privfed.federation import setup, workbench
    from privfed.federation.client import Holder
    from privfed.federation.progress import Silent
    from privfed.privacy.ledger import Ledger
    from privfed.rng import reproducible_key

    config = load_config("demo", settings_of(options, seed))
    setup.set_deterministic()
    material = materials.gather(config)
    bench = workbench.build(config, material, Silent())
    with tempfile.TemporaryDirectory() as folder, Ledger.open(Path(folder) / "ledger.sqlite") as ledger:
        holder = Holder(
            ledger=ledger,
            key=reproducible_key(config.seed),
            run_id="benchmark",
            ledger_run_id="benchmark",
            data_digest=material.dataset.digest,
            partition_digest=material.partition_digest,
            project="benchmark",
        )
        stage = setup.make_stages(config, material, bench, None, holder, Silent())["train"]
        yield stage, holder, material.dataset.label_names


def accuracy(stage: Any, holder: Any, names: tuple[str, ...], rule: str, flipped: int, k: float) -> float:
    """Return the test accuracy after all rounds with a rule of ``RULES`` and so many flipping clients."""
    from privfed.federation.engines.in_process import set_state, start_of
    from privfed.federation.evaluate import evaluate
    from privfed.federation.progress import Silent
    from privfed.federation.round import run_round
    from privfed.rules import made
    from privfed.schedule import rule_table

    table, (rate, times) = rule_table(RULES[rule]), PACE.get(rule, (1.0, 1))
    wrong = set(sorted(stage.phase.clients)[:flipped])
    clients = {
        name: replace(client, trainer=Flipping(client.trainer, k)) if name in wrong else client
        for name, client in stage.phase.clients.items()
    }
    phase = replace(
        stage.phase,
        clients=clients,
        server=stage.phase.server.model_copy(update={"aggregation": table, "learning_rate": rate}),
        sharing=replace(stage.phase.sharing, rule=made(table)),
    )
    start = state = start_of(stage)
    for _ in range(times * phase.plan.rounds):
        state, report = run_round(state, phase, holder, Silent())
        if report.lost or report.dropped:
            raise SystemExit(f"round {report.round} of {table!r}: {report.lost or report.dropped}")
    set_state(stage, state)
    found = float(evaluate(stage.module, stage.test, names).value)
    set_state(stage, start)
    return found


def measure(options: argparse.Namespace) -> dict[tuple[str, str], list[float]]:
    """Return {(rule, clean or attacked): accuracy by seed}."""
    scores: dict[tuple[str, str], list[float]] = {}
    for seed in range(1, options.seeds + 1):
        with prepared(options, seed) as (stage, holder, names):
            for rule in options.only or RULES:
                for setting, flipped in (("clean", 0), ("attacked", options.flipping)):
                    started = time.perf_counter()
                    found = accuracy(stage, holder, names, rule, flipped, options.factor)
                    scores.setdefault((rule, setting), []).append(found)
                    seconds = time.perf_counter() - started
                    print(f"seed {seed}  {rule:20} {setting:9} {found:.3f}  {seconds:.0f} s", file=sys.stderr)
    return scores


def table(scores: Mapping[tuple[str, str], list[float]]) -> str:
    """Return the scores as Markdown; the last column is the loss against FedAvg without attack, in points."""
    lines = ["| rule | clean | attacked | attacked below clean FedAvg, points |", "|---|---|---|---|"]
    base = scores.get(("fedavg", "clean"))
    for rule in dict.fromkeys(name for name, _ in scores):
        cells = []
        for setting in ("clean", "attacked"):
            values = scores[rule, setting]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lost = (
            "-" if base is None else f"{100 * (statistics.mean(base) - statistics.mean(scores[rule, 'attacked'])):.1f}"
        )
        lines.append(f"| {rule} | {' | '.join(cells)} | {lost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--flipping", type=int, default=2, help="clients that flip")
    parser.add_argument("--factor", type=float, default=5.0, help="what a flipped update is multiplied by, besides -1")
    parser.add_argument("--alpha", type=float, help="uneven clients: concentration of the Dirichlet distribution")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10, help="local steps")
    parser.add_argument("--tuning", choices=list(TUNINGS), default="head")
    parser.add_argument("--only", choices=list(RULES), action="append", help="only this rule (may be repeated)")
    print(table(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
