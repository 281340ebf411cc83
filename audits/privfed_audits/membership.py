"""Membership of training records against test records, on the released model of a run without canaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privfed.config import RunConfig
from privfed.federation.material import gather
from privfed.federation.shared import NOTHING, SharedWork
from privfed.federation.transcript import Transcript
from privfed_attacks.gather import example_losses
from privfed_attacks.membership import MEMBERSHIP, Evidence
from privfed_attacks.roc import roc
from privfed_audits.canaries import Part, Scene, asked, released, sufficient
from privfed_audits.claims import Claim
from privfed_audits.verdict import curve

Floats = NDArray[np.float64]
NOT_RANDOMISED = (
    "No bound on epsilon: which records are in the training data was not decided by coins (audit.canaries)."
)
MOST = 2000
_LEAST = 8


def untossed_scene(
    folder: Path, config: RunConfig, transcript: Transcript | None, shared: SharedWork = NOTHING
) -> Scene | None:
    """Return a scene that asks about training records; None where there are too few records to tell anything."""
    material = gather(config, shared)
    rows = np.sort(np.concatenate([shard.indices for shard in material.shards]))
    if min(len(rows), len(material.dataset.test)) < _LEAST:
        return None
    some = rows[np.unique(np.linspace(0, len(rows) - 1, min(MOST, len(rows))).astype(np.int64))]
    return Scene(
        folder=folder, config=config, material=material, transcript=transcript, sizes={}, queries=some, shared=shared
    )


def untossed(scene: Scene, claim: Claim, attacks: Sequence[str] | None) -> dict[str, Any]:
    """Return the release's entry: how well training records can be told from test records.

    Every second test record is the attacks' population, the others are the non-members.

    Args:
        scene: Asks about training records.
        claim: What is promised.
        attacks: Names to keep to, or None.
    """
    scores, bits_N = _scores(scene, attacks)
    areas = {name: roc(values, bits_N).auc for name, values in scores.items()}
    best = max(areas, key=lambda name: areas[name])
    return {
        "attack": best,
        "bound": "none",
        "empirical_epsilon": None,
        "interval": [None, None],
        "ceiling": None,
        "accounted_epsilon": claim.epsilon,
        "delta": claim.delta,
        "unit": claim.unit,
        "canaries": 0,
        "contradicted": False,
        **curve(scores[best], bits_N, None, np.random.default_rng(0)),
        "attacks": {name: round(area, 4) for name, area in areas.items()},
        "assumptions": [NOT_RANDOMISED],
    }


def _scores(scene: Scene, attacks: Sequence[str] | None) -> tuple[Mapping[str, Floats], NDArray[np.bool_]]:
    """Return scores by attack of members and non-members, and which are which."""
    module, members, others = released(scene)
    rows = np.arange(len(others))
    evidence = _joined(asked(module, members), asked(module, Part(others, rows[1::2])))
    evidence = replace(evidence, population_losses_Z=example_losses(module, Part(others, rows[::2])))
    possible = sufficient(evidence)
    names = [name for name in possible if attacks is None or name in attacks] or list(possible)
    bits = np.arange(len(members) + len(rows[1::2])) < len(members)
    return {name: MEMBERSHIP.get(name).score(evidence) for name in names}, bits


def _joined(one: Evidence, other: Evidence) -> Evidence:
    """Return the evidence on two sets of queries as that on one."""
    return Evidence(
        losses_Q=_stacked(one.losses_Q, other.losses_Q),
        token_logprobs_QT=_stacked(one.token_logprobs_QT, other.token_logprobs_QT),
        token_means_QT=_stacked(one.token_means_QT, other.token_means_QT),
        token_deviations_QT=_stacked(one.token_deviations_QT, other.token_deviations_QT),
    )


def _stacked(one: Floats | None, other: Floats | None) -> Floats | None:
    """Return rows below each other, shorter ones filled up with NaN, which stands for no token; None without both."""
    if one is None or other is None:
        return None
    if one.ndim == 1:
        return np.concatenate([one, other])
    wide = np.full((len(one) + len(other), max(one.shape[1], other.shape[1])), np.nan)
    wide[: len(one), : one.shape[1]] = one
    wide[len(one) :, : other.shape[1]] = other
    return wide
