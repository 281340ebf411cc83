"""Rounds through every codec: what the server makes of them is what the codec library gives by hand.

Shape suffixes: D trained values, M values given to the codec.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.compression import CODECS, Ring, plugin_of
from privfed.compression.feedback import corrected, residual
from privfed.compression.message import read, sum_of_one, to_bytes
from privfed.federation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from privfed.federation.client import Client, _digest
from privfed.federation.codecs import Place
from privfed.federation.messages import Interim
from privfed.federation.progress import Silent
from privfed.federation.round import run_round
from privfed.privacy.mechanisms import REPEATED, Moment, clip_update
from privfed.privacy.noise import privatise_sum
from privfed.types import EncodedSum

QUANTIZER = {"name": "stochastic_quantizer", "bits": 10, "max_value": 2.0}
CASES: dict[str, dict[str, Any]] = {
    "identity": {"name": "identity"},
    "cast": {"name": "cast"},
    "quantizer": QUANTIZER,
    "sign": {"name": "sign", "error_feedback": True},
    "sign, mean": {"name": "sign", "vote": "mean"},
    "rotated": {"name": "rotated_quantizer", "bits": 8, "max_norm": 4.0},
    "random_k": {"name": "random_k", "density": 0.3, "inner": QUANTIZER},
    "random_k, feedback": {"name": "random_k", "density": 0.3, "unbiased": False, "error_feedback": True},
    "top_k": {"name": "top_k", "density": 0.05},
    "top_k + quantizer": {"name": "top_k", "density": 0.05, "inner": QUANTIZER},
    "count_sketch": {"name": "count_sketch", "rows": 3, "columns": 200, "momentum": 0.5, "max_norm": 2.0},
    "powersgd": {"name": "powersgd", "rank": 1},
    "powersgd, cold": {"name": "powersgd", "rank": 1, "warm_start": False, "inner": QUANTIZER},
    "svd_truncate": {"name": "svd_truncate", "rank": 1, "error_feedback": True},
    "global_mask": {"name": "global_mask", "density": 0.1, "refresh": 2},
    "seed_projection": {"name": "seed_projection", "directions": 64, "error_feedback": True},
}
PRIVACY: dict[str, dict[str, Any]] = {
    "none": {"unit": "none"},
    "example": {"unit": "example"},
    "client": {"unit": "client", "l2_clip_norm": 0.5},
}
CLIP = 0.5


def _declared(case: str, masked: bool) -> Any:
    table = CODECS.get(CASES[case]["name"]).config.model_validate(CASES[case])
    return plugin_of(table).declare(table, masked)


CELLS = [
    (case, masking, unit)
    for case in CASES
    for masking in ("none", "masked")
    if masking == "none" or _declared(case, True).summable
    for unit in PRIVACY
]


def _tables(case: str, masking: str, unit: str, **more: Any) -> dict[str, Any]:
    """Four clients, all of whom take part."""
    server = {"cohort_size": 4, "rounds": 3, **more.pop("server", {})}
    tuning = {"name": "lora", "r": 4}
    return {
        "compression": CASES[case],
        "secagg": {"name": masking},
        "privacy": PRIVACY[unit],
        "server": server,
        "tuning": tuning,
        "client": {"local_steps": 1, "learning_rate": 0.5},
        **more,
    }


@dataclass
class Hand:
    """The rounds of a run done by hand, from what clients trained and what the server broadcast."""

    run: Any
    masked: bool
    unit: str
    state: Any = None
    kept: dict[str, Any] = field(default_factory=dict)
    bytes_up: int = 0
    codec: Any = None

    def codec_of(self, number: int) -> Any:
        config, sent = self.run.config.compression, self.run.phase.sharing.part(number).sent
        ring = Ring(bits=self.run.config.ring_bits(4), clients=4) if self.masked else None
        base = plugin_of(config).build(config, ring)
        if self.state is None:
            self.state = base.start_state(sent.size)
        place = Place(seed=self.run.config.seed, run_id="run", phase="train", round=number)
        return base.at(place.context(sent.layout, base.public_state(self.state)))

    def round(self, number: int, updates: dict[str, Any], broadcast: bytes) -> Any:
        """Return the averaged update of a round."""
        codec, length = self.codec_of(number), len(next(iter(updates.values())))
        given, digests = {}, {}
        for client, update in updates.items():
            own = {"residual." + self._part(number): self.kept[client]} if client in self.kept else {}
            digests[client] = _digest(broadcast, own)
            vector = corrected(update, self.kept.get(client))
            given[client] = clip_update(vector, CLIP) if self.unit == "client" else vector
        encoded, mean = self._exchange(codec, given, digests, number, length, broadcast, b"")
        if codec.properties.second_pass:
            told = codec.between(mean, length)
            interim = Interim(phase="train", round=number, values=told).to_bytes()
            codec = codec.second(told, length)
            again = {c: hashlib.sha256(d.encode() + interim).hexdigest() for c, d in digests.items()}
            encoded, mean = self._exchange(codec, given, again, number, length, broadcast, interim)
        if codec.properties.stateful:
            self.kept = {client: residual(codec, given[client], encoded[client]) for client in given}
        mean_D, self.state = codec.expand(mean, self.state, length)
        self.codec = codec
        return mean_D

    def _exchange(
        self, codec: Any, given: dict[str, Any], digests: dict[str, str], number: int, length: int, broadcast: bytes,
        interim: bytes,
    ) -> tuple[dict[str, Any], Any]:  # fmt: skip
        holder = self.run.holder
        encoded = {
            client: codec.encode(vector, holder.stream("encode", client, "train", number, digests[client]))
            for client, vector in given.items()
        }
        linear = codec.linear_sum(self._total(codec, encoded, length))
        if self.unit != "client":
            return encoded, linear / len(given)
        phase = "train, second pass" if interim else "train"
        digest = Moment(phase=phase, round=number, broadcast=broadcast + interim).digest(linear)
        sums = 2 if self.run.phase.codec.properties.second_pass else 1
        bound = codec.l2_bound(CLIP, length)
        noised = privatise_sum(
            linear,
            standard_deviation=self.run.plan.noise_multiplier * bound * np.sqrt(sums),
            stream=holder.stream("noise", phase, number, digest),
            sensitivity=bound,
        )
        return encoded, noised / 4

    def _total(self, codec: Any, encoded: dict[str, Any], length: int) -> EncodedSum:
        first = next(iter(encoded.values()))
        if self.masked:
            ring = np.uint64((1 << first.num_bits) - 1)
            total: Any = np.sum([e.values_M.astype(np.uint64) for e in encoded.values()], axis=0) & ring
            scale = first.scale
        else:
            messages = [to_bytes(e, client_id=client, weight=1.0) for client, e in encoded.items()]
            self.bytes_up += sum(map(len, messages))
            received = [read(message, length=length, codec=codec) for message in messages]
            total, scale = np.sum([each.values for each in received], axis=0), received[0].scale
        return EncodedSum(
            sum_M=total,
            codec=codec.name,
            scale=scale,
            length=length,
            survivors=len(encoded),
            total_weight=float(len(encoded)),
        )

    def _part(self, number: int) -> str:
        return str(self.run.phase.sharing.part(number).sent.layout.digest[:12])


@pytest.fixture
def broadcasts(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The broadcast of each answer, as clients got it."""
    heard: list[bytes] = []
    respond = Client.respond

    def listening(client: Client, broadcast: bytes, *rest: Any) -> Any:
        heard.append(broadcast)
        return respond(client, broadcast, *rest)

    monkeypatch.setattr(Client, "respond", listening)
    return heard


