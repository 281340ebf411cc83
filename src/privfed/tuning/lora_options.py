"""What the LoRA family shares: peft's LoRA options, without those that privacy or a plain base model rules out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from privfed.table import Table

if TYPE_CHECKING:
    from privfed.tuning.adapters import Convert

# options of peft.LoraConfig that are not offered, each with the reason
NOT_OFFERED = {
    "alora_invocation_tokens": "where the adapter acts would depend on each text",
    "arrow_config": "it routes between adapters that were trained before, and a run trains one",
    "corda_config": "it initialises from data, which would be read without noise",
    "eva_config": "it initialises from data, which would be read without noise",
    "fan_in_fan_out": "it follows from the layer's type",
    "kasa_config": "it adds a term to a loss that privfed computes itself",
    "layer_replication": "it changes the depth of the model",
    "loftq_config": "it replaces the base weights by quantised ones",
    "lora_ga_config": "it initialises from gradients of data, which would be read without noise",
    "megatron_config": "the base is a transformers model",
    "megatron_core": "the base is a transformers model",
    "monteclora_config": "it samples in every forward pass, so an example's gradient would not be its own",
    "qalora_group_size": "it needs a GPTQ-quantised base",
    "runtime_config": "it is about one machine's memory, not about the adapter",
    "use_bdlora": "its block layout is made for serving on many GPUs",
    "use_qalora": "it needs a GPTQ-quantised base",
    "velora_config": "it replaces gradients by projections, so an example's gradient would not be its own",
}
MUTATING = ("pissa", "olora")  # their start is taken out of the base weights
INITIALISERS = ("gaussian", "orthogonal", *MUTATING)


class LoraOptions(Table):
    """Options by peft's names.

    Attributes:
        r: Rank.
        lora_alpha: Scale; the update is multiplied by lora_alpha / r.
        lora_dropout: Only 0: a unit's second forward pass for its per-example gradients would draw another mask.
        target_modules: Names of the layers to adapt, a regular expression or ``"all-linear"``; None for peft's
            default of the model (mostly query and value), or all linear layers of the blocks where it has none.
        exclude_modules: Names of layers to leave out.
        target_parameters: Names of parameters to adapt that are no layer's weight (mixtures of experts).
        layers_to_transform: Numbers of the blocks to adapt; None for all. Adapting the last few only needs less
            noise (fewer values are trained) and less time (nothing below is back-propagated).
        layers_pattern: Name of the list of blocks, where peft does not find it.
        rank_pattern: Other ranks by layer name.
        alpha_pattern: Other scales by layer name.
        bias: Biases to train: ``none``, ``all``, or ``lora_only`` (those of adapted layers).
        use_rslora: Scale by lora_alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).
        init_lora_weights: True (B = 0), ``gaussian``, ``orthogonal``; ``pissa``, ``pissa_niter_4`` (Meng et al. 2024,
            arXiv 2404.02948) or ``olora`` (arXiv 2406.01775) start from the base's own weights and are saved as the
            difference to that start, of rank 2 r, so that they fit the original base.
        lora_bias: Give B a bias.
        modules_to_save: Further modules to train whole.
        trainable_token_indices: Rows of the token embedding to train.
        ensure_weight_tying: Keep tied embeddings tied where ``modules_to_save`` names one.
    """

    r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=16, gt=0)
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    layers_to_transform: list[int] | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    lora_bias: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | None = None
    ensure_weight_tying: bool = False

    @model_validator(mode="before")
    @classmethod
    def _offered(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key in NOT_OFFERED:
                raise ValueError(f"{key} is not offered ({NOT_OFFERED[key]}); leave it out")
        return values

    @field_validator("lora_dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value != 0:
            raise ValueError(
                f"{value} was given, and only 0 is taken: an adapter that draws a new mask in each forward pass has no "
                "gradient of its own for each example; leave it out"
            )
        return value

    @field_validator("init_lora_weights")
    @classmethod
    def _offered_start(cls, value: bool | str) -> bool | str:
        if value is False:
            raise ValueError("false is for tests of peft (B starts at random); leave it out")
        if isinstance(value, str) and value not in INITIALISERS and not value.startswith("pissa_niter_"):
            raise ValueError(
                f"{value!r} was given, expected one of {', '.join(INITIALISERS)}, pissa_niter_<number> or true "
                "(eva, corda and lora_ga read data without noise, loftq changes the base)"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> LoraOptions:
        for holds, both in self._contradictions():
            if holds:
                raise ValueError(f"{both}; leave one of them out")
        return self

    def _contradictions(self) -> tuple[tuple[bool, str], ...]:
        """Return (whether it is so, the sentence) for options that peft cannot have together."""
        start, dora = self.init_lora_weights, bool(getattr(self, "use_dora", False))
        patterns, pattern = bool(self.rank_pattern or self.alpha_pattern), isinstance(self.target_modules, str)
        return (
            (
                self.mutating and patterns,
                f'init_lora_weights = "{start}" is saved at twice the rank, against rank_pattern and alpha_pattern',
            ),
            (
                self.mutating and dora,
                f'init_lora_weights = "{start}" with use_dora cannot be saved for the original base',
            ),
            (self.lora_bias and self.bias != "none", "lora_bias and bias train two biases where one is"),
            (self.lora_bias and start is not True, f'peft gives B no lora_bias with init_lora_weights = "{start}"'),
            (self.lora_bias and dora, "peft gives B no lora_bias with use_dora"),
            (
                pattern and self.layers_to_transform is not None,
                "target_modules as one string says which blocks itself, and layers_to_transform says it again",
            ),
            (
                self.layers_pattern is not None and (pattern or self.layers_to_transform is None),
                "layers_pattern goes with layers_to_transform and a list of target_modules only",
            ),
        )

    @property
    def mutating(self) -> bool:
        """Whether the start is taken out of the base weights."""
        return str(self.init_lora_weights).startswith(MUTATING)

    def options(self) -> dict[str, Any]:
        """Return what ``peft.LoraConfig`` gets."""
        return self.model_dump(exclude={"name"}, exclude_none=True)


def difference_from_start() -> tuple[Callable[[Any], None], Convert]:
    """Return (remember, convert) for adapters whose start B0 A0 was taken out of the base weights W.

    Trained is (W - s B0 A0) + s B A. On the original W that is the adapter s (B A - B0 A0), a LoRA of rank 2 r with
    factors [B, -B0] and [A; A0] and the same scale s (Meng et al. 2024, arXiv 2404.02948).
    """
    start: dict[str, torch.Tensor] = {}

    def remember(model: Any) -> None:
        from peft import get_peft_model_state_dict

        start.update({k: v.detach().clone() for k, v in get_peft_model_state_dict(model).items()})

    def convert(state: dict[str, Any], fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        import torch

        joined = dict(state)
        for key, value in state.items():
            if key.endswith(("lora_A.weight", "lora_embedding_A")):
                joined[key] = torch.cat([value, start[key].cpu()], dim=0)
            elif key.endswith(("lora_B.weight", "lora_embedding_B")):
                joined[key] = torch.cat([value, -start[key].cpu()], dim=1)
        scale = 2**0.5 if fields["use_rslora"] else 2
        changes = {"r": 2 * fields["r"], "lora_alpha": scale * fields["lora_alpha"], "init_lora_weights": True}
        return joined, {**fields, **changes}

    return remember, convert


if TYPE_CHECKING:
    import torch
