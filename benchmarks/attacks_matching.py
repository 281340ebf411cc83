"""Gradient matching, one text at a time, and every tuning and codec under the attacks that fit it.

    python benchmarks/attacks_matching.py                          # B = 1: each tuning, each objective
    python benchmarks/attacks_matching.py --texts 20 --json        # with intervals
    python benchmarks/attacks_matching.py --table codecs           # 4 texts, 5 rounds, LoRA: each codec

``bag`` is the recall of the text's tokens, each counted as often as it is there; ``prior`` sees no update. With one
text DLG is ``l2`` and TAG is ``tag``, without the penalty, the moves and the words tried at the end; ``cosine`` here
has all of them. The adapter and LoRA are attacked after ``--warm`` rounds, for at the start B is 0.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from attacks_victims import Scene, Victims, tried

TUNINGS: dict[str, dict[str, Any]] = {
    "bitfit": {"name": "bitfit"},
    "prompt": {"name": "prompt_tuning", "num_virtual_tokens": 10},
    "adapter": {"name": "adapter"},
    "ffa_lora": {"name": "ffa_lora", "r": 8},
    "lora": {"name": "lora", "r": 8},
}
BARE = {"norm_weight": 0.0, "moves": 0, "polish": 0}
CODECS = {
    "identity": {"name": "identity"},
    "8 bit": {"name": "stochastic_quantizer", "bits": 8, "max_value": 0.25},
    "4 bit": {"name": "stochastic_quantizer", "bits": 4, "max_value": 0.25},
    "sign": {"name": "sign"},
    "top 50%": {"name": "top_k", "density": 0.5},
    "top 10%": {"name": "top_k", "density": 0.1},
}


def matching(names: list[str], texts: int, steps: int, warm: int) -> list[dict[str, Any]]:
    """Return the scores of each objective on each tuning."""
    from privfed_attacks.inversion import ATTACKS
    from privfed_attacks.scoring import score_texts

    options = {
        "dlg": {"objective": "l2", **BARE},
        "tag": {"objective": "tag", **BARE},
        "cosine": {"objective": "cosine", "moves": 10, "rounds": 2},
    }
    rows = []
    for name in names:
        victims = Victims(Scene(tuning=TUNINGS[name], batch=1, rounds=1 + warm, learning_rate=0.1))
        for label, given in {**options, "prior": None}.items():
            plugin = ATTACKS.get("prior" if given is None else "matching")
            table = plugin.config.model_validate({} if given is None else {**given, "steps": steps})
            found = []
            for seed in range(texts):
                seen, truth, setting = victims.play(seed)
                guess = plugin.run(seen[warm:] if given else seen, victims.model, setting, table)
                found.append(score_texts(guess, truth, victims.model.tokenizer))
            mean = {key: round(sum(row[key] for row in found) / texts, 4) for key in found[0]}
            rows.append({"tuning": name, "attack": label, "texts": texts, **mean})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def codecs(texts: int) -> list[dict[str, Any]]:
    """Return the scores of the test of tokens and of the subspace attack through each codec."""
    rows = []
    for name, table in CODECS.items():
        victims = Victims(Scene(compression=table, rounds=5))
        found = tried(victims, {"span": {"order": False}, "subspace": {}}, range(texts))
        rows.append({"codec": name, **found})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Run the table that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=["tunings", "codecs"], default="tunings")
    parser.add_argument("--tunings", nargs="*", default=[*TUNINGS], choices=[*TUNINGS])
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print everything once more as one object")
    given = parser.parse_args()
    rows = (
        codecs(given.texts)
        if given.table == "codecs"
        else matching(given.tunings, given.texts, given.steps, given.warm)
    )
    if given.json:
        print(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
