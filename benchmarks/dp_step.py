"""The cost of a private step: DP-SGD's clipped sum over a plain backward pass, in time and in peak memory.

Every contender (plain, privfed, Opacus's hooks, Opacus's ghost clipping) runs on its own copy of the same MiniLM
with the same batch, one after the other in one process, several times over; the ratio is the median of each turn's
own ratio to that turn's plain step, in CPU seconds of one thread, so other work on the machine hardly counts. Peak
memory is of a fresh process each, above the model and the batch (Linux). ``text`` sets the plain step (microbatches
sorted by length) against one that pads to the maximum, as a Hugging Face Trainer does with ``padding="max_length"``,
on the same real texts.

    python benchmarks/dp_step.py
    python benchmarks/dp_step.py --cases "lora q,v" full --turns 5 --no-memory
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from torch.nn.functional import cross_entropy

Step = Callable[[], None]
CLIP, CLASSES = 1.0, 20
ALL_LINEAR = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
# case: (batch, tokens, target ratio of privfed)
CASES: dict[str, tuple[int, int, float]] = {
    "lora q,v": (32, 64, 1.02),
    "lora q,v small": (8, 16, 1.05),
    "lora all linear": (32, 64, 1.10),
    "full": (32, 64, 1.45),
    "full but embeddings": (16, 64, 1.45),
    "dora": (32, 64, 1.10),
    "ia3": (32, 64, 1.10),
    "vera": (32, 64, 1.10),
    "prompt tuning": (32, 64, 1.10),
}
CONTENDERS = ("privfed", "opacus hooks", "opacus ghost")
TEXT_ROWS, TEXT_LENGTH, TEXT_BATCH, TEXT_TARGET = 128, 128, 32, 1.5


def model(case: str) -> nn.Module:
    """Return MiniLM, tuned as the case says, without dropout."""
    from peft import IA3Config, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from privfed.models import ModelConfig, resolve

    torch.manual_seed(3)
    base: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        resolve(ModelConfig()).location,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    if case.startswith("full"):
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(case == "full" or ".embeddings." not in name)
        return base.train()
    config: Any = {
        "lora q,v": lambda: LoraConfig(r=8, target_modules=["query", "value"]),
        "lora q,v small": lambda: LoraConfig(r=8, target_modules=["query", "value"]),
        "lora all linear": lambda: LoraConfig(r=8, target_modules=ALL_LINEAR),
        "dora": lambda: LoraConfig(r=8, use_dora=True, target_modules=["query", "value"]),
        "ia3": lambda: IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
        "vera": lambda: VeraConfig(target_modules=["query", "value"]),
        "prompt tuning": lambda: PromptTuningConfig(num_virtual_tokens=10),
    }[case]()
    config.task_type = "SEQ_CLS"
    return get_peft_model(base, config).train()


def losses(module: nn.Module, batch: Any) -> torch.Tensor:
    """Return per-example losses."""
    inputs, labels = batch
    return cross_entropy(module(**inputs).logits, labels, reduction="none")


def random_batch(case: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return a batch without padding."""
    size, tokens, _ = CASES[case]
    random = torch.Generator().manual_seed(4)
    ids = torch.randint(1000, 30000, (size, tokens), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(size) % CLASSES


def plain(case: str) -> Step:
    """Return a step that leaves the batch's mean gradient on the trained tensors."""
    module, batch = model(case), random_batch(case)
    trained = [p for p in module.parameters() if p.requires_grad]

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        losses(module, batch).mean().backward()

    return step


def privfed(case: str) -> Step:
    """Return privfed's clipped sum."""
    from privfed.privacy.per_example import PerExampleModel

    module, batch = model(case), random_batch(case)
    engine = PerExampleModel(module)
    sum_D = torch.zeros(sum(p.numel() for p in engine.parameters), dtype=torch.float64)

    def step() -> None:
        sum_D.zero_()
        engine.clipped_sum(losses, batch, CASES[case][0], CLIP, into_D=sum_D)

    return step


def opacus_hooks(case: str) -> Step:
    """Return the clipped sum by Opacus's per-example gradients, clipped as its optimiser does."""
    from opacus import GradSampleModule

    module, batch = model(case), random_batch(case)
    wrapped = GradSampleModule(module, loss_reduction="sum")
    trained = [p for p in module.parameters() if p.requires_grad]

    def step() -> None:
        for parameter in trained:
            parameter.grad = parameter.grad_sample = None
        losses(wrapped, batch).sum().backward()
        gradients = [p.grad_sample for p in trained]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        factors = (CLIP / (norms + 1e-6)).clamp(max=1.0)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = torch.einsum("i,i...", factors, gradient)

    return step


def opacus_ghost(case: str) -> Step:
    """Return the clipped sum by Opacus's ghost norms and a second backward pass."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    module, batch = model(case), random_batch(case)
    wrapped = GradSampleModuleFastGradientClipping(
        module, max_grad_norm=CLIP, use_ghost_clipping=True, loss_reduction="sum"
    )
    trained = [p for p in module.parameters() if p.requires_grad]

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        found = losses(wrapped, batch)
        found.sum().backward(retain_graph=True)
        factors = wrapped.get_clipping_coef()
        for parameter in trained:
            parameter.grad = None
        wrapped.disable_hooks()
        (factors * found).sum().backward()
        wrapped.enable_hooks()

    return step


MAKERS: dict[str, Callable[[str], Step]] = {
    "plain": plain,
    "privfed": privfed,
    "opacus hooks": opacus_hooks,
    "opacus ghost": opacus_ghost,
}


def time_case(case: str, turns: int) -> dict[str, float | str]:
    """Return each contender's median ratio to the plain step, or why there is none."""
    steps: dict[str, Step] = {}
    ratios: dict[str, float | str] = {}
    for name, make in MAKERS.items():
        try:
            step = make(case)
            step()  # warm-up, and the proof that it runs at all
            steps[name] = step
        except Exception as error:  # what Opacus cannot do is part of the finding
            if name in ("plain", "privfed"):
                raise
            ratios[name] = f"- ({type(error).__name__})"
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns):
        names = list(steps) if turn % 2 == 0 else list(reversed(steps))
        for name in names:
            started = time.process_time()
            steps[name]()
            seconds[name].append(time.process_time() - started)
    for name in steps:
        ratios[name] = statistics.median(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True))
    return {"plain seconds": statistics.median(seconds["plain"]), **ratios}


