"""Every method of peft 0.21 by its own lower-case name, options by peft's names passed through.

One entry a method: what it is, whether averaging its factors averages the model (for every option), what it takes.
Those with a file of their own (``lora`` and what is built on it) are not listed; a test compares this list with
peft's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import create_model

from privfed.errors import ConfigError, ModelError
from privfed.tuning import ALL_TASKS, TEXT, TUNINGS, TunedModel, Tuning
from privfed.tuning.peft_options import SUPPLIED, VIRTUAL_TOKENS, PeftTable, checker

if TYPE_CHECKING:
    import torch
    from torch import nn

    from privfed.models.loading import LoadedModel

CAUSAL = frozenset({"causal_lm"})
# learned vectors in front of the input, which peft puts there as embeddings: the model then sees no token numbers
EMBEDDED_PROMPTS = ("cpt", "multitask_prompt_tuning", "p_tuning", "prompt_tuning")
WITH_TASK_IDS = ("multitask_prompt_tuning", "poly")


@dataclass(frozen=True, slots=True)
class Method:
    """One method of peft.

    Attributes:
        summary: One line.
        linear: As in :class:`privfed.tuning.Tuning`.
        tasks: As there.
    """

    summary: str
    linear: bool = False
    tasks: frozenset[str] = ALL_TASKS


METHODS: dict[str, Method] = {
    "adalora": Method("AdaLoRA: W + P diag(L) Q; its schedule of ranks does not run, so the rank stays init_r."),
    "adamss": Method("AdaMSS: low-rank updates in subspaces found by clustering W's singular vectors."),
    "adaption_prompt": Method("LLaMA-Adapter: gated prompts inside the last attention layers.", tasks=CAUSAL),
    "beft": Method("BEFT: one added bias in each value projection.", linear=True),
    "boft": Method("BOFT: W times butterfly-factorised orthogonal matrices."),
    "c3a": Method("C3A: W plus block-circulant matrices.", linear=True),
    "cartridge": Method("Cartridge: trained keys and values in front of every layer's cache.", linear=True, tasks=TEXT),
    "cpt": Method("Context-aware prompt tuning: shifts of real tokens' embeddings, kept small.", tasks=CAUSAL),
    "deft": Method("DEFT: part of W projected out and replaced by a low-rank update."),
    "delora": Method("DeLoRA: low-rank update with normalised factors and a trained strength."),
    "fourierft": Method("FourierFT: W plus the inverse transform of a few trained frequencies.", linear=True),
    "frod": Method("FRoD: W in a joint decomposition over layers, trained in a sparse core.", linear=True),
    "glora": Method("GLoRA: trained scales and shifts of weights and activations."),
    "gralora": Method("GraLoRA: LoRA of each block of W apart."),
    "hira": Method("HiRA: W plus W times (element by element) a low-rank matrix."),
    "hra": Method("HRA: W times trained Householder reflections."),
    "ia3": Method("IA3: trained scales of keys, values and feed-forward activations.", linear=True),
    "lily": Method("Lily: LoRA with factors shared between layers and routed by the input."),
    "ln_tuning": Method("LN tuning: weights and biases of the normalisation layers.", linear=True),
    "loha": Method("LoHa (FedPara): W plus the element-wise product of two low-rank matrices."),
    "lokr": Method("LoKr: W plus a Kronecker product, one factor low-rank."),
    "miss": Method("MiSS: W plus one small matrix repeated along its inputs.", linear=True),
    "multitask_prompt_tuning": Method("Multitask prompt tuning: a shared prompt times a task's own.", tasks=TEXT),
    "oft": Method("OFT: W times trained block-orthogonal matrices."),
    "osf": Method("OSF: the smaller singular directions of W trained, the large ones kept."),
    "p_tuning": Method("P-tuning: a soft prompt from a small trained encoder.", tasks=TEXT),
    "peanut": Method("PEANuT: W plus a small trained network of W itself."),
    "poly": Method("Poly: a trained mixture of several LoRA adapters.", tasks=TEXT),
    "prefix_tuning": Method("Prefix tuning: trained keys and values in front of every layer's.", tasks=TEXT),
    "prompt_tuning": Method("Prompt tuning: trained embeddings in front of the input.", linear=True, tasks=TEXT),
    "psoft": Method("PSOFT: orthogonal fine-tuning in W's principal subspace."),
    "pvera": Method("PVeRA: VeRA whose scales are drawn at random in training."),
    "randlora": Method("RandLoRA: W plus a full-rank sum of fixed random factors with trained scales."),
    "road": Method("RoAd: outputs rotated and scaled in pairs."),
    "shadow": Method("Shadow: a small trained network beside a decoder's blocks.", tasks=TEXT),
    "shira": Method("SHiRA: a few trained entries of W.", linear=True),
    "supertuning": Method("Supertuning: the entries of W largest in magnitude, optionally with LoRA."),
    "tinylora": Method("TinyLoRA: a few trained numbers a layer between singular vectors of W.", linear=True),
    "trainable_tokens": Method("Trainable tokens: chosen rows of the token embedding.", linear=True, tasks=TEXT),
    "unilora": Method("Uni-LoRA: LoRA factors all read from one trained vector."),
    "vblora": Method("VB-LoRA: LoRA factors mixed from a bank of trained vectors."),
    "vera": Method("VeRA: fixed random factors, shared by layers, with trained scales."),
    "waveft": Method("WaveFT: W plus the inverse wavelet transform of a few trained coefficients.", linear=True),
    "xlora": Method("X-LoRA: refused, as it mixes LoRA adapters that were trained before."),
}


NO_XLORA = (
    'tuning.name = "xlora" mixes LoRA adapters that were trained before, and a run trains one: '
    'use tuning.name = "lora".'
)


def register(kind: str, method: Method) -> None:
    """File the peft type ``kind`` under its own name."""
    named: Any = (Literal[kind], kind)
    table = create_model(f"{kind.title().replace('_', '')}Config", __base__=PeftTable, name=named)
    table.__doc__ = f"Options of peft's {kind}, by peft's names."

    def apply(loaded: LoadedModel, config: Any, seed: int) -> TunedModel:
        return _apply(kind, loaded, config.options(), seed)

    TUNINGS.register(kind)(
        Tuning(
            config=table,
            apply=apply,
            linear=method.linear,
            tasks=method.tasks,
            check=checker(kind),
            summary=method.summary,
            example={"token_indices": [5]} if kind == "trainable_tokens" else {},
            unavailable=NO_XLORA if kind == "xlora" else "",
        )
    )


def _apply(kind: str, loaded: LoadedModel, given: dict[str, Any], seed: int) -> TunedModel:
    """Wrap the model.

    Raises:
        ConfigError: As the table's check.
        ModelError: If the method does not fit the model.
    """
    from privfed.tuning import adapters
    from privfed.tuning.peft_options import check_options

    if kind == "xlora":
        raise ConfigError(NO_XLORA)
    check_options(kind, given)
    task = loaded.task
    if task not in METHODS[kind].tasks:
        raise ModelError(f"The tuning {kind!r} does not work with model.task = {task!r}: choose another tuning.name.")
    options = {**SUPPLIED.get(kind, {}), **given, **_from_model(kind, loaded, given, seed)}
    if kind == "trainable_tokens" and task != "causal_lm":
        return _tokens_and_head(loaded, options, seed)
    if kind == "frod":
        _say_no_sparse_checks()
    tuned = adapters.wrapped(loaded, kind, options, seed, name=kind)
    if kind in WITH_TASK_IDS:
        _give_one_task(tuned.model)
    if kind in EMBEDDED_PROMPTS:
        _watch_prompt(kind, task, tuned.model, loaded)
    if kind == "shadow":
        _freeze_unread(tuned.model)
    return tuned


def _say_no_sparse_checks() -> None:
    """Say aloud what is torch's default, so that its first sparse tensor (FRoD's) warns of nothing."""
    import torch

    torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]


def _from_model(kind: str, loaded: LoadedModel, given: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return options that follow from the model where they were not given."""
    import numpy as np

    settings: Any = loaded.model.config
    depth = int(getattr(settings, "num_hidden_layers", 1))
    if kind == "adaption_prompt":
        return {"adapter_len": given.get("adapter_len", 10), "adapter_layers": given.get("adapter_layers", depth)}
    if kind == "cpt" and "cpt_token_ids" not in given:
        count = int(given.get("num_virtual_tokens", VIRTUAL_TOKENS))
        tokens = np.random.default_rng(seed).integers(int(settings.vocab_size), size=count).tolist()
        return {"cpt_token_ids": tokens, "cpt_mask": [1] * count, "cpt_tokens_type_mask": [1] * count}
    if given.get("prompt_tuning_init") == "TEXT" and "tokenizer_name_or_path" not in given:
        return {"tokenizer_name_or_path": loaded.source.location}
    return {}


