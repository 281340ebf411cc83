"""Which layers of a model a tuning adapts: peft's own table, else all linear layers of the blocks.

peft passes over a target name that matches nothing as long as another one matches; here each must match.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from privfed.errors import ModelError, nearest

if TYPE_CHECKING:
    from torch import nn

ALL_LINEAR = "all-linear"
DUMMY = "dummy-target-modules"  # peft's word for an adapter without factors
KEY = ("k", "key", "k_proj", "key_proj", "k_lin")
VALUE = ("v", "value", "v_proj", "value_proj", "v_lin")

# tuners whose r (or the option named here) is the rank of a matrix, which a layer's smaller side bounds
RANKS = {
    "adalora": "init_r",
    "deft": "r",
    "delora": "r",
    "glora": "r",
    "gralora": "r",
    "hira": "r",
    "lily": "r",
    "loha": "r",
    "lora": "r",
    "miss": "r",
    "osf": "effective_rank",
    "peanut": "r",
    "poly": "r",
    "psoft": "r",
    "tinylora": "r",
    "unilora": "r",
    "vblora": "r",
}


def chosen(model: nn.Module, kind: str, options: Mapping[str, Any], head: str | None) -> dict[str, Any]:
    """Return ``options`` with targets filled in and checked, and defaults of peft that do not fit replaced.

    Args:
        model: The base model, not wrapped yet.
        kind: The peft type in lower case.
        options: Options by peft's names.
        head: Name of the head, never a target by default.

    Raises:
        ModelError: If a target, a block's number or a rank does not fit the model.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType

    found = dict(options)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(kind.upper()))
    mapping = getattr(tuner, "target_module_mapping", None)
    check_blocks(model, found.get("layers_to_transform"))
    if not (mapping or kind == "ia3") or found.get("target_modules") == DUMMY:
        return found
    if found.get("target_parameters") and not found.get("target_modules"):
        return found
    if found.get("target_modules") is None:
        found["target_modules"] = _default(model, kind, mapping or {}, head)
    elif found["target_modules"] == ALL_LINEAR and head is not None:
        found["target_modules"] = _linear_names(model, head)  # peft leaves out a text classifier's head only
    if kind == "ia3" and found.get("feedforward_modules") is None:
        found["feedforward_modules"] = _feedforward(model, found["target_modules"])
    shapes = [shape for module in matched(model, found["target_modules"]) if (shape := _shape(module))]
    for name, value in FITS.get(kind, lambda _shapes: {})(shapes).items() if shapes else ():
        found.setdefault(name, value)
    _check_rank(kind, found, shapes)
    return found


def matched(model: nn.Module, targets: Sequence[str] | str) -> list[nn.Module]:
    """Return the modules that ``targets`` names: a regular expression of whole names, or ends of names.

    Raises:
        ModelError: If one of them names no module.
    """
    modules = dict(model.named_modules())
    if targets == ALL_LINEAR:
        return [module for module in modules.values() if is_linear(module)]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ModelError(f"tuning.target_modules = {targets!r} is no regular expression: {error}.") from error
        found = [module for name, module in modules.items() if pattern.fullmatch(name)]
        if not found:
            raise _nothing(model, targets, targets)
        return found
    out = []
    for target in targets:
        found = [module for name, module in modules.items() if target and f".{name}".endswith(f".{target}")]
        if not found:
            raise _nothing(model, list(targets), target)
        out.extend(found)
    return out


def check_blocks(model: nn.Module, layers: int | Sequence[int] | None) -> None:
    """Check ``layers_to_transform`` against the model's depth.

    Raises:
        ModelError: If the model has no block of such a number.
    """
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if layers is None or not isinstance(depth, int):
        return
    wrong = [n for n in ([layers] if isinstance(layers, int) else layers) if not 0 <= n < depth]
    if wrong:
        raise ModelError(
            f"tuning.layers_to_transform names block {wrong[0]}, and {type(model).__name__} has blocks 0 to "
            f"{depth - 1}: leave it out."
        )


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, module) of each transformer block: the entries of lists of alike modules with linear layers."""
    from torch import nn

    out: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block, _ in out)
        if isinstance(module, nn.ModuleList) and not inside and len({type(entry) for entry in module}) == 1:
            entries = [(f"{name}.{index}", entry) for index, entry in enumerate(module)]
            out.extend(entries if any(is_linear(m) for m in module.modules()) else [])
    return out


def is_linear(module: nn.Module) -> bool:
    """Return whether ``module`` multiplies by a matrix: torch's Linear or GPT-2's Conv1D."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _default(model: nn.Module, kind: str, mapping: Mapping[str, Any], head: str | None) -> list[str] | str:
    from peft.utils import constants

    if kind == "ia3":
        mapping = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    known = mapping.get(getattr(getattr(model, "config", None), "model_type", ""))
    if known is not None and _fits(model, known):  # some names in peft's table are of older transformers
        return known if isinstance(known, str) else list(known)
    if kind == "ln_tuning":
        return _norms(model, head)
    linear = _in_blocks(model)
    if kind == "beft":
        return [name for name in linear if name.split(".")[-1] in VALUE] or linear
    if kind == "ia3":
        parts = [name for name in linear if name.split(".")[-1] in KEY + VALUE]
        return [*parts, linear[-1]] if parts else linear
    return linear