def peak_memory(case: str, contender: str) -> float | None:
    """Return MiB above the model and the batch that two steps took at most, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", contender, "--cases", case]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    return float(found.stdout.split()[-1]) if found.returncode == 0 and found.stdout else None


def _measure_memory(case: str, contender: str) -> None:
    step = MAKERS[contender](case)
    with torch.no_grad():  # what a first pass imports or allocates once
        inputs, labels = random_batch(case)
        losses(model(case), ({key: value[:1] for key, value in inputs.items()}, labels[:1]))
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is counted from here
    before = _memory("VmRSS")
    for _ in range(2):
        step()
    print(_memory("VmHWM") - before)


def _memory(key: str) -> float:
    """Return an entry of the process's status in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def time_text(turns: int) -> dict[str, float]:
    """Return seconds of the plain step on real texts: padded to the maximum, and as privfed does it."""
    import numpy as np
    from transformers import AutoTokenizer

    from privfed.data import DataConfig, load_dataset
    from privfed.models import ModelConfig, resolve
    from privfed.models.examples import TextExamples, microbatches
    from privfed.models.examples import losses as text_losses

    data = load_dataset(DataConfig(name="pydoc", limit=2000), seed=3)
    tokenizer = AutoTokenizer.from_pretrained(resolve(ModelConfig()).location)
    examples = TextExamples(
        data.train.texts, np.asarray(data.train.labels, dtype=np.int64) % CLASSES, tokenizer, TEXT_LENGTH
    )
    module = model("lora q,v")
    trained = [p for p in module.parameters() if p.requires_grad]
    rng = np.random.default_rng(3)
    mean_losses: dict[str, list[float]] = {"to the maximum": [], "sorted": []}

    def padded(rows: Any) -> None:
        total = 0.0
        for start in range(0, len(rows), TEXT_BATCH):
            piece = rows[start : start + TEXT_BATCH]
            batch = examples.batch(piece)
            inputs = {
                key: nn.functional.pad(value, (0, TEXT_LENGTH - value.shape[1])) for key, value in batch.inputs.items()
            }
            found = cross_entropy(module(**inputs).logits, batch.labels_B, reduction="sum") / len(rows)
            found.backward()
            total += float(found.detach())
        mean_losses["to the maximum"].append(total)

    def by_length(rows: Any) -> None:
        total = 0.0
        for piece in microbatches(examples, rows, TEXT_BATCH):
            found = text_losses(examples, module, examples.batch(piece)).sum() / len(rows)
            found.backward()
            total += float(found.detach())
        mean_losses["sorted"].append(total)

    seconds: dict[str, list[float]] = {"to the maximum": [], "sorted": []}
    for _ in range(turns):
        rows = rng.choice(len(examples), TEXT_ROWS, replace=False)
        for name, step in (("to the maximum", padded), ("sorted", by_length)):
            for parameter in trained:
                parameter.grad = None
            started = time.process_time()
            step(rows)
            seconds[name].append(time.process_time() - started)
    pairs = list(zip(seconds["to the maximum"], seconds["sorted"], strict=True))
    gaps = [abs(a - b) for a, b in zip(mean_losses["to the maximum"], mean_losses["sorted"], strict=True)]
    return {
        "speed-up": statistics.median(a / b for a, b in pairs),
        "seconds, padded": statistics.median(a for a, _ in pairs),
        "seconds, sorted": statistics.median(b for _, b in pairs),
        "mean tokens": float(examples.lengths.mean()),
        "largest loss difference": max(gaps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=[*CASES, "text"])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if options.memory_of:
        _measure_memory(options.cases[0], options.memory_of)
        return
    for case in options.cases:
        if case == "text":
            found = time_text(options.turns)
            facts = "  ".join(f"{key} {value:.3g}" for key, value in found.items())
            print(f"plain step, pydoc, batch {TEXT_ROWS}, max {TEXT_LENGTH} (target >= {TEXT_TARGET}): {facts}")
            continue
        _print_case(case, options.turns, memory=not options.no_memory)


def _print_case(case: str, turns: int, *, memory: bool) -> None:
    size, tokens, target = CASES[case]
    ratios = time_case(case, turns)
    peaks = {name: peak_memory(case, name) if memory else None for name in MAKERS}
    cells = []
    for name in CONTENDERS:
        ratio, peak, base = ratios[name], peaks[name], peaks["plain"]
        cell = ratio if isinstance(ratio, str) else f"{ratio:.3f}"
        if peak is not None and base and not isinstance(ratio, str):
            cell += f" (memory {peak / base:.2f})"
        cells.append(f"{name} {cell}")
    title = f"{case}, {size} x {tokens}"
    print(
        f"{title:28} plain {1e3 * float(ratios['plain seconds']):6.0f} ms  target {target:.2f}  {'  '.join(cells)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
