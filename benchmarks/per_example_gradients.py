"""Per-example gradients of every peft tuner on four kinds of model, against one-at-a-time autograd.

For each of peft's methods and {BERT classifier, GPT-2, Llama, ViT}: whether peft builds it, whether privfed takes it
under example-level DP (or the reason why not), the largest relative error of a tensor's per-example gradients, and
which way they are had; beside it the same for stock Opacus (hooks). Models are tiny and random: exactness does not
depend on their size.

    python benchmarks/per_example_gradients.py
    python benchmarks/per_example_gradients.py --only LORA IA3 --models bert llama --json
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from privfed.errors import ModelError
from privfed.privacy.per_example import PerExampleModel
from privfed.privacy.per_example.coupling import check_independent, comparable

TOLERANCE = 1e-4
LENGTHS = (9, 4, 12, 7)
VOCABULARY, WIDTH, LAYERS, HEADS, CLASSES = 60, 32, 2, 4, 3
MODELS = ("bert", "gpt2", "llama", "vit")
TARGETS = {
    "bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "vit": ["q_proj", "v_proj"],
}
FEEDFORWARD = {
    "bert": ["output.dense"],
    "gpt2": ["mlp.c_proj"],
    "llama": ["down_proj"],
    "vit": ["fc2"],
}
NORMS = {
    "bert": ["LayerNorm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "llama": None,
    "vit": ["layernorm_before", "layernorm_after"],
}
BLOCKS = {"bert": r".*encoder\.layer\.\d+", "gpt2": r".*\.h\.\d+", "llama": r".*layers\.\d+", "vit": r".*layers?\.\d+"}
TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "vit": None}
TABLES = {"bert": "word_embeddings", "gpt2": "wte", "llama": "embed_tokens"}
# the options that a method needs beyond its own defaults, for models of this size
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 100},
    "ADAMSS": {"r": 8, "num_subspaces": 2, "subspace_rank": 1},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CARTRIDGE": {"num_virtual_tokens": 3, "num_frozen_tokens": 1},
    "CPT": {"cpt_token_ids": [1, 2, 3, 4], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 8, "gralora_k": 2},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "LILY": {"r": 4, "num_B": 2},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "LORA": {"r": 4},
    "MISS": {"r": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3, "num_tasks": 2},
    "OFT": {"oft_block_size": 8, "use_cayley_neumann": False},
    "OSF": {"effective_rank": 8},
    "PEANUT": {"r": 4},
    "POLY": {"r": 4, "n_tasks": 1, "n_skills": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PSOFT": {"r": 8},
    "PVERA": {"r": 16},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "RANDLORA": {"r": 8},
    "ROAD": {"group_size": 16},
    "SHADOW": {"r": 4, "shadow_dropout": 0.0},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {},
    "TINYLORA": {"r": 2, "u": 8},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4, 5, 6]},
    "UNILORA": {"r": 4, "theta_d_length": 64},
    "VBLORA": {"r": 4, "num_vectors": 16, "vector_length": 8},
    "VERA": {"r": 16},
    "WAVEFT": {"n_frequency": 20},
    "XLORA": {"xlora_dropout_p": 0.0, "xlora_size": 8, "hidden_size": WIDTH},
}
PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"}
# variants that peft counts as LoRA or IA3, and tunings without peft
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora on all linear layers": ("LORA", {"r": 4, "target_modules": "all-linear"}),
    "dora": ("LORA", {"r": 4, "use_dora": True}),
    "rslora": ("LORA", {"r": 4, "use_rslora": True}),
    "pissa": ("LORA", {"r": 4, "init_lora_weights": "pissa"}),
    "lora with bias": ("LORA", {"r": 4, "lora_bias": True}),
    "lora on the embeddings": ("LORA", {"r": 4, "target_modules": "TABLE"}),
    "p-tuning with an lstm": (
        "P_TUNING",
        {"num_virtual_tokens": 3, "encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix tuning with projection": (
        "PREFIX_TUNING",
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 16},
    ),
}
PLAIN = ("full", "bitfit", "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one method does on one model."""

    method: str
    model: str
    state: str  # exact | wrong | refused | not built
    error: float | None
    ways: str
    reason: str
    opacus: str  # exact | wrong | missing | error


def base_model(kind: str) -> nn.Module:
    """Return a small random model of this kind, without dropout."""
    import transformers as hf

    torch.manual_seed(1)
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind == "bert":
        config: Any = hf.BertConfig(
            vocab_size=VOCABULARY, **shape, intermediate_size=64, num_labels=CLASSES, classifier_dropout=0.0, **quiet
        )
        return hf.BertForSequenceClassification(config)
    if kind == "gpt2":
        config = hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return hf.GPT2LMHeadModel(config)
    if kind == "llama":
        config = hf.LlamaConfig(vocab_size=VOCABULARY, **shape, num_key_value_heads=HEADS, intermediate_size=64)
        return hf.LlamaForCausalLM(config)
    config = hf.ViTConfig(**shape, intermediate_size=64, image_size=16, patch_size=4, num_labels=CLASSES, **quiet)
    return hf.ViTForImageClassification(config)


