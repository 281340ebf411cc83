"""The span attack: what one update gives away, what several rounds do, what a secure-aggregated sum still does.

    python benchmarks/attacks_span.py                     # every line below, one batch each
    python benchmarks/attacks_span.py --only full lora    # some of them
    python benchmarks/attacks_span.py --batches 20 --json # with intervals
    python benchmarks/attacks_span.py --only map          # where accumulation through a sum stops working

Scores are of distinct tokens without special ones: recall, precision; ROUGE-L and exact texts where the second layer
gives texts. ``prior`` guesses from 200 texts of the same kind and sees no update. The lines:

* ``full``: 4 texts, one step of full fine-tuning.
* ``lora``: 4 texts, LoRA of rank 8 on query and value, 5 rounds.
* ``sum``: the masked sum of 4 clients with 2 texts each, LoRA of rank 8, 8 rounds.
* ``dp``: as ``lora``, with DP-SGD of noise multiplier 0.1.
* ``map``: cohort size x rounds x rank of the masked sum, 2 texts a client: token recall.
* ``codecs``: as ``lora``, through codecs.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from attacks_victims import Scene, Victims, tried

LINES: dict[str, Scene] = {
    "full": Scene(tuning={"name": "full"}, learning_rate=0.1),
    "lora": Scene(rounds=5),
    "sum": Scene(masked=True, clients=4, batch=2, rounds=8),
    "dp": Scene(rounds=5, noise_multiplier=0.1),
}
BARS = {"full": (0.99, 0.99), "lora": (0.95, 0.0), "sum": (0.90, 0.0)}
CODECS = {
    "identity": {"name": "identity"},
    "16 bit": {"name": "stochastic_quantizer", "bits": 16, "max_value": 0.25},
    "8 bit": {"name": "stochastic_quantizer", "bits": 8, "max_value": 0.25},
    "4 bit": {"name": "stochastic_quantizer", "bits": 4, "max_value": 0.25},
    "top 50%": {"name": "top_k", "density": 0.5},
}


def line(name: str, scene: Scene, batches: int, attacks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the scores of one line and whether it meets its bar."""
    found = tried(Victims(scene), attacks, range(batches))
    recall, precision = BARS.get(name, (0.0, 0.0))
    span = found["span"]
    met = span["token_recall"] >= recall and span["token_precision"] >= precision
    if name == "dp":
        met = span["token_recall"] <= found["prior"]["token_recall"] + 0.02
    return {"scene": name, "met": bool(met), "attacks": found}


def heat_map(cohorts: list[int], rounds: list[int], ranks: list[int], batches: int) -> list[dict[str, Any]]:
    """Return token recall over cohort size, rounds and rank; fewer rounds are the beginning of more."""
    cells = []
    for rank in ranks:
        for cohort in cohorts:
            scene = Scene(
                tuning={"name": "lora", "r": rank}, masked=cohort > 1, clients=cohort, batch=2, rounds=max(rounds)
            )
            cells += _cells(Victims(scene), rounds, batches)
    return cells


def _cells(victims: Victims, rounds: list[int], batches: int) -> list[dict[str, Any]]:
    from privfed_attacks.inversion import ATTACKS
    from privfed_attacks.scoring import score_texts

    attack, cells = ATTACKS.get("span"), []
    plays = [victims.play(seed) for seed in range(batches)]
    for count in rounds:
        recalls, ranks = [], []
        for seen, truth, setting in plays:
            guess = attack.run(seen[:count], victims.model, setting, attack.config.model_validate({"order": False}))
            recalls.append(score_texts(guess, truth, victims.model.tokenizer)["token_recall"])
            ranks.append(int(guess.facts.get("rank", 0)))
        cells.append(
            {
                "cohort": victims.scene.clients,
                "rounds": count,
                "rank": victims.scene.tuning["r"],
                "token_recall": round(sum(recalls) / len(recalls), 4),
                "directions": ranks,
            }
        )
        print(json.dumps(cells[-1]), flush=True)
    return cells


def drawn(cells: list[dict[str, Any]], path: str) -> None:
    """Draw the map to a file: one panel a rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    ranks = sorted({cell["rank"] for cell in cells})
    rounds, cohorts = (sorted({cell[key] for cell in cells}) for key in ("rounds", "cohort"))
    figure, panels = plt.subplots(1, len(ranks), figsize=(4 * len(ranks), 3.2), squeeze=False, layout="constrained")
    for panel, rank in zip(panels[0], ranks, strict=True):
        table = np.full((len(cohorts), len(rounds)), np.nan)
        for cell in cells:
            if cell["rank"] == rank:
                table[cohorts.index(cell["cohort"]), rounds.index(cell["rounds"])] = cell["token_recall"]
        image = panel.imshow(table, vmin=0, vmax=1, cmap="magma", origin="lower", aspect="auto")
        panel.set_xticks(range(len(rounds)), rounds)
        panel.set_yticks(range(len(cohorts)), cohorts)
        panel.set(xlabel="rounds", ylabel="clients in the sum", title=f"rank {rank}")
    figure.colorbar(image, ax=panels[0].tolist(), label="token recall")
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Run the lines that are asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*LINES], choices=[*LINES, "map", "codecs"])
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--cohorts", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--ranks", type=int, nargs="*", default=[8])
    parser.add_argument("--attacks", nargs="*", default=["span"])
    parser.add_argument("--order", action="store_true", help="put tokens into texts, which takes longer")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", help="draw the map to this file")
    given = parser.parse_args()
    attacks: dict[str, dict[str, Any]] = {name: {} for name in given.attacks}
    if "span" in attacks:
        attacks["span"] = {"order": given.order}
    results: list[dict[str, Any]] = []
    for name in given.only:
        if name == "map":
            cells = heat_map(given.cohorts, given.rounds, given.ranks, given.batches)
            results.append({"scene": "map", "cells": cells})
            if given.plot:
                drawn(cells, given.plot)
            continue
        scenes = (
            {name: LINES[name]}
            if name in LINES
            else {f"codec {key}": Scene(rounds=5, compression=table) for key, table in CODECS.items()}
        )
        for label, scene in scenes.items():
            results.append(line(label, scene, given.batches, attacks))
            if not given.json:
                print(_row(results[-1]), flush=True)
    if given.json:
        print(json.dumps({"results": results}, indent=1))


def _row(result: dict[str, Any]) -> str:
    parts = [
        f"{name}: recall {found['token_recall']:.3f} {found['interval']} precision {found['token_precision']:.3f} "
        f"ROUGE-L {found['rougeL']:.2f} exact {found['exact']:.2f} ({found['cpu_seconds']:.0f} s)"
        for name, found in result["attacks"].items()
    ]
    return f"{result['scene']:<14} {'ok  ' if result['met'] else 'FAIL'} " + "\n                    ".join(parts)


if __name__ == "__main__":
    main()
