"""The span attack: what one update gives away, what several rounds do, what a secure-aggregated sum still does.

    python benchmarks/attacks_span.py                     # go on with every line, 20 batches each, and print them
    python benchmarks/attacks_span.py --only full lora    # some of them
    python benchmarks/attacks_span.py --show              # run nothing
    python benchmarks/attacks_span.py --only map --plot docs/attacks_map.png

Scores are of distinct tokens without special ones. ``prior`` guesses from 200 texts of the same kind and sees no
update. The lines, on MiniLM and first sentences of the built-in data set of at most 20 tokens:

* ``full``: 4 texts, one step of full fine-tuning.
* ``lora``: 4 texts, LoRA of rank 8 on query and value, 5 rounds; ``lora, once``: the first 2 (at the start B is 0).
* ``sum``: the masked sum of 4 clients with 2 texts each, LoRA of rank 8, 8 rounds of one local step; ``sum, 2 rounds``.
* ``dp``: as ``lora``, with DP-SGD of noise multiplier 0.1.
* ``codec ...``: as ``lora``, through codecs; the attack runs the codec itself to know its noise.
* ``map``: cohort size x rounds x rank of the masked sum, 2 texts a client: token recall.
"""

from __future__ import annotations

import argparse
import os
import statistics

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from attacks_store import Cell, Try, means, run_cells, table
from attacks_victims import Scene

SPAN, PRIOR = Try(name="span", attack="span", options={"order": False}), Try(name="prior", attack="prior")
SUBSPACE = Try(name="subspace", attack="subspace", options={"steps": 50})
SUM = Scene(masked=True, clients=4, batch=2, rounds=8)
# 0.1 is the least that clips no value of these updates: the largest is of the head, 0.087
CODECS = {
    "codec identity": {"name": "identity"},
    "codec 8 bit": {"name": "stochastic_quantizer", "bits": 8, "max_value": 0.1},
    "codec 4 bit": {"name": "stochastic_quantizer", "bits": 4, "max_value": 0.1},
    "codec rotated 4 bit": {"name": "rotated_quantizer", "bits": 4},
    "codec sign": {"name": "sign"},
    "codec top 50%": {"name": "top_k", "density": 0.5, "error_feedback": False},
    "codec top 10%": {"name": "top_k", "density": 0.1, "error_feedback": False},
    "codec svd rank 2": {"name": "svd_truncate", "rank": 2},
}
LINES: dict[str, list[Cell]] = {
    "full": [
        Cell(table="span", name="full", scene=Scene(tuning={"name": "full"}, learning_rate=0.1), tries=(SPAN, PRIOR))
    ],
    "lora": [
        Cell(table="span", name="lora", scene=Scene(rounds=5), tries=(SPAN, PRIOR)),
        Cell(table="span", name="lora, once", scene=Scene(rounds=2), tries=(SPAN,)),
    ],
    "sum": [
        Cell(table="span", name="sum", scene=SUM, tries=(SPAN, PRIOR)),
        Cell(table="span", name="sum, 2 rounds", scene=Scene(masked=True, clients=4, batch=2, rounds=2), tries=(SPAN,)),
    ],
    "dp": [Cell(table="span", name="dp", scene=Scene(rounds=5, noise_multiplier=0.1), tries=(SPAN, PRIOR))],
    "codecs": [
        Cell(table="span", name=name, scene=Scene(rounds=5, compression=options), tries=(SPAN, SUBSPACE, PRIOR))
        for name, options in CODECS.items()
    ],
}
BARS = {"full": (0.99, 0.99), "lora": (0.95, 0.0), "sum": (0.90, 0.0)}


def map_cells(cohorts: list[int], rounds: list[int], ranks: list[int]) -> list[Cell]:
    """Return the cells of the map; fewer rounds are the beginning of more, so one scene serves a whole row."""
    return [
        Cell(
            table="map",
            name=f"rank {rank}, {cohort} clients, {count} rounds",
            scene=Scene(tuning={"name": "lora", "r": rank}, masked=cohort > 1, clients=cohort, batch=2, rounds=count),
            tries=(SPAN,),
        )
        for rank in ranks
        for cohort in cohorts
        for count in rounds
    ]


def drawn(cohorts: list[int], rounds: list[int], ranks: list[int], path: str) -> None:
    """Draw the map to a file: one panel a rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    values = {cell.name: means(cell, "span", "token_recall") for cell in map_cells(cohorts, rounds, ranks)}
    figure, panels = plt.subplots(1, len(ranks), figsize=(3.4 * len(ranks) + 1, 3), squeeze=False, layout="constrained")
    for panel, rank in zip(panels[0], ranks, strict=True):
        found = [[values[f"rank {rank}, {c} clients, {n} rounds"] for n in rounds] for c in cohorts]
        grid = np.array([[statistics.mean(v) if v else np.nan for v in row] for row in found])
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="magma", origin="lower", aspect="auto")
        for (i, j), value in np.ndenumerate(grid):
            panel.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        panel.set_xticks(range(len(rounds)), rounds)
        panel.set_yticks(range(len(cohorts)), cohorts)
        panel.set(xlabel="rounds", ylabel="clients in the sum, 2 texts each", title=f"LoRA of rank {rank}")
    figure.colorbar(image, ax=panels[0].tolist(), label="token recall")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def verdicts(cells: list[Cell]) -> list[str]:
    """Return, for each line with a bar, whether its mean meets it."""
    found = []
    for cell in cells:
        recall, precision = means(cell, "span", "token_recall"), means(cell, "span", "token_precision")
        if not recall:
            continue
        if cell.name == "dp":
            prior = statistics.mean(means(cell, "prior", "token_recall") or [0.0])
            found.append(f"dp: recall {statistics.mean(recall):.3f} is {_word(statistics.mean(recall) <= prior)} prior")
        elif cell.name in BARS:
            bars = BARS[cell.name]
            met = statistics.mean(recall) >= bars[0] and statistics.mean(precision) >= bars[1]
            found.append(f"{cell.name}: {'met' if met else 'MISSED'} (recall {bars[0]}, precision {bars[1]})")
    return found


def _word(met: bool) -> str:
    return "no better than" if met else "BETTER than"


def main() -> None:
    """Run the lines that are asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*LINES], choices=[*LINES, "map"])
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--cohorts", type=int, nargs="*", default=[4, 16, 32])
    parser.add_argument("--rounds", type=int, nargs="*", default=[2, 3, 5])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--map-batches", type=int, default=1)
    parser.add_argument("--budget", type=float, default=1800, help="seconds of the processor")
    parser.add_argument("--show", action="store_true", help="print what is there and run nothing")
    parser.add_argument("--plot", help="draw the map to this file")
    given = parser.parse_args()
    cells = [cell for name in given.only if name in LINES for cell in LINES[name]]
    grid = (given.cohorts, given.rounds, given.ranks)
    if not given.show:
        run_cells(cells, given.batches, given.budget)
        if "map" in given.only:
            run_cells(map_cells(*grid), given.map_batches, given.budget)
    print(table(cells) if cells else table(map_cells(*grid)))
    print("\n".join(verdicts(cells)))
    if given.plot:
        drawn(*grid, given.plot)


if __name__ == "__main__":
    main()
