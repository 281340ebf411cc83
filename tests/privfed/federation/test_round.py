"""Rounds: what a failing client costs, what an average is, and what a budget stops.

Shape suffix: D trained values.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from privfed.errors import BudgetExceededError, ClientError, ProtocolError
from privfed.federation.messages import Broadcast
from privfed.federation.progress import Silent
from privfed.federation.round import run_round
from privfed.privacy.mechanisms import REPEATED, clip_update

PLAIN = {"privacy": {"unit": "none"}, "server": {"cohort_size": 4}}
LINKS = pytest.mark.parametrize("masked", ["masked", "none"])


class Watch(Silent):
    """Remembers who was dropped."""

    def __init__(self) -> None:
        self.dropped: dict[str, str] = {}

    def client_dropped(self, client_id: str, reason: str) -> None:
        self.dropped[client_id] = reason


def _victim(run: Any) -> str:
    return sorted(run.phase.clients)[1]


def _fails(kind: str, run: Any) -> Callable[..., Any]:
    """Return an ``around`` of a trainer that goes wrong in the way ``kind`` says."""
    trainer = run.stage.trainer

    def around(train: Callable[..., Any], params_D: Any, shard: Any, stream: Any, on_step: Any, work: Any) -> Any:
        if kind == "raises":
            raise RuntimeError("the disk of this client is on fire")
        if kind == "nan":
            return np.full_like(params_D, np.nan)
        if kind == "nan inside":
            return train(np.full_like(params_D, np.nan), shard, stream, on_step, work)
        if kind == "sleeps after a step":
            with _deadline(trainer, 0.3):
                return train(params_D, shard, stream, lambda step, steps: time.sleep(5), work)
        layer = run.bench.loaded.model.bert.encoder.layer[1]
        with _deadline(trainer, 0.3):
            if kind == "sleeps in the forward pass":
                handle = layer.register_forward_hook(lambda *_: time.sleep(5))
            else:
                handle = layer.register_full_backward_hook(lambda *_: time.sleep(5))
            try:
                return train(params_D, shard, stream, on_step, work)
            finally:
                handle.remove()

    return around


@contextmanager
def _deadline(trainer: Any, seconds: float) -> Any:
    """Give only the client that trains in the body a short deadline."""
    before = trainer.config
    trainer.config = before.model_copy(update={"deadline_s": seconds})
    try:
        yield
    finally:
        trainer.config = before


FAULTS = [
    "raises",
    "nan",
    "nan inside",
    "sleeps after a step",
    "sleeps in the forward pass",
    "sleeps in the backward pass",
]


@LINKS
@pytest.mark.parametrize("unit", ["none", "example"])
@pytest.mark.parametrize("kind", FAULTS)
def test_a_failing_client_costs_the_round_only_itself(
    kind: str, unit: str, masked: str, federation: Callable[..., Any], recorded: Any
) -> None:
    run = federation(privacy={"unit": unit}, secagg={"name": masked}, server={"cohort_size": 4})
    victim = _victim(run)
    trainers = {name: recorded(run.stage.trainer) for name in run.phase.clients}
    trainers[victim].around = _fails(kind, run)
    run.trainers(lambda client: trainers[client.shard.client_id])
    before, watch, started = run.state, Watch(), time.perf_counter()
    after, report = run.round(watch)
    assert [name for name, _ in report.dropped] == [victim] == list(watch.dropped)
    expected = {"raises": "on fire", "nan": "finite|NaN", "nan inside": "finite|NaN"}.get(kind, "deadline of 0.3 s")
    assert any(text in watch.dropped[victim] for text in expected.split("|"))
    assert (report.cohort, report.survivors, report.lost) == (4, 3, None)
    assert time.perf_counter() - started < 4.5  # the sleep of five seconds was cut short
    rest = [trainer.delta_D for name, trainer in trainers.items() if name != victim]
    np.testing.assert_allclose(after.params_D - before.params_D, np.mean(rest, axis=0), atol=1e-6)
    charged = [entry.charge.client_id for entry in run.holder.ledger.entries()]
    assert charged == ([] if unit == "none" else [name for name in sorted(run.phase.clients) if name != victim])
    # and the next round is whole again
    trainers[victim].around = None
    after, report = run.round(watch)
    assert (report.survivors, report.dropped) == (4, ())
    assert np.isfinite(after.params_D).all()


@LINKS
def test_a_value_beyond_the_codecs_range_drops_the_client_under_masking(
    masked: str, federation: Callable[..., Any], given: Any
) -> None:
    run = federation(**PLAIN, secagg={"name": masked})
    size = run.phase.layout.size
    run.trainers(
        lambda client: given(np.full(size, 1e6 if client.shard.client_id == _victim(run) else 0.5, dtype=np.float32))
    )
    _, report = run.round()
    assert report.survivors == (3 if masked == "masked" else 4)


def test_a_round_below_the_threshold_is_lost_and_changes_nothing(federation: Callable[..., Any], given: Any) -> None:
    run = federation(**PLAIN, secagg={"name": "masked"})
    size, names = run.phase.layout.size, sorted(run.phase.clients)
    alive = {names[0], names[3]}  # two of four; the threshold is three
    run.trainers(
        lambda client: given(np.full(size, 1.0 if client.shard.client_id in alive else np.nan, dtype=np.float32))
    )
    before = run.state
    after, report = run.round()
    assert "at least 3 are needed" in report.lost
    assert report.survivors == 0
    assert after.params_D.tobytes() == before.params_D.tobytes()
    assert after.round == before.round + 1
    assert after.taken == dict.fromkeys(names, 1)
    assert report.update_norm == 0.0


def test_without_masking_nobody_left_is_a_lost_round(federation: Callable[..., Any], given: Any) -> None:
    run = federation(**PLAIN, secagg={"name": "none"})
    run.trainers(lambda client: given(np.full(run.phase.layout.size, np.nan, dtype=np.float32)))
    before = run.state
    after, report = run.round()
    assert report.lost == "no client survived"
    assert after.params_D.tobytes() == before.params_D.tobytes()


@pytest.mark.parametrize("server", [{"optimizer": "adam"}, {"momentum": 0.9}])
def test_a_lost_round_leaves_the_optimizer_as_it_was(
    server: dict[str, Any], federation: Callable[..., Any], given: Any
) -> None:
    run = federation(privacy={"unit": "none"}, server={"cohort_size": 4, **server}, secagg={"name": "none"})
    run.round()
    before = run.state
    run.trainers(lambda client: given(np.full(run.phase.layout.size, np.nan, dtype=np.float32)))
    after, _ = run.round()
    assert after.optimizer.keys() == before.optimizer.keys()
    assert all(np.array_equal(after.optimizer[name], before.optimizer[name]) for name in before.optimizer)


@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_charge_beyond_the_cap_stops_the_run(unit: str, federation: Callable[..., Any]) -> None:
    run = federation(
        privacy={"unit": unit},
        secagg={"name": "none"},
        server={"cohort_size": 4, "rounds": 4},
    )
    ledger, digest = run.holder.ledger, run.holder.data_digest
    one = run.phase.central.event.one_step() if unit == "client" else run.phase.clients[_victim(run)].event
    from privfed.privacy.accountant import epsilon

    ledger.set_cap(data_digest=digest, unit=unit, epsilon=epsilon([one], 1e-4) * 1.05, delta=1e-4)
    run.round()
    charged = len(ledger.entries())
    assert charged == (1 if unit == "client" else 4)
    before = run.state
    with pytest.raises(BudgetExceededError, match="left") as caught:
        run.round()
    assert caught.value.exit_code == 3
    assert len(ledger.entries()) == charged
    assert run.state is before


def test_a_round_is_the_same_again_and_charged_once(federation: Callable[..., Any]) -> None:
    run = federation(server={"cohort_size": 4})
    first, _ = run_round(run.state, run.phase, run.holder, Silent())
    charged = run.holder.ledger.head()
    second, _ = run_round(run.state, run.phase, run.holder, Silent())
    assert second.params_D.tobytes() == first.params_D.tobytes()
    assert run.holder.ledger.head() == charged
    # other parameters meet other noise, and cost anew
    moved = replace(run.state, params_D=run.state.params_D + np.float32(1e-3))
    third, _ = run_round(moved, run.phase, run.holder, Silent())
    assert len(run.holder.ledger.entries()) == 8
    assert not np.allclose(third.params_D - moved.params_D, first.params_D - run.state.params_D, atol=1e-4)


def test_another_key_gives_other_noise(federation: Callable[..., Any]) -> None:
    deltas = []
    for key in (bytes(32), bytes([1]) * 32):
        run = federation(key=key)
        after, _ = run_round(run.state, run.phase, run.holder, Silent())
        deltas.append(after.params_D - run.state.params_D)
    assert not np.allclose(*deltas, atol=1e-4)


# the average


@LINKS
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_fedavg_is_the_average_done_by_hand(
    weighting: str, masked: str, federation: Callable[..., Any], recorded: Any
) -> None:
    run = federation(
        privacy={"unit": "none"},
        partition={"name": "quantity", "clients": 5, "alpha": 0.7, "min_size": 8},
        server={"cohort_size": 4, "weighting": weighting, "learning_rate": 0.5},
        secagg={"name": masked},
    )
    trainers = {name: recorded(run.stage.trainer) for name in run.phase.clients}
    run.trainers(lambda client: trainers[client.shard.client_id])
    before = run.state
    after, _ = run.round()
    took_part = [name for name, trainer in trainers.items() if trainer.delta_D is not None]
    assert len(took_part) == 4
    sizes = np.array([len(run.phase.clients[name].shard) for name in took_part], dtype=np.float64)
    assert len(set(sizes)) > 1
    weights = sizes / sizes.sum() if weighting == "examples" else np.full(4, 0.25)
    deltas = np.array([trainers[name].delta_D for name in took_part], dtype=np.float64)
    wanted = before.params_D + 0.5 * (weights @ deltas)
    assert np.abs(weights @ deltas - deltas.mean(axis=0)).max() > 1e-4 or weighting == "uniform"
    np.testing.assert_allclose(after.params_D, wanted, atol=2e-5 * np.abs(deltas).max() + 1e-6)


# client level

CLIENT_LEVEL = {
    "privacy": {"unit": "client", "l2_clip_norm": 0.5},
    "secagg": {"name": "none"},
    "server": {"cohort_size": 3, "rounds": 3},
    "tuning": {"name": "full"},
    "client": {"learning_rate": 2.0},
}


def _merged(**changes: Any) -> dict[str, Any]:
    tables = {name: {**table} for name, table in CLIENT_LEVEL.items()}
    for name, table in changes.items():
        tables[name] = {**tables.get(name, {}), **table}
    return tables


@pytest.mark.parametrize(
    "compression",
    [
        {"name": "identity"},
        {"name": "stochastic_quantizer", "bits": 8, "max_value": 0.01},
        {"name": "stochastic_quantizer", "bits": 6, "max_value": 0.7, "range": "l2"},
    ],
)
@LINKS
def test_the_clip_bounds_what_is_encoded(
    masked: str, compression: dict[str, Any], federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation(
        **_merged(compression=compression, secagg={"name": masked}, server={"cohort_size": 4}),
    )
    codec = run.phase.codec
    encode = type(codec).encode
    given, sent = [], []
    monkeypatch.setattr(
        type(codec),
        "encode",
        lambda self, vector_D, stream: (given.append(vector_D), sent.append(encode(self, vector_D, stream)), sent[-1])[
            2
        ],
    )
    run.round()
    assert len(given) == 4
    norms = [float(np.linalg.norm(each.astype(np.float64))) for each in given]
    assert max(norms) <= 0.5
    assert max(norms) > 0.49  # the learning rate is high enough for the clip to bite
    from privfed.types import EncodedSum

    for each in sent:
        alone = EncodedSum(
            sum_M=_widened(each), codec=each.codec, scale=each.scale, length=each.length, survivors=1, total_weight=1.0
        )
        decoded = float(np.linalg.norm(codec.decode_sum(alone)))
        assert decoded <= run.phase.central.sensitivity * (1 + 1e-9)
    assert run.phase.central.sensitivity >= 0.5


def _widened(encoded: Any) -> Any:
    from privfed.compression.fixed_point import from_ring

    if encoded.values_M.dtype == np.float32:
        return encoded.values_M.astype(np.float64)
    if encoded.num_bits == 32:
        return encoded.values_M.astype(np.uint64)
    return from_ring(encoded.values_M.astype(np.uint64), encoded.num_bits)


@pytest.mark.parametrize("scale", [1e-12, 0.3, 0.5, 0.5000001, 1.0, 1e6, 1e30])
def test_clipping_never_passes_the_bound_and_keeps_the_direction(scale: float) -> None:
    direction = np.random.default_rng(1).standard_normal(10_000)
    vector = (direction / np.linalg.norm(direction) * scale).astype(np.float32)
    clipped = clip_update(vector, 0.5)
    assert np.linalg.norm(clipped.astype(np.float64)) <= 0.5
    cosine = clipped.astype(np.float64) @ direction / np.linalg.norm(clipped.astype(np.float64))
    assert cosine / np.linalg.norm(direction) > 1 - 1e-6
    if scale < 0.499:
        np.testing.assert_array_equal(clipped, vector)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_clipping_refuses_what_has_no_norm(bad: float) -> None:
    with pytest.raises(ClientError, match="finite"):
        clip_update(np.array([1.0, bad], dtype=np.float32), 0.5)


def _within(values: np.ndarray, standard_deviation: float) -> bool:
    """Return whether the values' spread is that deviation's to within five of its own."""
    return bool(abs(values.std() / standard_deviation - 1) < 5 / np.sqrt(2 * values.size))


@pytest.mark.parametrize(
    ("masked", "compression"),
    [
        ("none", {"name": "identity"}),
        ("masked", {"name": "identity"}),
        ("none", {"name": "stochastic_quantizer", "bits": 8, "max_value": 0.01}),
    ],
)
def test_the_noise_on_the_average_is_the_accounted_one(
    masked: str, compression: dict[str, Any], federation: Callable[..., Any], given: Any
) -> None:
    cohort = 4 if masked == "masked" else 3
    run = federation(**_merged(compression=compression, secagg={"name": masked}, server={"cohort_size": cohort}))
    run.trainers(lambda client: given(np.zeros(run.phase.layout.size, dtype=np.float32)))
    before = run.state
    after, _ = run.round()
    noise_D = (after.params_D - before.params_D).astype(np.float64)
    assert noise_D.size > 10_000
    bound = run.phase.codec.l2_bound(0.5, run.phase.layout.size)
    assert run.phase.central.sensitivity == bound
    right = run.plan.noise_multiplier * bound / cohort
    assert _within(noise_D, right)
    assert abs(noise_D.mean()) < 5 * right / np.sqrt(noise_D.size)
    for wrong in (2 / 3, 3 / 2):
        assert not _within(noise_D, wrong * right)
    entries = run.holder.ledger.entries()
    assert [entry.charge.client_id for entry in entries] == ["*"]
    event = entries[0].charge.event
    assert event.noise_multiplier == pytest.approx(run.plan.noise_multiplier)
    assert (event.sampling_probability, event.steps, event.unit) == (cohort / 4, 1, "client")


def test_the_denominator_does_not_depend_on_who_came(federation: Callable[..., Any], given: Any) -> None:
    run = federation(**_merged())
    size = run.phase.layout.size
    update = np.full(size, 0.25 / np.sqrt(size), dtype=np.float32)
    run.trainers(lambda client: given(update))
    run.phase = replace(run.phase, central=replace(run.phase.central, noise_multiplier=1e-6))
    sizes = set()
    for _ in range(12):
        before = run.state
        after, report = run.round()
        sizes.add(report.survivors)
        moved = (after.params_D - before.params_D).astype(np.float64)
        assert np.linalg.norm(moved) == pytest.approx(report.survivors * 0.25 / 3, abs=1e-3)
    assert len(sizes) > 1


@pytest.mark.parametrize("masked", ["masked", "none"])
def test_an_empty_cohort_still_adds_noise_and_is_charged(
    masked: str, federation: Callable[..., Any], given: Any
) -> None:
    run = federation(**_merged(secagg={"name": masked}, server={"cohort_size": 4}))
    never = replace(run.phase.central.event, sampling_probability=1e-15)
    run.phase = replace(run.phase, central=replace(run.phase.central, event=never, cohort_size=3))
    before = run.state
    after, report = run.round()
    assert (report.cohort, report.survivors, report.lost) == (0, 0, None)
    noise_D = (after.params_D - before.params_D).astype(np.float64)
    assert _within(noise_D, run.plan.noise_multiplier * run.phase.central.sensitivity / 3)
    assert [entry.charge.client_id for entry in run.holder.ledger.entries()] == ["*"]


def test_client_level_noise_depends_on_what_it_hides(federation: Callable[..., Any], given: Any) -> None:
    moves = []
    for value in (0.0, 1e-4):
        run = federation(**_merged(server={"cohort_size": 4}))
        run.holder = replace(run.holder, ledger_run_id=f"run {value}")  # two runs, of which each may release once
        update = np.full(run.phase.layout.size, value, dtype=np.float32)
        run.trainers(lambda client, update=update: given(update))
        after, _ = run_round(run.state, run.phase, run.holder, Silent())
        moves.append(after.params_D - run.state.params_D)
    # had both sums met the same noise, their difference would be the update itself
    assert np.std(moves[0] - moves[1]) > 0.5 * np.std(moves[0])
    assert len(run.holder.ledger.entries()) == 2


def test_a_client_level_round_is_released_for_one_input_only(federation: Callable[..., Any], given: Any) -> None:
    """The cohort is the same each time, so two releases of a round are no two independent samples."""
    run = federation(**_merged(server={"cohort_size": 4}))

    def tried(value: float) -> tuple[Any, Any]:
        run.trainers(lambda client: given(np.full(run.phase.layout.size, value, dtype=np.float32)))
        return run_round(run.state, run.phase, run.holder, Silent())

    first, _ = tried(0.0)
    other, report = tried(1e-4)
    assert report.lost == REPEATED
    assert other.params_D.tobytes() == run.state.params_D.tobytes() != first.params_D.tobytes()
    assert other.round == first.round
    again, report = tried(0.0)
    assert report.lost is None
    assert again.params_D.tobytes() == first.params_D.tobytes()
    assert len(run.holder.ledger.entries()) == 1


def test_a_cohort_of_which_nobody_survives_is_noised_and_charged(federation: Callable[..., Any], given: Any) -> None:
    """Else a round whose only sampled client drops out would differ from the same round without that client."""
    run = federation(**_merged(server={"cohort_size": 4}))
    run.trainers(lambda client: given(np.full(run.phase.layout.size, np.nan, dtype=np.float32)))
    before = run.state
    after, report = run.round()
    assert (report.cohort, report.survivors, report.lost) == (4, 0, None)
    noise_D = (after.params_D - before.params_D).astype(np.float64)
    assert _within(noise_D, run.plan.noise_multiplier * run.phase.central.sensitivity / 4)
    assert len(run.holder.ledger.entries()) == 1


# the messages


def _broadcast(size: int = 4) -> Broadcast:
    return Broadcast(
        run_id="r", phase="train", round=3, layout_digest="d" * 64, params_D=np.arange(size, dtype=np.float32)
    )


def test_a_broadcast_comes_back_and_hides_its_values() -> None:
    message = _broadcast().to_bytes()
    found = Broadcast.from_bytes(message, size=4)
    assert (found.run_id, found.phase, found.round, found.layout_digest) == ("r", "train", 3, "d" * 64)
    np.testing.assert_array_equal(found.params_D, _broadcast().params_D)
    assert "array" not in repr(found)


@pytest.mark.parametrize(
    "message",
    [b"", b"\x00", b"\xff\xff", _broadcast().to_bytes()[:-1], _broadcast(5).to_bytes(), b"\x03\x00abc" + bytes(16)],
)
def test_a_malformed_broadcast_is_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        Broadcast.from_bytes(message, size=4)


def test_a_client_refuses_a_broadcast_of_another_model(federation: Callable[..., Any]) -> None:
    run = federation()
    client = run.phase.clients[_victim(run)]
    size = run.phase.layout.size
    message = replace(_broadcast(size), params_D=np.zeros(size, dtype=np.float32)).to_bytes()
    with pytest.raises(ProtocolError, match="another set of trained tensors"):
        client.respond(message, lambda step, steps: None)
    assert run.holder.ledger.entries() == []
