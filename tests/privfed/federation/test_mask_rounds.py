"""Rounds in which clients send draws of a mask: from what they train, through link and noise, to the server's chances.

Shape suffix: D trained values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from by_hand import recording

from privfed.compression import Ring, plugin_of
from privfed.compression.message import sum_of_one
from privfed.errors import ConfigError
from privfed.federation.client import _digest
from privfed.federation.codecs import Place
from privfed.types import SCORES

PRIVACY: dict[str, dict[str, Any]] = {
    "none": {"unit": "none"},
    "example": {"unit": "example"},
    "client": {"unit": "client", "l2_clip_norm": 0.5},
}


def tables(masking: str, unit: str, **more: Any) -> dict[str, Any]:
    compression = {"name": "bernoulli_mask", "max_value": 2.0, **more.pop("compression", {})}
    return {
        "tuning": {"name": "bernoulli_mask", "r": 4},
        "compression": compression,
        "secagg": {"name": masking},
        "privacy": PRIVACY[unit],
        "server": {"cohort_size": 4, "rounds": 3, **more.pop("server", {})},
        "client": {"local_steps": 2, "learning_rate": 0.5},
        **more,
    }


def scores_of(run: Any) -> Any:
    layout = run.phase.layout
    return np.repeat([name.rpartition(".")[2] == SCORES for name in layout.names], layout.sizes)


def chances(values: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(values, dtype=np.float64)))


@pytest.mark.parametrize("masking", ["none", "masked"])
@pytest.mark.parametrize("unit", ["none", "example"])
def test_the_chances_of_a_round_are_the_mean_of_what_clients_drew(
    masking: str, unit: str, federation: Callable[..., Any], recorded: Any, broadcasts: list[bytes]
) -> None:
    """Done again by hand, from the updates that clients trained (under example-level privacy: the noised ones)."""
    run = federation(**tables(masking, unit))
    trainers, where, config = recording(run, recorded), scores_of(run), run.config.compression
    assert where.any() and not where.all()
    for number in (1, 2):
        before = run.state.params_D
        _, report = run.round()
        assert (report.lost, report.survivors) == (None, 4)
        ring = Ring(bits=run.config.ring_bits(4), clients=4) if masking == "masked" else None
        sent = run.phase.sharing.part(number).sent
        place = Place(seed=run.config.seed, run_id="run", phase="train", round=number)
        codec = plugin_of(config).build(config, ring).at(place.context(sent.layout, given_D=before))
        linear = []
        for name, trainer in trainers.items():
            stream = run.holder.stream("encode", name, "train", number, _digest(broadcasts[-1], {}))
            linear.append(codec.linear_sum(sum_of_one(codec.encode(trainer.delta_D, stream), codec)))
        mean = np.mean(linear, axis=0)
        after = run.state.params_D
        np.testing.assert_allclose(chances(after[where]), np.clip(mean[where] + 0.5, 0.02, 0.98), atol=1e-6)
        np.testing.assert_allclose((after - before)[~where], mean[~where], atol=1e-6)
        assert set(np.unique(np.round(4 * (mean[where] + 0.5), 6))) <= {0.0, 1.0, 2.0, 3.0, 4.0}


def test_noise_per_client_is_that_of_half_the_root_of_the_scores(
    federation: Callable[..., Any], noised: list[np.ndarray]
) -> None:
    """Whatever the clip, a client's draws are of one norm: the bound that the noise is scaled to."""
    run = federation(**tables("none", "client"))
    _, report = run.round()
    assert report.lost is None
    codec, size = run.phase.codec, run.phase.layout.size
    drawn = int(scores_of(run).sum())
    plain = codec._quantizer.l2_bound(0.5, size - drawn)
    sigma = run.plan.noise_multiplier * (drawn / 4 + plain**2) ** 0.5
    z = 4 * noised[0] / sigma  # of the mean over the expected cohort
    assert 0.9 < z.std() < 1.1
    assert not 0.9 < (z * 1.5).std() < 1.1


def test_what_the_server_knows_is_carried_through_a_checkpoint_of_its_state(federation: Callable[..., Any]) -> None:
    run = federation(**tables("none", "none", compression={"memory": 2, "prior": 0.2}))
    for rounds in (1, 2, 1):
        run.round()
        kept = {name.rpartition(".")[2]: value for name, value in run.state.codec.items()}
        assert set(kept) == {"sum", "rounds"} and int(kept["rounds"][0]) == rounds


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tuning": {"name": "lora"}}, "tuning.name = .lora.: the codec sends draws of a mask"),
        ({"server": {"aggregation": "krum"}}, "krum.*decodes sums only"),
        ({"server": {"aggregation": "scaffold"}}, "scaffold.*no average of updates"),
        ({"server": {"aggregation": "scaffold"}, "compression": {"memory": 3}}, "scaffold.*no average of updates"),
        ({"server": {"weighting": "examples"}}, "the same whatever the weight"),
    ],
)
def test_what_a_mask_does_not_go_with_is_refused(
    change: dict[str, Any], words: str, tiny_config: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_config(**tables("none", "none", **change))
