"""Gradient matching, one text at a time, and every tuning under the attacks that fit it.

    python benchmarks/attacks_matching.py                       # go on with 20 texts each, and print the tables
    python benchmarks/attacks_matching.py --only matching --show
    python benchmarks/attacks_matching.py --only best           # 2 texts: each tuning, the best attack and the prior
    python benchmarks/attacks_matching.py --package             # with TAG of the package breaching beside ours

*matching*: B = 1, texts of 6 to 10 tokens, their number known, after ``WARM`` rounds (at first LoRA's B is 0).
``bag recall`` counts each token as often as it is there; ``prior`` sees no update. DLG is ``l2`` and TAG is ``tag``,
without the penalty, the moves and the words tried at the end; ``cosine`` has all of them. *best*: what one step of each
tuning gives away to what suits it: the span attack where a trained matrix sees single tokens, matching elsewhere.
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from attacks_store import Cell, Try, means, run_cells, table
from attacks_victims import Scene

WARM, STEPS = 2, 150
LORA = {"name": "lora", "r": 8}
TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": LORA,
    "ffa_lora": {"name": "ffa_lora", "r": 8},
    "bitfit": {"name": "bitfit"},
    "prompt": {"name": "prompt_tuning", "num_virtual_tokens": 10},
    "adapter": {"name": "adapter"},
}
BARE = {"norm_weight": 0.0, "moves": 0, "polish": 0, "steps": STEPS, "starts": 1}
BEST = {"objective": "cosine", "steps": STEPS, "rounds": 1, "polish": 32, "starts": 4}
PRIOR = Try(name="prior", attack="prior")
SPAN = Try(name="span", attack="span")
MATCHING = Try(name="cosine", attack="matching", options=BEST, skip=WARM)
TRIES = (
    Try(name="dlg", attack="matching", options={"objective": "l2", **BARE}, skip=WARM),
    Try(name="tag", attack="matching", options={"objective": "tag", **BARE}, skip=WARM),
    MATCHING,
    PRIOR,
)
BARS = {"lora": 0.9, "bitfit": 0.5}


def short(tuning: str, batch: int, **options: Any) -> Scene:
    """Return a scene of short texts."""
    return Scene(
        tuning=TUNINGS[tuning],
        batch=batch,
        max_tokens=10,
        rounds=1 + WARM,
        learning_rate=0.1,
        lengths_known=True,
        **options,
    )


def matching_cells(package: bool) -> list[Cell]:
    """Return LoRA and BitFit, one text each, under every objective."""
    outside: tuple[Try, ...] = ()
    if package:
        from attacks_breaching import tag

        outside = (Try(name="tag, breaching", attack=tag(STEPS), options={"steps": STEPS}, skip=WARM),)
    return [Cell(table="matching", name=name, scene=short(name, 1), tries=(*TRIES, *outside)) for name in BARS]


def best_cells() -> list[Cell]:
    """Return every tuning, two texts each, under what suits it."""
    spanned = {"full", "lora"}
    return [
        Cell(
            table="best",
            name=name,
            scene=short(name, 2),
            tries=(*((SPAN,) if name in spanned else (MATCHING,)), PRIOR),
        )
        for name in TUNINGS
    ]


def verdicts(cells: list[Cell]) -> list[str]:
    """Return whether the bars are met."""
    lines = []
    for cell in cells:
        found = {each.name: means(cell, each.name, "bag_recall") for each in cell.tries}
        score = {name: statistics.mean(values) for name, values in found.items() if values}
        if "cosine" in score:
            beyond = all(score["cosine"] > score[name] for name in ("dlg", "tag", "prior") if name in score)
            word = "met" if score["cosine"] >= BARS[cell.name] else "MISSED"
            lines.append(f"{cell.name}: bag recall >= {BARS[cell.name]} {word}; beyond DLG, TAG and prior: {beyond}")
    return lines


def main() -> None:
    """Run the tables that are asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["matching", "best"], choices=["matching", "best"])
    parser.add_argument("--tunings", nargs="*", choices=[*TUNINGS])
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--budget", type=float, default=1800, help="seconds of the processor")
    parser.add_argument("--package", action="store_true", help="TAG of the package breaching beside ours")
    parser.add_argument("--show", action="store_true", help="print what is there and run nothing")
    given = parser.parse_args()
    for name in given.only:
        cells = matching_cells(given.package) if name == "matching" else best_cells()
        cells = [cell for cell in cells if not given.tunings or cell.name in given.tunings]
        if not given.show:
            run_cells(cells, given.batches, given.budget)
        print(table(cells, ("token_recall", "token_precision", "bag_recall", "rougeL")))
        if name == "matching":
            print("\n".join(verdicts(cells)))


if __name__ == "__main__":
    main()