def losses(module: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return per-example losses: of a class, or the mean over a sequence's own target tokens."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits, labels = module(**inputs).logits, batch["labels"]
    if labels.dim() == 1:
        return cross_entropy(logits, labels, reduction="none")
    logits = logits[:, -labels.shape[1] : -1]  # a soft prompt stands before the sequence
    targets = labels[:, 1:]
    each = cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return each.sum(dim=1) / (targets != -100).sum(dim=1)


def batch_of(kind: str, method: str, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the examples ``rows`` padded to the longest of them."""
    random = torch.Generator().manual_seed(3)
    if kind == "vit":
        images = torch.randn(len(LENGTHS), 3, 16, 16, generator=random)
        return {"pixel_values": images[list(rows)], "labels": torch.arange(len(LENGTHS))[list(rows)] % CLASSES}
    texts = [torch.randint(1, VOCABULARY, (length,), generator=random) for length in LENGTHS]
    width = max(LENGTHS[row] for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : LENGTHS[row]], mask[place, : LENGTHS[row]] = texts[row], 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if method == "MULTITASK_PROMPT_TUNING":
        batch["task_ids"] = torch.tensor(list(rows)) % 2
    if method == "POLY":
        batch["task_ids"] = torch.zeros(len(rows), dtype=torch.long)
    if method == "CPT":
        batch["input_type_mask"] = mask * 4
    batch["labels"] = (
        ids.masked_fill(mask == 0, -100) if TASKS[kind] == "CAUSAL_LM" else torch.tensor(list(rows)) % CLASSES
    )
    return batch


def tuned(kind: str, method: str, options: dict[str, Any]) -> nn.Module:
    """Return the model with this method of peft, its trained values moved at random."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, get_peft_model

    options = dict(options)
    if method not in PROMPTS and method not in ("ADAPTION_PROMPT", "LN_TUNING", "TRAINABLE_TOKENS", "XLORA"):
        options.setdefault("target_modules", TARGETS[kind])
    if method == "TRAINABLE_TOKENS" or options.get("target_modules") == "TABLE":
        options["target_modules"] = [TABLES[kind]]
    if method == "IA3":
        options |= {"target_modules": TARGETS[kind] + FEEDFORWARD[kind], "feedforward_modules": FEEDFORWARD[kind]}
    if method == "LN_TUNING":
        options["target_modules"] = NORMS[kind]
    if method == "SHADOW":
        options["target_modules"] = BLOCKS[kind]
    if TASKS[kind]:
        options["task_type"] = TASKS[kind]
    base = base_model(kind)
    with tempfile.TemporaryDirectory() as folder:
        if method == "XLORA":  # mixes LoRA adapters that are there already
            tuned(kind, "LORA", OPTIONS["LORA"]).save_pretrained(folder)  # type: ignore[operator]
            options["adapters"] = {"0": folder, "1": folder}
            base.config.use_cache = False  # type: ignore[union-attr]
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)](**options)
        return moved(get_peft_model(base, config))


def plain(kind: str, name: str) -> nn.Module:
    """Return a model of which everything, every bias, or the head is trained."""
    module = base_model(kind)
    for parameter_name, parameter in module.named_parameters():
        wanted = {
            "full": True,
            "bitfit": parameter_name.endswith("bias"),
            "head": parameter_name.startswith(("classifier", "lm_head")),
        }[name]
        parameter.requires_grad_(wanted)
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(f"this model has no {'bias' if name == 'bitfit' else 'head of its own'}")
    return moved(module)


def moved(module: nn.Module) -> nn.Module:
    """Move trained values off their start, where a factor of zero would hide the other's gradient."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=random)
    return module.train()


def worst_error(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """Return the largest relative error of a tensor; one whose gradient vanishes is set against the whole."""
    whole = float(torch.stack([g.norm() for g in wanted]).norm())
    worst = 0.0
    for got, want in zip(found, wanted, strict=True):
        if got.shape != want.shape:
            return float("inf")
        worst = max(worst, float((got - want).norm()) / comparable(float(want.norm()), whole))
    return worst


def stock_opacus(build: Callable[[], nn.Module], kind: str, method: str, wanted: Sequence[torch.Tensor]) -> str:
    """Return whether Opacus's hooks, as they come, give these gradients."""
    from opacus import GradSampleModule

    try:
        module = build()
        wrapped = GradSampleModule(module, loss_reduction="sum")
        losses(wrapped, batch_of(kind, method, range(len(LENGTHS)))).sum().backward()
    except Exception as error:  # noqa: BLE001 (whatever it raises is the finding)
        return f"error ({type(error).__name__})"
    found = [getattr(p, "grad_sample", None) for p in module.parameters() if p.requires_grad]
    if any(not isinstance(g, torch.Tensor) for g in found):
        return "missing"
    return "exact" if worst_error(found, wanted) < TOLERANCE else "wrong"


