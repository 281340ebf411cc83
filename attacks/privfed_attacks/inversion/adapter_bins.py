"""Adapters as bins: a malicious server sends adapters that sort tokens, and reads them off the update.

Sami, Sen, Xu, Avestimehr 2025, "Gradient Inversion Attacks on Parameter-Efficient Fine-Tuning", CVPR, arXiv 2506.04453
(PEFTLeak); the bins are those of Fowl et al. 2022, "Robbing the Fed", ICLR, arXiv 2110.13057. Every row of an adapter's
W_down is made the same direction v, its bias an edge c_k of the values that v.h takes on pictures from elsewhere, and
every column of W_up the same: unit k then fires for the tokens h with v.h above c_k, and sends the same gradient g back
for each token as its neighbours do. With dW_k the sum of g h over the tokens above c_k, and db_k that of g,

    h = (dW_k - dW_{k+1}) / (db_k - db_{k+1})

for a token that is alone between two edges. Here the base model stays the public one (its digest is checked), so h is a
hidden state of the first block and no patch of pixels yet: pictures follow by moving pixels until the first block gives
the states found, which needs no gradient of the update. Tokens that shared a bin are apart in another round, along
another direction.

What the server sends is seen by everybody who looks at the broadcast: the rows of W_down are all the same. A client
that clips and adds noise, or a secure aggregation over more tokens than bins, stops it.

Shape suffixes: B images, C channels, H height, W width, S tokens, d width of a state, m bins, K states found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from privfed.errors import ConfigError
from privfed.table import Table
from privfed_attacks.inversion import ATTACKS, Attack, Reconstruction, Setting

if TYPE_CHECKING:
    import torch

    from privfed_attacks.observation import Observation
    from privfed_attacks.public_model import PublicModel
    from privfed_attacks.text.inputs import Site

Array = NDArray[np.float64]
_OUTLIER = 0.05


class AdapterBinsConfig(Table):
    """Options.

    Attributes:
        sharpness: How steep a unit is, in steps of its activation from one edge to the next.
        loudness: How large the adapter's output is beside what it is added to: larger gradients, a stranger model.
        head: By how much the classifier's weights are made larger: all gradients grow with it, and with them what an
            update in float32 can show.
        steps: Steps of L-BFGS on the pixels.
        variation: Weight of total variation.
        starts: Starts of the search for pixels.
    """

    name: Literal["adapter_bins"] = "adapter_bins"
    sharpness: float = Field(default=1.5, gt=0)
    loudness: float = Field(default=1.0, gt=0)
    head: float = Field(default=20.0, gt=0)
    steps: int = Field(default=300, ge=1)
    variation: float = Field(default=1e-4, ge=0)
    starts: int = Field(default=4, ge=1)


def craft(model: PublicModel, setting: Setting, config: AdapterBinsConfig) -> Mapping[str, NDArray[np.float32]]:
    """Return the adapter that sorts tokens and a classifier that passes large gradients back, by tensor name.

    Raises:
        ConfigError: If the model has no adapters, or there are no pictures from elsewhere to set the edges by.
    """
    if setting.images is None:
        raise ConfigError("The edges of the bins come from pictures from elsewhere: set Setting.images.")
    site = _site(model, setting.images)
    states = _states(model, site, setting.images).reshape(-1, _width(model, site))
    direction = _direction(states, setting.seed)
    along = states @ direction
    own = dict(model.module.named_parameters())
    bins = own[site.tensor].shape[0]
    low, high = np.quantile(along, [0.002, 0.998])
    edges, gap = np.linspace(low, high, bins), (high - low) / max(1, bins - 1)
    slope = config.sharpness / gap
    size = config.loudness * np.sqrt(np.mean(states**2)) / (slope * (high - low) * bins / 2)
    prefix = site.module.rpartition(".")[0]
    column = np.random.default_rng(setting.seed).standard_normal(len(direction)) * size
    sorting = {
        site.tensor: np.tile(slope * direction, (bins, 1)).astype(np.float32),
        f"{site.module}.bias": (-slope * edges).astype(np.float32),
        f"{prefix}.up.weight": np.tile(column[:, None], (1, bins)).astype(np.float32),
    }
    return sorting | _loud_head(model, setting.images, sorting, config.head)


def _direction(states: Array, seed: int) -> Array:
    """Return a direction along which states differ; another one for every seed, so that rounds sort them anew."""
    _, sizes, axes = np.linalg.svd(states - states.mean(axis=0), full_matrices=False)
    mixed = (np.random.default_rng(seed).standard_normal(len(sizes)) * sizes) @ axes
    found: Array = mixed / np.linalg.norm(mixed)
    return found


def _loud_head(
    model: PublicModel, images: NDArray[np.float32], sorting: Mapping[str, NDArray[np.float32]], times: float
) -> dict[str, NDArray[np.float32]]:
    """Return the classifier with larger weights, and a bias that keeps it from being sure of one class."""
    import torch

    from privfed_attacks.public_model import write_tensors

    name, own = model.tuned.head, dict(model.module.named_parameters())
    if name is None or not own[f"{name}.weight"].requires_grad:
        return {}
    write_tensors(model.module, sorting)
    with torch.no_grad():
        logits = model.module(pixel_values=torch.tensor(images[:64])).logits.mean(0)
        weight, bias = own[f"{name}.weight"] * times, (own[f"{name}.bias"] - logits) * times
    return {f"{name}.weight": weight.numpy(), f"{name}.bias": bias.numpy()}


def run(
    observations: Sequence[Observation], model: PublicModel, setting: Setting, config: AdapterBinsConfig
) -> Reconstruction:
    """Return the pictures whose hidden states are those that the bins show.

    Raises:
        ConfigError: If the number of images is not known, no adapter was observed, or the broadcast sorts no tokens.
    """
    if not setting.sequences:
        raise ConfigError("The search for pictures needs their number: set Setting.sequences.")
    parts = [_read(each, _sorting(each, _adapters(model))) for each in observations]
    states_Kd, weights_K = (np.concatenate(column) for column in zip(*parts, strict=True))
    site = _sorting(observations[0], _adapters(model))
    model.at(observations[0])  # what lies below the bins is sent anew, and the same, in every round
    facts = {"states": len(states_Kd), "bins": len(observations[0].payload[site.tensor]), "rounds": len(observations)}
    if not len(states_Kd):
        return Reconstruction(facts=facts)
    images, left = _pictures(model, site, states_Kd, weights_K, setting, config)
    return Reconstruction(images=images, facts={**facts, "left": round(left, 6)})


def _read(observation: Observation, site: Site) -> tuple[Array, Array]:
    """Return the states that an update shows [K, d] and how loud each is [K]."""
    from privfed_attacks.text.spans import noise_of

    down = observation.params[site.tensor].astype(np.float64)
    bias = observation.params[f"{site.module}.bias"].astype(np.float64)
    slope = np.linalg.norm(down[0])
    edges, direction = -bias / slope, down[0] / slope
    changed_md = np.diff(observation.payload[site.tensor].astype(np.float64), axis=0)
    changed_m = np.diff(observation.payload[f"{site.module}.bias"].astype(np.float64))
    loud = np.abs(changed_m) > 20 * np.sqrt(2) * noise_of(observation, f"{site.module}.bias")
    states = changed_md[loud] / changed_m[loud, None]
    along, gap = states @ direction, edges[1] - edges[0]
    # a mixture of tokens of opposite gradients lies outside of its own bin
    inside = (along > edges[:-1][loud] - gap) & (along < edges[1:][loud] + gap)
    weights = np.abs(changed_m[loud][inside])
    return states[inside], weights / max(float(weights.sum()), 1e-30)


def _pictures(
    model: PublicModel,
    site: Site,
    states_Kd: Array,
    weights_K: Array,
    setting: Setting,
    config: AdapterBinsConfig,
) -> tuple[NDArray[np.float32], float]:
    """Return the pictures and the weighted share of the states that they leave unexplained."""
    import torch

    from privfed_attacks.images import pixel_range

    low, high = pixel_range(model)
    span, wanted = high - low, torch.tensor(states_Kd).float()
    weights = torch.tensor(weights_K / weights_K.sum()).float()
    scale = (wanted - wanted.mean(0)).square().sum(1).mean().clamp_min(1e-12)
    draw = torch.Generator().manual_seed(setting.seed)
    usual = (low + high) / 2 if setting.images is None else torch.tensor(setting.images.mean(0, keepdims=True))
    middle = torch.logit(((usual - low) / span).clamp(0.02, 0.98))

    def unexplained(x: torch.Tensor) -> torch.Tensor:
        given = _captured(model, site, x).flatten(0, -2)
        apart = torch.cdist(wanted, given).square().min(dim=1).values / scale
        return (weights * apart / (apart + _OUTLIER)).sum()  # a mixture of tokens is no state: it must not pull

    found = []
    for _ in range(config.starts):
        z = middle + 0.5 * torch.randn(int(setting.sequences or 1), *low.shape[1:], generator=draw)
        found.append(_search(z.requires_grad_(True), low, span, unexplained, config))
    best, least = min(found, key=lambda each: each[1])
    return best, least


def _search(
    z: torch.Tensor,
    low: torch.Tensor,
    span: torch.Tensor,
    unexplained: Callable[[torch.Tensor], torch.Tensor],
    config: AdapterBinsConfig,
) -> tuple[NDArray[np.float32], float]:
    """Return (pictures, what they leave unexplained) at the end of one search, by L-BFGS on the pixels' logits."""
    import torch

    from privfed_attacks.inversion.pixels import total_variation

    search = torch.optim.LBFGS([z], max_iter=config.steps, history_size=50, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        x = low + span * torch.sigmoid(z)
        loss = 100 * (unexplained(x) + config.variation * total_variation(x) / span.max())
        (z.grad,) = torch.autograd.grad(loss, z)
        return loss

    search.step(closure)  # type: ignore[no-untyped-call]
    x = (low + span * torch.sigmoid(z)).detach()
    return x.numpy(), float(unexplained(x).detach())


def _adapters(model: PublicModel) -> list[Site]:
    """Return W_down of the first block's adapters: what comes later is farther from pixels.

    Raises:
        ConfigError: If the model has no adapters.
    """
    from privfed_attacks.text.inputs import sites

    own = dict(model.module.named_parameters())
    found = [s for s in sites(model.module, list(own)) if s.module.endswith(".down") and own[s.tensor].requires_grad]
    if not found:
        raise ConfigError("This attack is for the tuning 'adapter' on a model of images: there is no adapter here.")
    return found[:2]


def _site(model: PublicModel, images: NDArray[np.float32]) -> Site:
    """Return the adapter whose tokens differ most from each other within a picture."""

    def spread(site: Site) -> float:
        states = _states(model, site, images[:32])
        return float(states.std(axis=1).mean() / max(np.abs(states).mean(), 1e-12))

    return max(_adapters(model), key=spread)


def _sorting(observation: Observation, adapters: Sequence[Site]) -> Site:
    """Return the adapter that was made to sort tokens: the rows of its W_down are all the same.

    Raises:
        ConfigError: If there is none.
    """
    for site in adapters:
        down = observation.params.get(site.tensor)
        if down is not None and np.ptp(down, axis=0).max() <= 1e-6 * np.abs(down).max():
            return site
    raise ConfigError("The broadcast adapters sort no tokens: their server followed the protocol.")


def _captured(model: PublicModel, site: Site, pixels: torch.Tensor) -> Any:
    from privfed_attacks.text.inputs import captured

    return captured(model.module, [site], {"pixel_values": pixels})[site.tensor]


def _states(model: PublicModel, site: Site, images: NDArray[np.float32]) -> Array:
    """Return the states of pictures from elsewhere [B, S, d]."""
    import torch

    with torch.no_grad():
        found: Array = _captured(model, site, torch.tensor(images)).double().numpy()
    return found


def _width(model: PublicModel, site: Site) -> int:
    return int(model.module.get_parameter(site.tensor).shape[1])


ATTACKS.register("adapter_bins")(Attack(config=AdapterBinsConfig, run=run, reads="images", craft=craft))
