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
from privfed_attacks.gather import TOKENS, example_losses
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
    found = {}
    for name in ("losses_Q", *TOKENS):
        values = [value for value in (getattr(one, name), getattr(other, name)) if value is not None]
        if len(values) == 2:
            found[name] = _stacked(values)
    return Evidence(**found)


def _stacked(values: Sequence[Floats]) -> Floats:
    """Return rows below each other, shorter ones filled up with NaN, which stands for no token."""
    if values[0].ndim == 1:
        return np.concatenate(values)
    width = max(each.shape[1] for each in values)
    wide = [np.pad(each, ((0, 0), (0, width - each.shape[1])), constant_values=np.nan) for each in values]
    return np.concatenate(wide)
