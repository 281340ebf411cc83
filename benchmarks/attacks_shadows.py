"""Shadow models side by side against one after the other: MiniLM on pydoc, for a head and for LoRA.

    python benchmarks/attacks_shadows.py           # 64 models; 1000 steps of a head, 40 of LoRA
    python benchmarks/attacks_shadows.py --steps 12 --cases lora

Each arm is a process of its own, timed from its start to its end: imports, data, model, tokens, what is cached of the
frozen base, training, and the loss of every query on every model. *One after the other* is the clients' own trainer
(``LocalTrainer``) in one process, which loads and caches once, as generously as side by side does. Both arms take the
same steps on the same rows: the largest difference of a trained value is printed beside what was learned. One thread;
seconds are of the processor, wall clock beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
TARGET = 0.35
CASES = ("head", "lora")
STEPS = {"head": 1000, "lora": 40}


def prepare(case: str, examples: int) -> tuple[Any, Any, str | None]:
    """Return (module, examples, prefix of the head's names), with the frozen part run once."""
    from privfed.data import DataConfig, load_dataset
    from privfed.models import ModelConfig
    from privfed.models.examples import head_features
    from privfed.models.loading import load_model
    from privfed.models.prefix import attach, find_prefix
    from privfed.models.tasks import build_examples
    from privfed.tuning import TUNINGS

    data = load_dataset(DataConfig(name="pydoc", limit=examples), seed=3)
    config = ModelConfig(name="minilm", max_length=64)
    loaded = load_model(config, label_names=data.label_names, seed=1)
    rows = build_examples(data.train, data.kind, loaded, config)
    if case == "head":
        tuning = TUNINGS.get("head")
        tuned = tuning.apply(loaded, tuning.config(), 1)
        head = tuned.model.get_submodule(tuned.head)
        return head, head_features(tuned.model, head, rows), ""
    tuning = TUNINGS.get("lora")
    options = {"r": 8, "target_modules": ["query", "value"], "layers_to_transform": [5]}
    tuned = tuning.apply(loaded, tuning.config(**options), 1)
    assert attach(tuned.model, find_prefix(tuned.model, tuned.head), rows)
    return tuned.model, rows, tuned.head


def train(arm: str, module: Any, examples: Any, head: str | None, models: int, steps: int) -> tuple[Any, Any]:
    """Return each model's trained values [K, D] and losses [K, Q]."""
    import numpy as np
    import torch

    from privfed.federation.local import LocalTrainer
    from privfed.models.examples import microbatches
    from privfed.rng import PrivateStream, experiment_rng
    from privfed.schedule import ClientConfig
    from privfed.tuning.layout import read_flat, write_flat
    from privfed.types import Shard
    from privfed_attacks.shadows import in_out_matrix, train_side_by_side

    members_KQ = in_out_matrix(max(models, 2), len(examples), experiment_rng(1, "in-out"))[:models]
    config = ClientConfig(optimizer="adamw", learning_rate=2e-3, batch_size=16, local_steps=steps)
    streams = [PrivateStream(bytes(32), "shadow", k) for k in range(models)]
    if arm == "side":
        rngs = [stream.generator() for stream in streams]
        found = train_side_by_side(module, examples, members_KQ, config, rngs, head_prefix=head)
        return found.flat(), found.losses(examples)
    start_D = read_flat(module)
    trainer = LocalTrainer(module, head, examples, config, None)
    ends, losses_KQ = [], np.empty((models, len(examples)))
    for k, stream in enumerate(streams):
        shard = Shard(client_id=str(k), indices=np.flatnonzero(members_KQ[k]))
        ends.append(start_D + trainer.run(start_D, shard, stream, lambda *_: None))
        write_flat(module, ends[-1])
        module.eval()
        with torch.no_grad():
            for rows in microbatches(examples, np.arange(len(examples)), 64):
                losses_KQ[k, rows] = examples.losses(module, examples.batch(rows)).numpy()
    return np.stack(ends), losses_KQ


def run_arm(arm: str, case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one arm in a process of its own and return its times and results."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "arm.npz"
        models = 1 if arm == "alone" else options.models
        command = [sys.executable, __file__, "--arm", arm, "--out", str(out), "--cases", case]
        command += [
            "--models",
            str(models),
            "--steps",
            str(options.steps or STEPS[case]),
            "--examples",
            str(options.examples),
        ]
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run(command, check=True)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - started
        with np.load(out) as held:
            found = {name: held[name] for name in held.files}
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "wall": wall, **found}


def _arm(options: argparse.Namespace) -> None:
    import warnings

    import numpy as np
    import torch
    from transformers.utils import logging as hf_logging

    warnings.simplefilter("ignore")
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    torch.set_num_threads(1)
    module, examples, head = prepare(options.cases[0], options.examples)
    ready = time.process_time()
    flat, losses = train(options.arm, module, examples, head, options.models, options.steps)
    np.savez(options.out, flat=flat, losses=losses, training=time.process_time() - ready)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=64)
    parser.add_argument("--steps", type=int, help="of each model; by default 1000 of a head and 40 of LoRA")
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--arm", choices=("side", "one", "alone"), help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        _arm(options)
        return
    for case in options.cases:
        _print_case(case, options)


def _print_case(case: str, options: argparse.Namespace) -> None:
    import numpy as np

    side, one, alone = (run_arm(arm, case, options) for arm in ("side", "one", "alone"))
    moved = float(np.ptp(one["flat"], axis=0).max())
    facts = {
        "case": case,
        "models": options.models,
        "steps": options.steps or STEPS[case],
        "side by side, seconds": round(side["cpu"], 1),
        "one after the other, seconds": round(one["cpu"], 1),
        "ratio, whole process": round(side["cpu"] / one["cpu"], 3),
        "target": TARGET,
        "ratio, wall clock": round(side["wall"] / one["wall"], 3),
        "ratio, training and losses alone": round(float(side["training"]) / float(one["training"]), 3),
        "ratio to as many processes (one measured)": round(side["cpu"] / (options.models * alone["cpu"]), 4),
        "largest difference of a trained value": float(np.abs(side["flat"] - one["flat"]).max()),
        "models differ by": moved,
        "largest difference of a loss": float(np.abs(side["losses"] - one["losses"]).max()),
    }
    print(json.dumps(facts, indent=2), flush=True)


if __name__ == "__main__":
    main()
