"""Closed forms for peft's tuner layers where a unit's second forward pass would cost too much: IA3, DoRA, VeRA.

All three scale a signal by a trained vector v: y = x * v, so an example's gradient is the sum over positions of
x times y's gradient. Each site finds its x at hand.

Shape suffixes: B examples of a microbatch, S positions, H features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from privfed.privacy.per_example.sites import Call, CallSite, Detach, Site


def _product_sum(signal: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return sum over positions of signal * gradient, [B, H]."""
    return (signal.float() * gradient).reshape(len(gradient), -1, gradient.shape[-1]).sum(dim=1)


def _only_adapter(module: Any, tensors: Iterable[str]) -> str | None:
    """Return the adapter's name if it is the one that is active, on, and not merged into the base layer."""
    active = [name for name in module.active_adapters if name in tensors]
    return active[0] if len(active) == 1 and not module.disable_adapters and not module.merged else None


class Ia3Site(CallSite):
    """IA3's linear layer (Liu et al. 2022, arXiv 2205.05638): scales its base layer's output, or its input."""

    way = "closed form ia3"

    def attach(self) -> list[Detach]:
        layer: Any = self.module
        base, self._base_output, self._input = layer.base_layer, torch.empty(0), torch.empty(0)
        if layer.is_feedforward:
            return [
                layer.register_forward_pre_hook(self._take_input).remove,
                base.register_forward_pre_hook(self._tap_input).remove,
            ]
        return [base.register_forward_hook(self._take_output).remove, *super().attach()]

    def _name(self) -> str:
        return next(iter(self.indices))

    def _take_input(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self.recorder.listening:
            self._input = args[0]

    def _tap_input(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if not self.recorder.listening:
            return None
        signal, self._input = self._input, torch.empty(0)
        return (self.recorder.tap_one(args[0], [signal], self._deliver), *args[1:])

    def _take_output(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        if self.recorder.listening:
            self._base_output = output

    def listen(self, call: Call) -> Any:
        signal, self._base_output = self._base_output, torch.empty(0)
        return self.recorder.tap_one(call.output, [signal], self._deliver)

    def _deliver(self, gradient: torch.Tensor, signal: torch.Tensor) -> None:
        name = self._name()
        scale = self.module.get_parameter(name)
        self.add(name, _product_sum(signal, gradient).view(len(gradient), *scale.shape))


class DoraSite(CallSite):
    """DoRA's magnitude m (Liu et al. 2024, arXiv 2402.09353): out + base = (m / norm)(base + update).

    The norm takes no gradient (section 4.3 there), so out's derivative by m is (out + base) / m.
    """

    way = "closed form dora"

    def listen(self, call: Call) -> Any:
        base_layer, base = call.kwargs["base_layer"], call.kwargs.get("base_result")
        module: Any = self.module
        if base is None:
            weight = base_layer.weight.T if module.fan_in_fan_out else base_layer.weight
            base, bias = F.linear(call.args[0], weight.to(call.args[0].dtype)), None
        else:
            bias = base_layer.bias

        def deliver(gradient: torch.Tensor, out: torch.Tensor, base_result: torch.Tensor) -> None:
            signal = out.float() + base_result.float()
            if bias is not None:
                signal -= bias
            self.add("weight", _product_sum(signal, gradient) / module.weight)

        return self.recorder.tap_one(call.output, [call.output, base], deliver)


class VeraSite(Site):
    """VeRA's linear layer (Kopiczko et al. 2024, arXiv 2310.11454): base(x) + b * (B (d * (A x)))."""

    way = "closed form vera"

    def attach(self) -> list[Detach]:
        layer: Any = self.module
        self._plain = layer.forward
        layer.forward = self._forward

        def detach() -> None:
            vars(layer).pop("forward", None)

        return [detach]

    def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self.module
        name = _only_adapter(layer, layer.vera_lambda_d.keys())
        if not self.recorder.listening or name is None:
            return self._plain(x, *args, **kwargs)
        base: torch.Tensor = layer.base_layer(x, *args, **kwargs)
        down = layer.vera_A[name][:, : layer.in_features].to(x.device)
        up = layer.vera_B[name][: layer.out_features, :].to(x.device)
        given = layer.vera_dropout[name](layer._cast_input_dtype(x, layer.vera_lambda_d[name].dtype))
        inner = self._scaled(F.linear(given, down), f"vera_lambda_d.{name}")
        outer = self._scaled(F.linear(inner, up), f"vera_lambda_b.{name}")
        return (base + outer).to(base.dtype).to(x.dtype)

    def _scaled(self, signal: torch.Tensor, name: str) -> torch.Tensor:
        result = signal * self.module.get_parameter(name)

        def deliver(gradient: torch.Tensor, kept: torch.Tensor) -> None:
            self.add(name, _product_sum(kept, gradient))

        return self.recorder.tap_one(result, [signal], deliver) if name in self.indices else result


def tuner_site(module: nn.Module, indices: Mapping[str, int]) -> type[Site] | None:
    """Return the closed form for this very tuner layer and these tensors of it, or None."""
    kind = f"{type(module).__module__}.{type(module).__name__}"
    layer: Any = module
    if kind == "peft.tuners.lora.dora.DoraLinearLayer":
        return DoraSite if set(indices) == {"weight"} else None
    if kind == "peft.tuners.ia3.layer.Linear":
        name = _only_adapter(layer, layer.ia3_l.keys())
        return Ia3Site if set(indices) == {f"ia3_l.{name}"} else None
    if kind == "peft.tuners.vera.layer.Linear" and layer.quantization_backend is None:
        name = _only_adapter(layer, layer.vera_lambda_d.keys())
        return VeraSite if set(indices) <= {f"vera_lambda_d.{name}", f"vera_lambda_b.{name}"} else None
    return None