def examine(kind: str, name: str, method: str, build: Callable[[], nn.Module], *, opacus: bool) -> Finding:
    """Build one method, test it, and compare its gradients."""
    say = {"method": name, "model": kind}
    try:
        module = build()
        trained = [p for p in module.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("nothing of this model is trained")
        losses(module, batch_of(kind, method, [0]))
    except Exception as error:  # noqa: BLE001 (whatever peft raises is the finding)
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:150]}"
        return Finding(**say, state="not built", error=None, ways="", reason=reason, opacus="")
    rows = list(range(len(LENGTHS)))
    try:
        wanted = check_independent(module, losses, lambda rows: batch_of(kind, method, rows), len(rows))
        model = PerExampleModel(module)
        batch = batch_of(kind, method, rows)
        model.prove(losses, batch, len(rows), wanted, TOLERANCE)
        found = model.gradients(losses, batch, len(rows))
        ways = model.describe()
        model.close()
    except ModelError as error:
        return Finding(**say, state="refused", error=None, ways="", reason=str(error), opacus="")
    error = worst_error(found, wanted)
    stock = stock_opacus(build, kind, method, wanted) if opacus else ""
    state = "exact" if error < TOLERANCE and len(found) == len(trained) else "wrong"
    return Finding(**say, state=state, error=error, ways=ways, reason="", opacus=stock)


def methods() -> list[str]:
    """Return the names of all of peft's methods."""
    from peft import PeftType

    return sorted(str(kind.value) for kind in PeftType)


def cases(kind: str) -> list[tuple[str, str, Callable[[], nn.Module]]]:
    """Return (name, peft's method, how to build it) of everything that is tried on this kind of model."""
    listed: list[tuple[str, str, Callable[[], nn.Module]]] = [
        (method, method, lambda method=method: tuned(kind, method, OPTIONS.get(method, {}))) for method in methods()
    ]
    listed += [
        (name, method, lambda method=method, options=options: tuned(kind, method, options))
        for name, (method, options) in VARIANTS.items()
    ]
    return listed + [(name, "", lambda name=name: plain(kind, name)) for name in PLAIN]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of methods")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    found: list[Finding] = []
    for kind in options.models:
        for name, method, build in cases(kind):
            if options.only and name not in options.only:
                continue
            finding = examine(kind, name, method, build, opacus=True)
            found.append(finding)
            print(_line(finding), file=sys.stderr if options.json else sys.stdout, flush=True)
    summary = _summary(found)
    if options.json:
        print(json.dumps({"findings": [asdict(f) for f in found], "summary": summary}))
        return
    for line in summary.values():
        print(line)


def _line(found: Finding) -> str:
    error = "" if found.error is None else f"{found.error:.1e}"
    note = found.ways or found.reason
    return f"{found.model:6} {found.method:30} {found.state:10} {error:8} opacus: {found.opacus:22} {note}"


def _summary(found: Sequence[Finding]) -> dict[str, str]:
    known = methods()
    groups: dict[str, list[Finding]] = {name: [f for f in found if f.method == name] for name in known}
    groups = {name: group for name, group in groups.items() if group}

    def good(group: Sequence[Finding], exact: Callable[[Finding], bool]) -> bool:
        built = [f for f in group if f.state != "not built"]
        return bool(built) and all(exact(f) for f in built)

    ours = [name for name, group in groups.items() if good(group, lambda f: f.state == "exact")]
    opacus = [name for name, group in groups.items() if good(group, lambda f: f.opacus == "exact")]
    wrong = sorted({f"{f.method} on {f.model}" for f in found if f.state == "wrong"})
    rest = [name for name in groups if name not in ours]
    return {
        "privfed": f"privfed: {len(ours)} of {len(groups)} peft methods exact on every model that takes them",
        "opacus": f"stock Opacus: {len(opacus)} of {len(groups)} ({', '.join(opacus) or 'none'})",
        "rest": f"not exact with privfed: {', '.join(rest) or 'none'}",
        "wrong": f"silently wrong with privfed: {', '.join(wrong) or 'none'}",
    }


if __name__ == "__main__":
    main()
