"""Noise in shares against noise on each client: DP-SGD on the same federation at the same epsilon, both in one run.

    python benchmarks/distributed.py                                 # the demo: minutes a cell
    python benchmarks/distributed.py --head --epsilons 0.5 1 --seeds 0 1   # the head alone: seconds a cell
    python benchmarks/distributed.py --clients 20 --epsilons 1 8 --seeds 0 1 2 3 4

``local`` adds the noise of a client's own batch on each client; ``distributed`` adds one share each, so that the sum
has the noise of the whole cohort's batch, at what n_min survivors and the declared corrupt clients leave. Prints one
JSON object a cell and the means at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

PLACEMENTS = ("local", "distributed")
HEAD = [
    "tuning.name=head",
    "head_warm_start.name=none",
    "client.optimizer=sgd",
    "client.local_steps=1",
    "client.learning_rate=1.0",
    "client.sampling_probability=0.3",
    "client.physical_batch_size=1024",
    "server.rounds=30",
    "server.evaluate_every=30",
    "server.optimizer=adam",
    "server.momentum=0.0",
    "server.learning_rate=0.1",
]


def run_cell(placement: str, epsilon: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one cell and return its row."""
    from privfed.config import load_config
    from privfed.run import train

    settings = [
        f"partition.clients={options.clients}",
        "server.weighting=uniform",
        "privacy.accountant=rdp",  # for both, so that nothing but the noise differs
        f"privacy.placement={placement}",
        f"privacy.target_epsilon={epsilon}",
        f"secagg.dropped={options.dropped}",
        f"secagg.corrupt={options.corrupt}",
        f"seed={seed}",
        *(HEAD if options.head else []),
        *options.set,
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("demo", [*settings, f"ledger.path={folder}/ledger.sqlite"])
        started = time.perf_counter()
        receipt = train(config, out=Path(folder) / "run").receipt
        seconds = time.perf_counter() - started
    release = receipt["views"]["release"]
    return {
        "placement": placement,
        "epsilon": epsilon,
        "seed": seed,
        "clients": options.clients,
        "accuracy": receipt["utility"]["accuracy"],
        "macro_f1": receipt["utility"]["macro_f1"],
        "spent": release["epsilon"],
        "spent_by_survivors": release.get("epsilon_survivors"),
        "noise_multiplier": receipt["mechanism"]["noise_multiplier"],
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Run all cells and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 8.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[7])
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--dropped", type=float, default=0.2)
    parser.add_argument("--corrupt", type=float, default=0.1)
    parser.add_argument("--head", action="store_true", help="Train the head alone.")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="More overrides of the preset.")
    options = parser.parse_args()
    rows = []
    for epsilon in options.epsilons:
        for seed in options.seeds:
            for placement in PLACEMENTS:
                rows.append(run_cell(placement, epsilon, seed, options))
                print(json.dumps(rows[-1]), flush=True)
    for epsilon in options.epsilons:
        means = {
            placement: statistics.mean(
                row["accuracy"] for row in rows if (row["placement"], row["epsilon"]) == (placement, epsilon)
            )
            for placement in PLACEMENTS
        }
        gain = means["distributed"] - means["local"]
        print(f"epsilon {epsilon:g}: local {means['local']:.4f}, distributed {means['distributed']:.4f} ({gain:+.4f})")


if __name__ == "__main__":
    main()