def _recording(run: Any, recorded: Any) -> dict[str, Any]:
    trainers = {name: recorded(run.stage.trainer) for name in run.phase.clients}
    run.trainers(lambda client: trainers[client.shard.client_id])
    return trainers


def _events(run: Any) -> Any:
    return run.holder.ledger.events_of("run")


@pytest.mark.parametrize(("case", "masking", "unit"), CELLS)
def test_rounds_are_what_the_library_gives_by_hand(
    case: str, masking: str, unit: str, federation: Callable[..., Any], recorded: Any, broadcasts: list[bytes]
) -> None:
    run = federation(**_tables(case, masking, unit))
    trainers = _recording(run, recorded)
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


STATEFUL = [cell for cell in CELLS if _declared(cell[0], False).stateful or _declared(cell[0], False).server_state]


@pytest.mark.parametrize(("case", "masking", "unit"), [cell for cell in STATEFUL if cell[2] != "none"])
def test_a_run_from_a_checkpoint_is_the_unbroken_one_to_the_bit(
    case: str, masking: str, unit: str, federation: Callable[..., Any], tmp_path: Path
) -> None:
    unbroken = federation(**_tables(case, masking, unit))
    states = [unbroken.round()[0] for _ in range(3)]
    own = _files(tmp_path)
    charged = unbroken.holder.ledger.head()
    resumed = federation(**_tables(case, masking, unit))
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
        run = federation(**_tables("random_k, feedback", "none", "none"))
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


