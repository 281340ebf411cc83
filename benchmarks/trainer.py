"""The plain step against ``transformers.Trainer``: the same model, rows, batches, optimiser and steps on real text.

The Trainer runs as it comes: padding to the longest text of the batch (its default collator) or to the maximum
(``max_length``). privfed sorts a batch by length and takes it in pieces, and runs blocks below the first trained
parameter once for all steps, which is counted in. CPU seconds of one thread, all contenders in turn; the weights they
end with are compared, so that a faster step is the same step.

    python benchmarks/trainer.py
    python benchmarks/trainer.py --turns 3 --steps 36
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

ROWS, LENGTH, BATCH, PIECE, RATE, TARGET = 1200, 128, 32, 8, 1e-3, 1.5
CASES = {"every block tuned": "", "the last two blocks tuned": ", layers_to_transform = [4, 5]"}
CONFIG = """
seed = 3
[model]
name = "minilm"
max_length = {length}
[data]
name = "pydoc"
limit = {rows}
[partition]
name = "iid"
clients = 1
[tuning]
name = "lora"
target_modules = ["query", "value"]
{layers}
[client]
optimizer = "adamw"
learning_rate = {rate}
batch_size = {batch}
local_steps = {steps}
physical_batch_size = {piece}
[privacy]
unit = "none"
[secagg]
name = "none"
"""


def parts(layers: str, steps: int) -> tuple[Any, Any]:
    """Return the configuration and the data."""
    import tomllib

    from privfed.config import parse_config
    from privfed.federation.material import gather

    layers = layers.removeprefix(", ")
    text = CONFIG.format(length=LENGTH, rows=ROWS, rate=RATE, batch=BATCH, steps=steps, piece=PIECE, layers=layers)
    config = parse_config(tomllib.loads(text), where="benchmark")
    return config, gather(config)


def ours(config: Any, material: Any) -> tuple[float, np.ndarray, list[Any]]:
    """Train as a client does; return CPU seconds, the trained values and the batches it took."""
    from privfed.federation.local import LocalTrainer
    from privfed.federation.progress import Silent
    from privfed.federation.workbench import build
    from privfed.rng import PrivateStream
    from privfed.tuning.layout import read_flat

    started = time.process_time()
    bench = build(config, material, Silent())
    loaded = time.process_time()
    module = bench.tuned.model
    trainer = LocalTrainer(module, bench.tuned.head, bench.train, config.client, None)
    shard, stream = material.shards[0], lambda: PrivateStream(bytes(32), "benchmark")
    batches = [rows.tolist() for rows in trainer._batches(shard, stream())]
    trainer.run(read_flat(module), shard, stream(), lambda *_: None)
    seconds = time.process_time() - loaded + prefix_seconds(bench, loaded - started)
    return seconds, read_flat(module), batches


def prefix_seconds(bench: Any, built: float) -> float:
    """Return the share of set-up that the frozen blocks took: what their states cost, measured by doing it again."""
    from privfed.models.prefix import attach, find_prefix

    model, head = bench.tuned.model, bench.tuned.head
    prefix = find_prefix(model, head)
    if prefix is None:
        return 0.0
    started = time.process_time()
    attach(model, prefix, bench.train, bench.test)
    return min(built, time.process_time() - started)


def theirs(config: Any, material: Any, batches: list[Any], padding: str) -> tuple[float, np.ndarray]:
    """Train the same rows in the same batches with a Trainer; return CPU seconds and the trained values."""
    from torch.utils.data import SequentialSampler
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from privfed.federation.workbench import load_tuned
    from privfed.tuning.layout import read_flat

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    loaded, tuned = load_tuned(config, material)
    split = material.dataset.train
    tokenizer = loaded.tokenizer
    rows = [
        {**tokenizer(split.texts[i], truncation=True, max_length=LENGTH), "labels": int(split.labels[i])}
        for batch in batches
        for i in batch
    ]
    collate = DataCollatorWithPadding(tokenizer, padding=padding, max_length=LENGTH if padding != "longest" else None)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=len(batches),
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=config.client.weight_decay,
            max_grad_norm=0.0,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = InOrder(model=tuned.model, args=arguments, train_dataset=rows, data_collator=collate)
        started = time.process_time()
        trainer.train()
        return time.process_time() - started, read_flat(tuned.model)


def main() -> None:
    """Run all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for case, layers in CASES.items():
        config, material = parts(layers, options.steps)
        seconds: dict[str, list[float]] = {"privfed": [], "longest": [], "max_length": []}
        apart = 0.0
        for _ in range(options.turns):
            mine, values_D, batches = ours(config, material)
            seconds["privfed"].append(mine)
            for padding in ("longest", "max_length"):
                spent, other_D = theirs(config, material, batches, padding)
                seconds[padding].append(spent)
                apart = max(apart, float(np.abs(values_D - other_D).max() / np.abs(other_D).max()))
        print(f"{case}: {options.steps} steps of {BATCH} texts, CPU seconds (median of {options.turns})")
        base = statistics.median(seconds["privfed"])
        for name, found in seconds.items():
            label = "privfed" if name == "privfed" else f"Trainer, padding={name}"
            middle = statistics.median(found)
            print(f"  {label:<30} {middle:7.1f} s   {middle / base:5.2f} x privfed's")
        print(f"  largest difference of a trained value, over the largest value: {apart:.1e} (target ratio {TARGET} x)")


if __name__ == "__main__":
    main()
