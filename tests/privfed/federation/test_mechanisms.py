"""Client-level mechanisms in the federation: through masking, through a checkpoint, through a crash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.errors import ConfigError
from privfed.federation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from privfed.federation.progress import Silent
from privfed.federation.round import run_round
from privfed.privacy.mechanisms import MECHANISMS, REPEATED

NAMES = MECHANISMS.names()
ALL = pytest.mark.parametrize("name", NAMES)
LINKS = pytest.mark.parametrize("masked", ["masked", "none"])


def _tables(name: str, masked: str = "none", **options: Any) -> dict[str, Any]:
    """Four clients of which two are expected (all four where a masked sum has to be sure of two)."""
    return {
        "privacy": {"unit": "client", "l2_clip_norm": 0.5, "mechanism": {"name": name, **options}},
        "secagg": {"name": masked},
        "server": {"cohort_size": 4 if masked == "masked" else 2, "rounds": 6},
        "tuning": {"name": "full"},
    }


@LINKS
def test_the_count_of_clients_within_the_clip_comes_through_the_sum(
    masked: str, federation: Callable[..., Any], given: Any
) -> None:
    """Three of four within the clip; with next to no noise the clip moves as by hand."""
    tables = _tables("adaptive_clipping", masked, count_noise=0.01, learning_rate=1.0)
    tables["server"]["cohort_size"] = 4
    tables["privacy"]["noise_multiplier"] = 0.01
    run = federation(**tables)
    size, names = run.phase.layout.size, sorted(run.phase.clients)
    lengths = dict(zip(names, (0.1, 0.2, 0.4, 3.0), strict=True))
    run.trainers(lambda client: given(np.full(size, lengths[client.shard.client_id] / np.sqrt(size), dtype=np.float32)))
    before = run.state
    after, report = run.round()
    assert report.survivors == 4
    assert report.terms[0] == 0.5
    assert after.mechanism["clip"][0] == pytest.approx(0.5 * np.exp(-(0.75 - 0.5)), rel=2e-2)
    along = float((after.params_D - before.params_D).astype(np.float64).sum() / np.sqrt(size))
    assert along == pytest.approx((0.1 + 0.2 + 0.4 + 0.5) / 4, rel=5e-2)
    _, report = run.round()
    assert report.terms[0] == after.mechanism["clip"][0]  # what the next round's clients were told


@pytest.mark.parametrize("codec", ["stochastic_quantizer"])
def test_a_codec_that_may_cut_the_bit_is_refused(codec: str, tiny_config: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{codec}.*adaptive_clipping.*use compression.name = 'identity'"):
        tiny_config(**_tables("adaptive_clipping"), compression={"name": codec})


@ALL
def test_a_run_from_a_checkpoint_is_the_unbroken_one_to_the_bit(
    name: str, federation: Callable[..., Any], tmp_path: Path
) -> None:
    unbroken = federation(**_tables(name))
    states = [unbroken.state, *(unbroken.round()[0] for _ in range(5))]
    charged = unbroken.holder.ledger.head()
    resumed = federation(**_tables(name))
    for stop in (2, 4):
        path = tmp_path / f"{stop}" / "state.safetensors"
        save_checkpoint(path, Checkpoint(state=states[stop], metrics_bytes=0))
        found = load_checkpoint(path)
        assert found is not None
        resumed.state = found.state
        for expected in states[stop + 1 :]:
            after, report = resumed.round()
            assert report.lost is None
            assert after.params_D.tobytes() == expected.params_D.tobytes()
            assert after.mechanism.keys() == expected.mechanism.keys()
            assert all(after.mechanism[k].tobytes() == expected.mechanism[k].tobytes() for k in after.mechanism)
    assert resumed.holder.ledger.head() == charged  # all of it was charged already


@ALL
def test_a_crash_after_the_charge_never_releases_a_second_answer(
    name: str, federation: Callable[..., Any], given: Any
) -> None:
    run = federation(**_tables(name))
    run.round()
    before, size = run.state, run.phase.layout.size
    first, _ = run.round()
    charged = run.holder.ledger.head()
    run.trainers(lambda client: given(np.full(size, 1e-3, dtype=np.float32)))
    second, report = run_round(before, run.phase, run.holder, Silent())
    assert report.survivors  # an empty cohort would have one answer only
    assert report.lost == REPEATED
    assert second.params_D.tobytes() == before.params_D.tobytes() != first.params_D.tobytes()
    assert run.holder.ledger.head() == charged


@ALL
@LINKS
def test_what_a_run_charges_is_what_its_plan_says(name: str, masked: str, federation: Callable[..., Any]) -> None:
    run = federation(**_tables(name, masked))
    (planned,) = run.plan.events_by_client["*"]
    run.holder.ledger.approve(
        run.plan.events_by_client,
        run_id="run",
        data_digest=run.holder.data_digest,
        partition_digest=run.holder.partition_digest,
    )
    for number in range(1, 7):
        run.round()
        charged = run.holder.ledger.events_of("run")["*"]
        assert sum(event.steps for event in charged) <= planned.steps
        assert {replace(event, steps=0) for event in charged} == {replace(planned, steps=0)}
        assert number == len(run.holder.ledger.entries())
    assert charged == (planned,)
