"""Labels from the gradient of the last layer.

* One example: the gradient of the cross-entropy by the bias is p - y, negative at the label alone. Zhao, Mopuri, Bilen
  2020, "iDLG: Improved Deep Leakage from Gradients", arXiv 2001.02610.
* Several: the mean of p - y over the batch; with the mean of p taken from the public model, the counts follow. Wainakh
  et al. 2022, "User-Level Label Leakage from Gradients in Federated Learning", PoPETs, arXiv 2105.09369 (LLG).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from privfed.errors import ConfigError
from privfed.table import Table
from privfed_attacks.inversion import ATTACKS, Attack, Reconstruction, Setting

if TYPE_CHECKING:
    from privfed_attacks.observation import Observation
    from privfed_attacks.public_model import PublicModel

Float = NDArray[np.float64]


class LabelsConfig(Table):
    """No options."""

    name: Literal["labels"] = "labels"


def run(
    observations: Sequence[Observation],
    model: PublicModel,
    setting: Setting,
    config: LabelsConfig,  # noqa: ARG001
) -> Reconstruction:
    """Return how many examples each class has, averaged over the observations.

    Raises:
        ConfigError: If the model has no classifier whose bias is trained, or the number of examples is not known.
    """
    count = setting.sequences
    if not count:
        raise ConfigError("Label recovery needs the number of examples: set Setting.sequences.")
    names = observations[0].side.label_names
    estimates = [bias_gradient(each, len(names)) for each in observations]
    if count == 1:
        return Reconstruction(labels={int(np.argmin(np.mean(estimates, axis=0))): 1})
    means = [_mean_probability(each, model, setting) for each in observations]
    shares = np.mean([p - g for p, g in zip(means, estimates, strict=True)], axis=0)
    counts = rounded(shares * count, count)
    return Reconstruction(labels={k: int(n) for k, n in enumerate(counts) if n})


def bias_gradient(observation: Observation, classes: int) -> Float:
    """Return the mean gradient by the classifier's bias [classes], from an update by plain SGD.

    Raises:
        ConfigError: If there is no such bias in the payload, or the learning rate is not known.
    """
    client = observation.side.client
    found = [name for name, value in observation.payload.items() if name.endswith("bias") and value.shape == (classes,)]
    if not found or client is None:
        raise ConfigError("Label recovery needs the update of a classifier's bias and the public learning rate.")
    rate = (client.head_learning_rate or client.learning_rate) * client.local_steps
    return -observation.payload[found[-1]].astype(np.float64) / rate


def rounded(wanted: Float, total: int) -> NDArray[np.int64]:
    """Return non-negative integers near ``wanted`` with the given sum (largest remainders)."""
    clipped = np.clip(wanted, 0, None)
    clipped = clipped * total / max(clipped.sum(), 1e-12)
    counts: NDArray[np.int64] = np.floor(clipped).astype(np.int64)
    order = np.argsort(clipped - counts)[::-1]
    counts[order[: total - int(counts.sum())]] += 1
    return counts


def _mean_probability(observation: Observation, model: PublicModel, setting: Setting) -> Float:
    """Return the model's mean class probabilities on texts or pictures from elsewhere."""
    import torch

    from privfed.models.examples import PROBES, device_of

    module = model.at(observation)
    if setting.images is not None:
        given = {"pixel_values": torch.tensor(setting.images[:64])}
    else:
        texts = list(setting.auxiliary[:64] or PROBES)
        batch = model.tokenizer(
            texts, padding=True, truncation=True, max_length=setting.max_tokens, return_tensors="pt"
        )
        given = {name: value for name, value in batch.items() if name != "token_type_ids"}
    given = {name: value.to(device_of(module)) for name, value in given.items()}
    with torch.no_grad():
        found: Float = module(**given).logits.softmax(-1).mean(0).double().cpu().numpy()
    return found


ATTACKS.register("labels")(Attack(config=LabelsConfig, run=run, reads="labels"))
