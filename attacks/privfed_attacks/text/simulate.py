"""A client's local training on a dummy batch, differentiable, as the public configuration describes it.

Shape suffixes: B examples, S tokens, e width of a token's embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from privfed.errors import ConfigError
from privfed.models.examples import device_of
from privfed.schedule import ClientConfig
from privfed_attacks.observation import Observation

Tensors = dict[str, torch.Tensor]


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Run attention in plain operations: the fused kernels have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


class Simulation:
    """What one observed update would have been, for a dummy batch.

    Args:
        module: The adversary's model.
        observation: The update.

    Raises:
        ConfigError: If the local training is not known.
    """

    def __init__(self, module: nn.Module, observation: Observation) -> None:
        client = observation.side.client
        if client is None:
            raise ConfigError("Gradient matching simulates local training and needs to know it (ThreatModel.knows).")
        self._module, self._client = module, client
        own, device = dict(module.named_parameters()), device_of(module)
        given = {name: torch.tensor(v).to(device) for name, v in observation.params.items() if name in own}
        self._start = {name: given.pop(name).requires_grad_(True) for name in observation.layout.names}
        self._frozen = given
        self.observed = {name: torch.tensor(value).to(device) for name, value in observation.payload.items()}

    def update(self, dummy: torch.Tensor, mask_BS: torch.Tensor | None, labels_B: torch.Tensor) -> Tensors:
        """Return new minus old parameters by name, differentiable by the dummy batch.

        Args:
            dummy: Embeddings [B, S, e], or pixels [B, C, H, W] where there is no mask.
            mask_BS: 1 for a token, 0 for padding; None for images.
            labels_B: Classes.
        """
        now: Tensors = dict(self._start)
        memory: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for step in range(1, self._client.local_steps + 1):
            loss = self.loss(now, dummy, mask_BS, labels_B)
            found = torch.autograd.grad(loss, list(now.values()), create_graph=True, allow_unused=True)
            grads = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(now.items(), found, strict=True)}
            now = _stepped(now, grads, memory, self._client, step)
        return {name: now[name] - self._start[name] for name in now}

    def loss(
        self, params: Mapping[str, torch.Tensor], dummy: torch.Tensor, mask: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean loss of the dummy batch at some parameters."""
        given = {"pixel_values": dummy} if mask is None else {"inputs_embeds": dummy, "attention_mask": mask}
        output = functional_call(self._module, {**self._frozen, **params}, args=(), kwargs=given)
        return cross_entropy(output.logits, labels)


def _stepped(
    now: Tensors,
    grads: Tensors,
    memory: dict[str, tuple[torch.Tensor, torch.Tensor]],
    client: ClientConfig,
    step: int,
) -> Tensors:
    """Return parameters after one step of the client's optimiser (weight decay and momentum left out)."""
    rates = {name: _rate(client, name) for name in now}
    if client.optimizer == "sgd":
        return {name: now[name] - rates[name] * grads[name] for name in now}
    after = {}
    for name, grad in grads.items():
        first, second = memory.get(name, (torch.zeros_like(grad), torch.zeros_like(grad)))
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        memory[name] = first, second
        scale = (second / (1 - 0.999**step) + 1e-16).sqrt() + 1e-8  # its root has no derivative at 0
        after[name] = now[name] - rates[name] * first / (1 - 0.9**step) / scale
    return after


def _rate(client: ClientConfig, name: str) -> float:
    head = any(part in name for part in ("classifier.", "score.", "classification_head."))
    return (client.head_learning_rate or client.learning_rate) if head else client.learning_rate
