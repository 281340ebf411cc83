"""Rounds through every codec: what the server makes of them is what the codec library gives by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from by_hand import CELLS, CLIP, QUANTIZER, Hand, declared, recording, tables

from privfed.federation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint


def _events(run: Any) -> Any:
    return run.holder.ledger.events_of("run")


@pytest.mark.parametrize(("case", "masking", "unit"), CELLS)
def test_rounds_are_what_the_library_gives_by_hand(
    case: str, masking: str, unit: str, federation: Callable[..., Any], recorded: Any, broadcasts: list[bytes]
) -> None:
    run = federation(**tables(case, masking, unit))
    trainers = recording(run, recorded)
    hand = Hand(run, masking == "masked", unit)
    for number in (1, 2):
        before, hand.bytes_up = run.state, 0
        after, report = run.round()
        assert (report.lost, report.dropped, report.survivors) == (None, (), 4)
        mean_D = hand.round(number, {name: each.delta_D for name, each in trainers.items()}, broadcasts[-1])
        wanted = (before.params_D + mean_D.astype(np.float32)).astype(np.float32)
        np.testing.assert_array_equal(after.params_D, wanted)
        assert report.update_norm == float(np.linalg.norm(mean_D)) > 0
        kept = {name.split(".", 1)[1]: value for name, value in after.codec.items()}
        assert kept.keys() == hand.state.keys()
        for name, value in kept.items():
            np.testing.assert_array_equal(value, hand.state[name])
            assert value.dtype == hand.state[name].dtype
        for client, left in hand.kept.items():
            (own,) = run.phase.store.load(client, before=number + 1).values()
            np.testing.assert_array_equal(own, left)
        if masking == "none":
            assert report.bytes_up == hand.bytes_up
    _check_charged(run, unit, rounds=2)


def _check_charged(run: Any, unit: str, rounds: int) -> None:
    """What the ledger holds is what the plan says, whatever the codec."""
    charged = _events(run)
    if unit == "none":
        assert charged == {}
        return
    planned = run.plan.events_by_client
    names = {"*"} if unit == "client" else set(run.phase.clients)
    steps = 1 if unit == "client" else run.config.client.local_steps
    assert set(charged) == names
    for name in names:
        assert charged[name] == (replace(planned[name][0], steps=rounds * steps),)


STATEFUL = [cell for cell in CELLS if declared(cell[0], False).stateful or declared(cell[0], False).server_state]


@pytest.mark.parametrize(("case", "masking", "unit"), [cell for cell in STATEFUL if cell[2] != "none"])
def test_a_run_from_a_checkpoint_is_the_unbroken_one_to_the_bit(
    case: str, masking: str, unit: str, federation: Callable[..., Any], tmp_path: Path
) -> None:
    unbroken = federation(**tables(case, masking, unit))
    states = [unbroken.round()[0] for _ in range(3)]
    own = _files(tmp_path)
    charged = unbroken.holder.ledger.head()
    resumed = federation(**tables(case, masking, unit))
    path = tmp_path / "state.safetensors"
    save_checkpoint(path, Checkpoint(state=states[0], metrics_bytes=0))
    found = load_checkpoint(path)
    assert found is not None
    assert found.state.codec.keys() == states[0].codec.keys()
    for name, value in states[0].codec.items():
        assert found.state.codec[name].tobytes() == value.tobytes()
        assert found.state.codec[name].dtype == value.dtype
    resumed.state = found.state
    for wanted in states[1:]:
        after, report = resumed.round()
        assert report.lost is None
        assert after.params_D.tobytes() == wanted.params_D.tobytes()
        assert {n: v.tobytes() for n, v in after.codec.items()} == {n: v.tobytes() for n, v in wanted.codec.items()}
    assert _files(tmp_path) == own
    assert resumed.holder.ledger.head() == charged


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "own").rglob("*.safetensors"))}


def test_both_sides_draw_the_same_seeds_anew_each_round_whatever_the_data(
    federation: Callable[..., Any], given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from privfed.compression.random_k import RandomK

    told: list[Any] = []
    at = RandomK.at

    def listening(codec: Any, context: Any) -> Any:
        told.append(context)
        return at(codec, context)

    monkeypatch.setattr(RandomK, "at", listening)
    rounds = []
    for value in (0.0, 1e-3):
        run = federation(**tables("random_k, feedback", "none", "none"))
        update = np.full(run.phase.layout.size, value, dtype=np.float32)
        run.trainers(lambda client, update=update: given(update))
        for _ in (1, 2):
            told.clear()
            run.round()
            assert len(told) == 5  # the server and four clients
            assert len({(each.run_seed, each.round_seed, each.shapes) for each in told}) == 1
            rounds.append((told[0].run_seed, told[0].round_seed))
    assert rounds[:2] == rounds[2:]
    assert rounds[0][0] == rounds[1][0] and rounds[0][1] != rounds[1][1]


# noise is added to the linear sum, and by what one client adds to that


def _within(values: np.ndarray, standard_deviation: float) -> bool:
    """Return whether the values' spread is that deviation's to within five of its own."""
    return bool(abs(values.std() / standard_deviation - 1) < 5 / np.sqrt(2 * values.size))


NOISY = {
    "random_k": {"name": "random_k", "density": 0.5},
    "random_k + quantizer": {"name": "random_k", "density": 0.5, "inner": QUANTIZER},
    "count_sketch": {"name": "count_sketch", "rows": 4, "columns": 1000},
    "seed_projection": {"name": "seed_projection", "directions": 4096, "unbiased": True},
    "global_mask": {"name": "global_mask", "density": 0.5},
    "top_k": {"name": "top_k", "density": 0.1},
    "rotated": {"name": "rotated_quantizer", "max_norm": 0.5},
    "powersgd": {"name": "powersgd", "rank": 8, "error_feedback": False},
}


@pytest.mark.parametrize("case", NOISY)
def test_the_noise_on_the_linear_sum_is_the_accounted_one(
    case: str, federation: Callable[..., Any], given: Any, noised: list[np.ndarray]
) -> None:
    run = federation(**{**tables("identity", "none", "client"), "compression": NOISY[case], "tuning": {"name": "full"}})
    size = run.phase.layout.size
    run.trainers(lambda client: given(np.zeros(size, dtype=np.float32)))
    hand = Hand(run, False, "client")
    codec = hand.codec_of(1)
    run.round()
    sums, codecs = 1, [codec]
    if codec.properties.second_pass:
        sums, codecs = 2, [codec, codec.second(codec.between(noised[0], size), size)]
    assert len(noised) == sums
    for values, one in zip(noised, codecs, strict=True):
        assert values.size == one.sum_length(size) > 1300
        # a message of zeros may hold something (random rounding, a coin for a sign): zeros here round to zero
        right = run.plan.noise_multiplier * np.sqrt(sums) * one.l2_bound(CLIP, size) / 4
        assert _within(values, right)
        for wrong in (0.9, 1.1):
            assert not _within(values, wrong * right)


def test_what_follows_the_noise_multiplies_it(
    federation: Callable[..., Any], given: Any, noised: list[np.ndarray]
) -> None:
    """random_k counts a value as often as its run is long: noise added after that would be too small."""
    given_tables = tables("identity", "none", "client")
    given_tables |= {"compression": {"name": "random_k", "density": 0.25}, "tuning": {"name": "full"}}
    run = federation(**given_tables)
    size = run.phase.layout.size
    run.trainers(lambda client: given(np.zeros(size, dtype=np.float32)))
    before = run.state
    after, _ = run.round()
    moved = (after.params_D - before.params_D).astype(np.float64)
    moved = moved[moved != 0]
    right = run.plan.noise_multiplier * CLIP / 4
    assert moved.size > 0.99 * noised[0].size  # a noise may round to 0
    assert _within(moved, 4 * right)
    assert not _within(moved, right)


def test_what_is_clipped_is_the_update_with_the_residual(
    federation: Callable[..., Any], given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates as long as the clip, and residuals on top: together still no longer than the clip."""
    run = federation(**tables("top_k", "none", "client"))
    size = run.phase.layout.size
    update = np.full(size, CLIP / np.sqrt(size), dtype=np.float32)
    run.trainers(lambda client: given(update))
    kind = type(run.phase.codec)
    seen: list[Any] = []
    encode = kind.encode

    def watching(codec: Any, vector_M: Any, stream: Any) -> Any:
        seen.append(vector_M)
        return encode(codec, vector_M, stream)

    monkeypatch.setattr(kind, "encode", watching)
    run.round()
    run.round()
    norms = [float(np.linalg.norm(each.astype(np.float64))) for each in seen]
    assert len(norms) == 8 and max(norms) <= CLIP
    client = sorted(run.phase.clients)[0]
    (left,) = run.phase.store.load(client, before=2).values()
    assert np.linalg.norm((update + left).astype(np.float64)) > 1.9 * CLIP  # what the clip had to cut
