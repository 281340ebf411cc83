"""Many clients on few nodes: seconds a round and memory a process of a real deployment.

    python benchmarks/flower_scale.py [FOLDER] [RUN.TOML|PRESET] [privfed overrides, such as -s partition.clients=100]

One hundred clients of the preset ``tiny``, all of them in every round, at four sites of 25 each. A site is one process
that plays its clients one after the other, with one copy of the model, so its memory hardly grows with them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flower_lab import Lab, settings_of, times

OWN = ["partition.clients=100", "data.limit=2000", "server.rounds=5", "server.evaluate_every=5"]
ALL = ["head_warm_start.name=none", "client.deadline_s=60.0"]


def main() -> None:
    """Run it and print the tables."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/flower-scale")
    source = sys.argv[2] if len(sys.argv) > 2 else "tiny"
    given = settings_of(sys.argv[3:])
    clients = next((s.split("=")[1] for s in given if s.startswith("partition.clients=")), "100")
    lab = Lab(folder, source, [*OWN, *ALL, f"server.cohort_size={clients}", *given])
    try:
        lab.whole()
    finally:
        lab.close()
    print(times(lab.folder / "run"))
    first, *rest = lab.rounds()
    print(
        f"first round {first['seconds']['total']:.1f} s; clients in the sums: {[r['survivors'] for r in lab.rounds()]}"
    )
    up, down = (rest[-1][key] / first["cohort"] / 1e3 for key in ("bytes_up", "bytes_down"))
    print(f"a client and round: {up:.0f} kB up, {down:.0f} kB down")
    print("\n| process | most resident memory, MiB |\n|---|---|")
    for name, peak in sorted(lab.peaks.items()):
        print(f"| {name} | {peak / 2**20:.0f} |")
    print("\n".join(lab.ledgers()))


if __name__ == "__main__":
    main()