def _tokens_and_head(loaded: LoadedModel, options: dict[str, Any], seed: int) -> TunedModel:
    """Train tokens beside a head, which peft's own class cannot: a LoRA adapter without factors carries both."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    from privfed.tuning.adapters import lora_wrapped

    if set(options) - {"token_indices"}:
        raise ModelError(
            "With a classifier the tuning 'trainable_tokens' takes token_indices only: leave the rest out."
        )
    return lora_wrapped(
        loaded,
        seed,
        name="trainable_tokens",
        target_modules=DUMMY_TARGET_MODULES,
        trainable_token_indices=options["token_indices"],
    )


def _give_one_task(model: Any) -> None:
    """Name the only task, number 0, wherever peft asks for it; generation is one text at a time."""
    import functools

    import torch

    model.register_forward_pre_hook(_one_task, with_kwargs=True)
    if hasattr(model, "generate"):
        model.generate = functools.partial(model.generate, task_ids=torch.zeros(1, dtype=torch.long))


def _one_task(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give every example task 0."""
    if "task_ids" not in kwargs and "input_ids" in kwargs:
        ids = kwargs["input_ids"]
        kwargs = {**kwargs, "task_ids": ids.new_zeros(ids.shape[0])}
    return args, kwargs


def _watch_prompt(kind: str, task: str, model: Any, loaded: LoadedModel) -> None:
    """Drop a language model's logits of the prompt itself; refuse a classifier that then loses sight of its padding."""
    if task == "causal_lm":
        config = model.peft_config["default"]
        model.register_forward_hook(_without(config.num_virtual_tokens), with_kwargs=True)
    elif not _ignores_padding(model, loaded):
        raise ModelError(
            f"The tuning {kind!r} hides token numbers from {type(loaded.model).__name__}, which then classifies by the "
            'padding of a batch: use tuning.name = "prefix_tuning".'
        )


