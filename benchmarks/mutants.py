"""How often the audits reject each planted bug at a claimed epsilon of 2, and how often the correct build.

    python benchmarks/mutants.py                 # 20 runs of each; resumes from benchmarks/mutants.jsonl
    python benchmarks/mutants.py --runs 3 --only half_the_noise

Every run draws its own coins, batches and noise. Wanted: every bug rejected in 19 of 20 runs or more, the correct build
by each audit in 1 of 20 or less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from privfed_audits.mutant_audits import AUDITS, Size, rejections
from privfed_audits.mutants import MUTANTS

STORE = Path(__file__).with_name("mutants.jsonl")
EPSILON, MOST_WRONG = 2.0, 1
SIZE = Size(canaries=3000, rounds=4, lonely=260, lonely_rounds=12)


def builds() -> dict[str, tuple[str, Any]]:
    """Return what is audited: (audit, context) by name."""
    correct = {f"correct, {audit}": (audit, nullcontext) for audit in AUDITS}
    return {**correct, **{name: (mutant.audit, mutant.planted) for name, mutant in MUTANTS.items()}}


def once(name: str, seed: int) -> dict[str, Any]:
    """Return one run's outcome."""
    audit, planted = builds()[name]
    started, used = time.perf_counter(), time.process_time()
    with planted():
        (found,) = rejections(audit, epsilon=EPSILON, size=SIZE, seeds=[seed])
    return {
        "build": name,
        "audit": audit,
        "seed": seed,
        "rejected": found.rejected,
        "epsilon": round(found.epsilon, 4),
        "attack": found.attack,
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - used, 2),
    }


def stored() -> list[dict[str, Any]]:
    """Return the outcomes so far."""
    if not STORE.exists():
        return []
    return [json.loads(line) for line in STORE.read_text(encoding="utf-8").splitlines()]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the outcomes as a Markdown table."""
    out = ["| build | audit | rejected | median bound | processor seconds a run |", "|---|---|---|---|---|"]
    for name in builds():
        own = [row for row in rows if row["build"] == name]
        if own:
            bound = statistics.median(row["epsilon"] for row in own)
            cost = statistics.median(row["cpu_seconds"] for row in own)
            wrong = sum(row["rejected"] for row in own)
            out.append(f"| {name} | {own[0]['audit']} | {wrong} of {len(own)} | {bound:.2f} | {cost:.1f} |")
    out.append(f"\nTogether {sum(row['cpu_seconds'] for row in rows) / 60:.1f} processor minutes.")
    return out


def main() -> int:
    """Run what is missing; return 1 if a bug was missed or the correct build rejected too often."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=sorted(builds()))
    options = parser.parse_args()
    done = {(row["build"], row["seed"]) for row in stored()}
    for seed in range(options.runs):
        for name in options.only or builds():
            if (name, seed) not in done:
                row = once(name, seed)
                print(f"{name}, seed {seed}: {row}", file=sys.stderr, flush=True)
                with STORE.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    rows = stored()
    print("\n".join(table(rows)))
    missed = 0
    for name in builds():
        own = [row["rejected"] for row in rows if row["build"] == name]
        wrong = sum(own) if name.startswith("correct") else len(own) - sum(own)
        missed += wrong > MOST_WRONG
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
