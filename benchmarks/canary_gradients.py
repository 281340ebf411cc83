"""How much of the accounted epsilon white-box canaries with given gradients find, on DP-LoRA of MiniLM.

    python benchmarks/canary_gradients.py local          # local DP-SGD: single updates, sums and the adapter
    python benchmarks/canary_gradients.py distributed    # noise in shares, under secure aggregation: sum and adapter
    python benchmarks/canary_gradients.py                # print the table of everything run so far

Each is one ordinary run (`privfed train`) on the built-in records with ``audit.canaries`` and ``audit.record``, and one
`privfed audit`: nothing is simulated. Two rounds of one step on all records, epsilon 8 at delta 1e-5.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from privfed.config import parse_config
from privfed.run import train
from privfed_audits.auditing import audit

STORE = Path(__file__).with_name("canary_gradients.jsonl")
WANTED = 0.7
LOCAL = {"privacy": {"placement": "local"}, "secagg": {"name": "none"}}
SHARES = {
    "privacy": {"placement": "distributed"},
    "secagg": {"name": "masked", "dropped": 0.0, "corrupt": 0.0},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "local": LOCAL,
    "masked": {**LOCAL, "secagg": {"name": "masked"}},
    "distributed": SHARES,
}


def config(variant: str, canaries: int, records: int, folder: Path) -> Any:
    """Return the run's configuration."""
    own = VARIANTS[variant]
    raw = {
        "seed": 11,
        "model": {"name": "minilm", "max_length": 32},
        "data": {"name": "pydoc", "limit": records, "test_fraction": 0.01},
        "partition": {"name": "iid", "clients": 4},
        "tuning": {"name": "lora", "r": 8},
        "client": {
            "optimizer": "sgd",
            "learning_rate": 0.05,
            "sampling_probability": 1.0,
            "local_steps": 1,
            "physical_batch_size": 64,
        },
        "server": {"rounds": 2, "cohort_size": 4, "evaluate_every": 2},
        "privacy": {"target_epsilon": 8.0, "target_delta": 1e-5, "l2_clip_norm": 1.0, **own["privacy"]},
        "secagg": own["secagg"],
        "audit": {"record": True, "canaries": canaries, "canary": "gradient"},
        "ledger": {"path": str(folder / "ledger.sqlite")},
    }
    return parse_config(raw, where=variant)


def once(variant: str, canaries: int, records: int, keep: Path | None) -> list[dict[str, Any]]:
    """Train and audit; return one row a view."""
    with tempfile.TemporaryDirectory() as name:
        folder = keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        started, used = time.perf_counter(), time.process_time()
        again = (folder / "run" / "config.toml").exists()
        run = train(config(variant, canaries, records, folder), out=folder / "run", resume=again).folder
        print(f"Trained in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        trained = time.process_time() - used
        membership = ["gradient_dot"]
        found = audit(run, attacks=membership, say=lambda line: print(line, file=sys.stderr, flush=True))
        return [
            {
                "variant": variant,
                "view": view,
                "canaries": canaries,
                "records": records,
                "empirical": round(entry["empirical_epsilon"], 4),
                "high": round(entry["interval"][1], 4),
                "accounted": entry["accounted_epsilon"],
                "ratio": round(entry["empirical_epsilon"] / entry["accounted_epsilon"], 4)
                if entry["accounted_epsilon"]
                else None,
                "ceiling": entry["ceiling"],
                "confidence": entry["confidence"],
                "attack": entry["attack"],
                "auc": round(entry["auc"], 4),
                "contradicted": entry["contradicted"],
                "train_cpu_seconds": round(trained, 1),
                "cpu_seconds": round(time.process_time() - used, 1),
                "seconds": round(time.perf_counter() - started, 1),
            }
            for view, entry in found["views"].items()
        ]


def table() -> list[str]:
    """Return what was run so far as a Markdown table."""
    lines = STORE.read_text(encoding="utf-8").splitlines() if STORE.exists() else []
    out = ["| noise | view | canaries | epsilon >= | accounted | ratio | ceiling | attack | AUC |", "|---" * 9 + "|"]
    for row in map(json.loads, lines):
        accounted, ratio, top = (
            "none" if row[key] is None else f"{row[key]:.2f}" for key in ("accounted", "ratio", "ceiling")
        )
        out.append(
            f"| {row['variant']} | {row['view']} | {row['canaries']} | {row['empirical']:.2f} | {accounted} "
            f"| {ratio} | {top} | {row['attack']} | {row['auc']:.3f} |"
        )
    return out


def main() -> int:
    """Run one variant, or print the table; return 1 where the wanted ratio was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", nargs="?", choices=sorted(VARIANTS))
    parser.add_argument("--canaries", type=int, default=5000)
    parser.add_argument("--records", type=int, default=128)
    parser.add_argument("--keep", type=Path, help="Folder for the run; one that was stopped there goes on.")
    options = parser.parse_args()
    if options.variant is None:
        print("\n".join(table()))
        return 0
    rows = once(options.variant, options.canaries, options.records, options.keep)
    with STORE.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print("\n".join(table()))
    judged = {"local": ("individual",), "masked": (), "distributed": ("aggregate", "release")}[options.variant]
    return int(any(row["view"] in judged and row["ratio"] < WANTED for row in rows))


if __name__ == "__main__":
    sys.exit(main())