def _fits(model: nn.Module, targets: Sequence[str] | str) -> bool:
    try:
        return bool(matched(model, targets))
    except ModelError:
        return False


def _feedforward(model: nn.Module, targets: Sequence[str] | str) -> list[str]:
    """Return the targets whose input IA3 scales: the last linear layer of each block's feed-forward part."""
    from peft.utils import constants

    if isinstance(targets, str):
        return []
    mapping = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    known = mapping.get(getattr(getattr(model, "config", None), "model_type", ""))
    found = _in_blocks(model)[-1:] if known is None else known
    return [name for name in found if name in targets]


def _in_blocks(model: nn.Module) -> list[str]:
    """Return the names of the linear layers, counted from their block, in the model's order.

    Raises:
        ModelError: If the model has none.
    """
    found = {
        name: None for _, block in blocks(model) for name, module in block.named_modules() if name and is_linear(module)
    }
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no list of blocks with linear layers: set tuning.target_modules to names of "
            "its layers."
        )
    return list(found)


def _norms(model: nn.Module, head: str | None) -> list[str]:
    """Return the names of the normalisation layers: counted from their block, or whole outside of the blocks."""
    starts = [f"{name}." for name, _ in blocks(model)]
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        if not type(module).__name__.endswith("Norm") or (head is not None and f"{name}.".startswith(f"{head}.")):
            continue
        found[next((name.removeprefix(s) for s in starts if name.startswith(s)), name)] = None
    return list(found)


def _linear_names(model: nn.Module, head: str) -> list[str]:
    names = [name for name, module in model.named_modules() if is_linear(module)]
    return [name for name in names if name != head and not name.startswith(f"{head}.")]


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (inputs, outputs) of a layer with one weight matrix, None for another module."""
    from torch import nn

    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if not is_linear(module):
        return None
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def _check_rank(kind: str, options: Mapping[str, Any], shapes: Sequence[tuple[int, int]]) -> None:
    option = RANKS.get(kind, "")
    rank = options.get(option)
    smallest = min((min(shape) for shape in shapes), default=0)
    if isinstance(rank, int) and shapes and rank > smallest:
        raise ModelError(
            f"tuning.{option} = {rank} is above the smaller side ({smallest}) of a layer that it adapts: "
            f"set tuning.{option} to at most {smallest}."
        )


def _nothing(model: nn.Module, targets: Sequence[str] | str, target: str) -> ModelError:
    ends = {name.split(".")[-1] for name, _ in model.named_modules() if name}
    hint = nearest(target, ends)
    return ModelError(
        f"tuning.target_modules = {targets!r} does not fit {type(model).__name__} ({target!r} is the name of none of "
        f"its layers.{hint}): set tuning.target_modules to names of its layers."
    )


def _divisor(sides: Sequence[int], most: int, multiple: int = 1) -> int:
    """Return the largest number up to ``most``, divisible by ``multiple``, that divides every side."""
    common = math.gcd(*sides)
    return next((n for n in range(min(most, common), 0, -1) if common % n == 0 and n % multiple == 0), 1)


def _least(shapes: Sequence[tuple[int, int]]) -> int:
    return min(min(shape) for shape in shapes)


def _sides(shapes: Sequence[tuple[int, int]]) -> list[int]:
    return [side for shape in shapes for side in shape]


# peft's defaults suit large models; where one cannot fit the layers at hand, the nearest that does takes its place
FITS: dict[str, Any] = {
    "adamss": lambda shapes: {"r": min(100, _least(shapes))},
    "c3a": lambda shapes: {"block_size": _divisor(_sides(shapes), 256)},
    "fourierft": lambda shapes: {"n_frequency": min(1000, *(a * b for a, b in shapes))},
    "gralora": lambda shapes: {"r": _divisor([32], _least(shapes), 2)},
    "hira": lambda shapes: {"r": min(32, _least(shapes))},
    "lily": lambda shapes: {"r": min(32, _least(shapes))},
    "miss": lambda shapes: {"r": min(64, _least(shapes))},
    "peanut": lambda shapes: {"r": min(32, _least(shapes))},
    "psoft": lambda shapes: {"r": min(32, _least(shapes))},
    "road": lambda shapes: {"group_size": _divisor([out for _, out in shapes], 64, 2)},
    "shira": lambda shapes: {"r": min(32, *(a * b // (a + b) for a, b in shapes))},
    "vblora": lambda shapes: {"vector_length": _divisor(_sides(shapes), 256)},
    "waveft": lambda shapes: {"n_frequency": min(2592, *(a * b for a, b in shapes))},
}