def _without(count: int) -> Any:
    def cut(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        logits_BTV: torch.Tensor = output.logits
        if logits_BTV.shape[1] == count + kwargs["input_ids"].shape[1]:
            output.logits = logits_BTV[:, count:]
        return output

    return cut


def _ignores_padding(model: Any, loaded: LoadedModel) -> bool:
    """Return whether a text's logits are the same alone and beside a longer one."""
    import torch

    from privfed.tuning.adapters import quiet

    base: Any = loaded.model
    pad = int(getattr(base.config, "pad_token_id", None) or 0)
    ids = torch.full((2, 4), 1 if pad == 0 else 0, device=base.device)
    ids[0, 2:] = pad
    mask = torch.ones_like(ids)
    mask[0, 2:] = 0
    was_training = model.training
    model.eval()
    with torch.no_grad(), quiet():
        together = model(input_ids=ids, attention_mask=mask).logits[:1]
        alone = model(input_ids=ids[:1, :2], attention_mask=mask[:1, :2]).logits
    model.train(was_training)
    return bool(torch.allclose(together, alone, rtol=1e-3, atol=1e-4))


def _freeze_unread(model: Any) -> None:
    """Freeze what no logit depends on, such as the last block's update of a shadow state that nothing reads."""
    import torch

    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    total = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum()
    found = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    for (_, parameter), gradient in zip(named, found, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)


for _kind, _method in METHODS.items():
    register(_kind, _method)
