"""From what an adversary saw to the evidence that membership attacks take.

The adversary rebuilds the public model, sets it to what was broadcast, and computes on the queries it asks about; the
queries are its own candidates, and whether they were trained on is not among what it has.

Shape suffixes: R rounds, C clients, Q queries, D values of the observed tensors, Z population examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privfed.errors import ConfigError
from privfed.models.examples import Batch, Examples, losses, microbatches
from privfed.models.language import IGNORED
from privfed.privacy.per_example import flat_gradients
from privfed_attacks.membership import Evidence
from privfed_attacks.membership.signals import token_statistics
from privfed_attacks.observation import Observation
from privfed_attacks.public_model import PublicModel, write_tensors
from privfed_attacks.shadows import precise_losses

MOST_BYTES = 4 << 30
"""The most memory that gradients of queries may take."""


def from_updates(
    seen: Sequence[Observation], public: PublicModel, queries: Examples, *, target: str | None = None, size: int = 16
) -> Evidence:
    """Return updates and the queries' gradients at what each round started from.

    Of single clients' updates, those of ``target`` are attacked, and the rounds that it took part in count; those of
    the other clients in the same rounds are beside them where every round has equally many.

    Args:
        seen: Observations of one phase: of single clients, of averages, or of releases.
        public: The adversary's model.
        queries: Whom it asks about.
        target: The attacked client, for single updates.
        size: Queries a pass.

    Raises:
        ConfigError: If there is nothing of the target, if more than one phase is given, or if the gradients would not
            fit into memory.
    """
    if len({each.phase for each in seen}) > 1:
        raise ConfigError("Observations of several phases have different tensors: give those of one phase.")
    attacked = [each for each in seen if target is None or each.source == target]
    if not attacked:
        raise ConfigError(f"There is no observation of {target!r} here.")
    rounds = [each.round for each in attacked]
    if len(set(rounds)) < len(rounds):
        raise ConfigError("There are several updates a round: name the client to attack.")
    needed = 8 * len(attacked) * len(queries) * attacked[0].layout.size
    if needed > MOST_BYTES:
        raise ConfigError(
            f"Gradients of {len(queries)} queries in {len(attacked)} rounds take {needed / 2**30:.1f} GiB: ask about "
            "fewer, or of fewer rounds."
        )
    gradients = [query_gradients(public.at(each), queries, each.layout.names, size) for each in attacked]
    found = Evidence(
        updates_RD=np.array([each.flat() for each in attacked], dtype=np.float64), gradients_RQD=np.array(gradients)
    )
    if target is None:
        return found
    beside = [[each for each in seen if each.round == number] for number in rounds]
    if len({len(row) for row in beside}) > 1:
        return found
    # the target first: which of the others is which does not matter
    ordered = [sorted(row, key=lambda each: each.source != target) for row in beside]
    stacked = np.array([[each.flat() for each in row] for row in ordered], dtype=np.float64)
    return replace(found, client_updates_RCD=stacked, target_client=0)


def from_release(
    last: Observation,
    public: PublicModel,
    queries: Examples,
    population: Examples | None = None,
    *,
    size: int = 64,
) -> Evidence:
    """Return losses of the queries (and of a population) on a released model.

    Args:
        last: The release: the model before it and its change.
        public: The adversary's model.
        queries: Whom it asks about.
        population: Examples that are known not to be members.
        size: Examples a pass.
    """
    module = public.at(last)
    write_tensors(module, {name: last.params[name] + change for name, change in last.payload.items()})
    return Evidence(
        losses_Q=example_losses(module, queries, size),
        population_losses_Z=None if population is None else example_losses(module, population, size),
    )


def example_losses(module: nn.Module, examples: Examples, size: int = 64) -> NDArray[np.float64]:
    """Return each example's loss, without dropout; of classes from the logits in float64."""
    found = np.empty(len(examples))
    module.eval()
    with torch.no_grad():
        for rows in microbatches(examples, np.arange(len(examples)), size):
            found[rows] = _losses(module, examples, examples.batch(rows)).double().cpu().numpy()
    return found


def token_evidence(module: nn.Module, examples: Examples, size: int = 4) -> Evidence:
    """Return what a language model says of each learned token of texts; nothing of other examples.

    Args:
        module: The model.
        examples: Of the attacker.
        size: Examples a pass; each holds the logits of its whole vocabulary.
    """
    logits = getattr(examples, "logits", None)
    if logits is None:
        return Evidence()
    found: list[tuple[NDArray[np.float64], ...]] = [()] * len(examples)
    module.eval()
    with torch.no_grad():
        for rows in microbatches(examples, np.arange(len(examples)), size):
            batch = examples.batch(rows)
            if batch.targets_BT is None:
                return Evidence()
            logits_BTV, targets_BT = logits(module, batch).double().cpu().numpy(), batch.targets_BT.numpy()
            for place, row in enumerate(rows):
                targets = targets_BT[place]
                learned = targets != IGNORED
                found[row] = token_statistics(logits_BTV[place][learned], targets[learned])
    lengths = [len(each[0]) for each in found]
    if not lengths or not min(lengths):
        return Evidence()  # a text without a learned token has no score
    filled = np.full((3, len(found), max(lengths)), np.nan)
    for row, each in enumerate(found):
        filled[:, row, : lengths[row]] = each
    return Evidence(token_logprobs_QT=filled[0], token_means_QT=filled[1], token_deviations_QT=filled[2])


def query_gradients(module: nn.Module, examples: Examples, names: Sequence[str], size: int = 16) -> NDArray[np.float64]:
    """Return each example's gradient by the named tensors, flat and in their order [Q, D].

    Raises:
        ConfigError: If one of the tensors is not trained in this module.
    """
    known = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigError(f"The tensor {missing[0]} was seen, but is not trained in the rebuilt model.")
    found: list[NDArray[np.float64]] = [np.empty(0)] * len(examples)
    batches = ((rows, examples.batch(rows)) for rows in microbatches(examples, np.arange(len(examples)), size))
    for rows, flat_BD in flat_gradients(module, lambda m, b: losses(examples, m, b), batches, names):
        for row, flat_D in zip(rows, flat_BD.double().cpu().numpy(), strict=True):
            found[row] = flat_D
    return np.stack(found)


def _losses(module: nn.Module, examples: Examples, batch: Batch) -> torch.Tensor:
    logits = getattr(examples, "logits", None)
    if logits is None or batch.labels_B is None:
        return losses(examples, module, batch)
    scores = logits(module, batch)
    return precise_losses(scores, batch.labels_B.to(scores.device))