@pytest.fixture
def noised(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[np.ndarray]]:
    """What the server hands to the codec after noise and average: means of linear sums."""
    seen: list[Any] = []
    from privfed.federation import round as rounds

    release = rounds._release

    def watching(*args: Any) -> Any:
        found = release(*args)
        seen.append(found.mean_D)
        return found

    monkeypatch.setattr(rounds, "_release", watching)
    yield seen


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
    run = federation(
        **{**_tables("identity", "none", "client"), "compression": NOISY[case], "tuning": {"name": "full"}}
    )
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
    tables = _tables("identity", "none", "client")
    tables |= {"compression": {"name": "random_k", "density": 0.25}, "tuning": {"name": "full"}}
    run = federation(**tables)
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
    run = federation(**_tables("top_k", "none", "client"))
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


# two passes


def _drops_between(run: Any, victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    second = Client._second

    def failing(client: Client, *args: Any) -> Any:
        if client.shard.client_id == victim:
            raise RuntimeError("gone")
        return second(client, *args)

    monkeypatch.setattr(Client, "_second", failing)


def test_the_second_pass_is_averaged_over_its_own_survivors(
    federation: Callable[..., Any], recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation(**_tables("powersgd", "none", "none"))
    trainers = _recording(run, recorded)
    names = sorted(run.phase.clients)
    _drops_between(run, names[1], monkeypatch)
    before = run.state
    after, report = run.round()
    assert report.survivors == 3 and [name for name, _ in report.dropped] == [names[1]]
    codec, size = Hand(run, False, "none").codec_of(1), run.phase.layout.size
    updates = {name: trainer.delta_D for name, trainer in trainers.items()}
    linear = sum(codec.linear_sum(sum_of_one(codec.encode(each, None), codec)) for each in updates.values())
    second = codec.second(codec.between(linear / 4, size), size)  # all four made the direction
    left = [each for name, each in updates.items() if name != names[1]]
    mean_D = sum(second.decode_sum(sum_of_one(second.encode(each, None), second)) for each in left) / 3
    np.testing.assert_allclose(after.params_D - before.params_D, mean_D, atol=1e-6)
    # still an estimate of the mean over three: a projection of it
    whole = np.mean(left, axis=0)
    assert np.linalg.norm(mean_D - whole) < np.linalg.norm(whole)
    assert run.phase.store.load(names[1], before=2) == {}  # its update was lost whole, and nothing is left of it
    assert run.phase.store.load(names[0], before=2)


@pytest.mark.parametrize("unit", ["none", "client"])
def test_under_masking_a_client_that_drops_between_the_passes_costs_the_round(
    unit: str, federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sums over different survivors would show what the missing one alone would have sent."""
    run = federation(**_tables("powersgd", "masked", unit))
    assert run.phase.requirements.least_survivors(4) == 3  # a single pass would stand one dropped client
    with monkeypatch.context() as patch:
        _drops_between(run, sorted(run.phase.clients)[2], patch)
        before = run.state
        after, report = run.round()
    assert "at least 4 are needed" in report.lost
    assert after.params_D.tobytes() == before.params_D.tobytes()
    assert dict(after.codec) == dict(before.codec)
    after, report = run.round()
    assert (report.lost, report.survivors) == (None, 4)


def test_a_crash_between_the_passes_never_releases_a_second_answer(
    federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = federation(**_tables("powersgd", "none", "client"))
    first, _ = run_round(run.state, run.phase, run.holder, Silent())
    entries = run.holder.ledger.entries()
    assert [entry.charge.event.steps for entry in entries] == [1, 0]
    again, report = run_round(run.state, run.phase, run.holder, Silent())
    assert report.lost is None and again.params_D.tobytes() == first.params_D.tobytes()
    _drops_between(run, sorted(run.phase.clients)[0], monkeypatch)
    other, report = run_round(run.state, run.phase, run.holder, Silent())
    assert report.lost == REPEATED
    assert other.params_D.tobytes() == run.state.params_D.tobytes()
    assert run.holder.ledger.entries() == entries


def test_nobody_in_a_private_round_of_two_passes_is_noise_in_both(
    federation: Callable[..., Any], noised: list[np.ndarray]
) -> None:
    run = federation(**_tables("powersgd", "none", "client"))
    never = replace(run.phase.central.event, sampling_probability=1e-15)
    run.phase = replace(run.phase, central=replace(run.phase.central, event=never))
    before = run.state
    after, report = run.round()
    assert (report.cohort, report.lost) == (0, None)
    assert len(noised) == 2 and all(np.abs(each).min() > 0 for each in noised)
    assert not np.array_equal(after.params_D, before.params_D)
    assert [entry.charge.event.steps for entry in run.holder.ledger.entries()] == [1, 0]


# bytes


def test_masked_vectors_are_as_long_as_the_codec_says(federation: Callable[..., Any]) -> None:
    sent = {}
    for case in ("identity", "random_k, feedback", "random_k", "sign"):
        run = federation(**_tables(case, "masked", "none"))
        codec = Hand(run, True, "none").codec_of(1)
        size, wire = run.phase.layout.size, codec.wire(run.phase.layout.size)
        _, report = run.round()
        sent[case] = report.bytes_up - 4 * -(-wire.values * wire.num_bits // 8)
        assert wire.num_bits == run.phase.ring_bits
        assert wire.values == (size if case in ("identity", "sign") else round(0.3 * size))
        assert wire.num_bits == {"identity": 32, "random_k, feedback": 32, "random_k": 16, "sign": 16}[case]
    assert len(set(sent.values())) == 1  # keys, shares and signatures are the same beside the vectors


# rules that read each update, and rules that send other tensors in turn


INDIVIDUAL = ["quantizer", "rotated", "random_k, feedback", "top_k", "svd_truncate", "powersgd", "global_mask", "cast"]


@pytest.mark.parametrize("case", INDIVIDUAL)
def test_rules_that_read_each_update_get_what_each_message_stands_for(
    case: str, federation: Callable[..., Any], recorded: Any, broadcasts: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from privfed.federation import round as rounds

    seen: list[Any] = []
    step = vars(rounds)["rule_step"]

    def watching(*args: Any) -> Any:
        seen.append(args)
        return step(*args)

    monkeypatch.setattr(rounds, "rule_step", watching)
    run = federation(**_tables(case, "none", "none", server={"aggregation": "flexlora"}))
    trainers = _recording(run, recorded)
    hand = Hand(run, False, "none")
    for number in (1, 2):
        run.round()
        mean_D = hand.round(number, {name: each.delta_D for name, each in trainers.items()}, broadcasts[-1])
        _, _, deltas, _, _ = seen[-1]
        assert [share for share, _ in deltas] == [0.25] * 4
        np.testing.assert_allclose(np.mean([delta for _, delta in deltas], axis=0), mean_D, atol=1e-7)
        if case in ("quantizer", "cast"):
            for (_, delta), trainer in zip(deltas, trainers.values(), strict=True):
                np.testing.assert_allclose(delta, trainer.delta_D, atol=2.0 / 511 + 1e-2 * np.abs(delta).max())


@pytest.mark.parametrize("case", ["count_sketch", "random_k, feedback", "global_mask", "powersgd"])
def test_a_rule_that_takes_turns_has_a_state_and_residuals_for_each_turn(
    case: str, federation: Callable[..., Any]
) -> None:
    run = federation(**_tables(case, "none", "none", server={"aggregation": "rolora", "rounds": 4}))
    for _ in range(4):
        _, report = run.round()
        assert (report.survivors, report.dropped) == (4, ())
    parts = {name.split(".")[0] for name in run.state.codec}
    assert len(parts) == (2 if _declared(case, False).server_state else 0)
    own = run.phase.store.load(sorted(run.phase.clients)[0], before=5) if run.phase.store else {}
    assert len(own) == (2 if _declared(case, False).stateful else 0)


@pytest.mark.parametrize("case", ["random_k", "top_k", "svd_truncate", "powersgd", "sign, mean"])
@pytest.mark.parametrize("optimizer", ["sgd", "fedadam"])
def test_weights_and_server_optimisers_go_with_codecs(
    case: str, optimizer: str, federation: Callable[..., Any], recorded: Any
) -> None:
    weighted = _declared(case, False).scales
    server = {"weighting": "examples" if weighted else "uniform", "optimizer": optimizer, "learning_rate": 0.1}
    uneven = {"name": "quantity", "clients": 4, "alpha": 0.7, "min_size": 8}
    run = federation(**_tables(case, "none", "none", server=server, partition=uneven))
    trainers = _recording(run, recorded)
    _, report = run.round()
    assert report.survivors == 4 and report.update_norm > 0
    if case == "svd_truncate":  # close to what was trained: its matrices have one large singular value
        sizes = np.array([len(client.shard) for client in run.phase.clients.values()])
        mean = np.average([trainers[name].delta_D for name in run.phase.clients], axis=0, weights=sizes)
        assert abs(report.update_norm / np.linalg.norm(mean) - 1) < 0.3


@pytest.mark.parametrize("case", ["random_k, feedback", "top_k", "powersgd", "global_mask", "identity"])
def test_the_meter_reads_what_each_message_stands_for(case: str, federation: Callable[..., Any]) -> None:
    for unit in ("none", "client"):
        tables = _tables(case, "none", unit, server={"meter": True})
        if case == "top_k":  # the very largest values are all of the head
            tables["compression"] = {"name": "top_k", "density": 0.5}
        run = federation(**tables)
        _, report = run.round()
        assert report.meter is not None and report.meter.error > 0
        known = unit == "none" or case == "identity"
        assert (report.meter.noise_product is not None) == (known or not _declared(case, False).needs_context)
