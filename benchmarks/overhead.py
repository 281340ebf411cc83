"""The engine's overhead: whole-process wall time of ``privfed train`` over a bare PyTorch loop doing the same steps.

The bare loop is what one would write by hand with transformers and peft: the same rows, clients, batches, number
of optimiser steps, padding, averaging and final evaluation, and nothing else. All four commands run in turn, several
times over; the ratio of medians is printed.

    python benchmarks/overhead.py --runs 3
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLIENTS, ROUNDS, STEPS, BATCH, ROWS, LENGTH = 4, 3, 4, 32, 1600, 64

CONFIG = f"""
seed = 3
[model]
name = "minilm"
max_length = {LENGTH}
[data]
name = "pydoc"
limit = {ROWS}
[partition]
name = "iid"
clients = {CLIENTS}
[tuning]
name = "lora"
target_modules = ["query", "value"]
[client]
optimizer = "adamw"
learning_rate = 1e-3
batch_size = {BATCH}
local_steps = {STEPS}
physical_batch_size = {BATCH}
[server]
rounds = {ROUNDS}
evaluate_every = {ROUNDS}
"""
VARIANTS = {
    "privfed, no privacy, no secure aggregation": ["privacy.unit=none", "secagg.name=none"],
    "privfed, DP-SGD": ["privacy.target_epsilon=8.0", "secagg.name=none"],
    "privfed, DP-SGD and secure aggregation": ["privacy.target_epsilon=8.0"],
}
TARGETS = dict(zip(VARIANTS, (1.05, 1.15, 1.20), strict=True))


def bare() -> None:
    """The same steps by hand."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from privfed.data import PARTITIONERS, DataConfig, load_dataset, partition
    from privfed.models import ModelConfig, resolve

    data = load_dataset(DataConfig(name="pydoc", limit=ROWS), seed=3)
    shards = partition(data.train, PARTITIONERS.get("iid").config(clients=CLIENTS), seed=3)
    location = resolve(ModelConfig()).location
    tokenizer = AutoTokenizer.from_pretrained(location)
    torch.manual_seed(3)
    base = AutoModelForSequenceClassification.from_pretrained(
        location, num_labels=len(data.label_names), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = get_peft_model(
        base, LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    )
    encode = lambda texts: tokenizer(list(texts), truncation=True, max_length=LENGTH)["input_ids"]  # noqa: E731
    ids, labels = encode(data.train.texts), torch.tensor(data.train.labels)
    rng = np.random.default_rng(3)

    def batch(rows: list[int], source: list[list[int]]) -> dict[str, torch.Tensor]:
        return tokenizer.pad({"input_ids": [source[r] for r in rows]}, return_tensors="pt")  # type: ignore[no-any-return]

    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for _ in range(ROUNDS):
        start = [p.detach().clone() for p in trained]
        total = [torch.zeros_like(p) for p in trained]
        for shard in shards:
            with torch.no_grad():
                for p, s in zip(trained, start, strict=True):
                    p.copy_(s)
            optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
            order = rng.permutation(shard.indices)
            for step in range(STEPS):
                rows = order[step * BATCH : (step + 1) * BATCH].tolist()
                optimizer.zero_grad()
                cross_entropy(model(**batch(rows, ids)).logits, labels[rows]).backward()
                optimizer.step()
            for t, p in zip(total, trained, strict=True):
                t += p.detach() / len(shards)
        with torch.no_grad():
            for p, t in zip(trained, total, strict=True):
                p.copy_(t)
    model.eval()
    test, truth, right = encode(data.test.texts), torch.tensor(data.test.labels), 0
    order = sorted(range(len(test)), key=lambda i: len(test[i]))
    # privfed scores before the first round and after the last: so does this
    for _ in range(2):
        right = 0
        with torch.no_grad():
            for i in range(0, len(order), 64):
                rows = order[i : i + 64]
                right += int((model(**batch(rows, test)).logits.argmax(1) == truth[rows]).sum())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
    print(json.dumps({"accuracy": right / len(test)}))


def measure(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment())
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare()
        return
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.toml"
        config.write_text(CONFIG)
        seconds: dict[str, list[float]] = {"bare loop": [], **{name: [] for name in VARIANTS}}
        for turn in range(1 - options.warmup, options.runs + 1):
            for name, found in seconds.items():
                out = Path(folder) / "out"
                shutil.rmtree(out, ignore_errors=True)
                took = measure(_command(name, config, out))
                if turn > 0:  # earlier turns warm the file cache
                    found.append(took)
                print(f"{'warm-up' if turn < 1 else f'run {turn}'}: {name}: {took:.1f} s", file=sys.stderr, flush=True)
    reference = statistics.median(seconds["bare loop"])
    for name, found in seconds.items():
        median = statistics.median(found)
        target = f" (target <= {TARGETS[name]:.2f})" if name in TARGETS else ""
        print(
            f"{name:45} median {median:6.1f} s  min {min(found):6.1f}  max {max(found):6.1f}  "
            f"ratio {median / reference:.3f}{target}"
        )


def _command(name: str, config: Path, out: Path) -> list[str]:
    if name == "bare loop":
        return [sys.executable, __file__, "--bare"]
    settings = [part for setting in VARIANTS[name] for part in ("-s", setting)]
    return [sys.executable, "-m", "privfed.cli", "train", str(config), "-o", str(out), *settings]


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    main()
