"""Rules in real rounds: what is sent, what stays, what it costs, and what the server ends with.

Shape suffix: D trained values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.errors import ClientError, ConfigError, ModelError
from privfed.federation.messages import Broadcast
from privfed.federation.personal import PERSONAL, PersonalStore, folder_name
from privfed.federation.progress import Silent
from privfed.federation.round import run_round
from privfed.privacy.mechanisms import clip_update
from privfed.rules.scaffold import CONTROL

LORA = {"name": "lora", "r": 2}
FREE = {"privacy": {"unit": "none"}, "secagg": {"name": "none"}, "tuning": LORA}


def _by_name(run: Any, params_D: np.ndarray) -> dict[str, np.ndarray]:
    layout = run.phase.layout
    parts = np.split(params_D, np.cumsum(layout.sizes)[:-1])
    return {n: part.reshape(shape) for n, shape, part in zip(layout.names, layout.shapes, parts, strict=True)}


def _recording(run: Any, recorded: Any) -> dict[str, Any]:
    trainers = {name: recorded(run.stage.trainer) for name in run.phase.clients}
    run.trainers(lambda client: trainers[client.shard.client_id])
    return trainers


def _is_head(name: str) -> bool:
    return "classifier" in name


@pytest.mark.parametrize("masked", ["masked", "none"])
def test_rolora_trains_and_sends_one_factor_at_a_time(masked: str, federation: Callable[..., Any]) -> None:
    run = federation(
        tuning=LORA, secagg={"name": masked}, server={"aggregation": "rolora", "optimizer": "adam", "cohort_size": 4}
    )
    sizes = {"A": 0, "B": 0, "head": 0}
    for name, size in zip(run.phase.layout.names, run.phase.layout.sizes, strict=True):
        sizes["head" if _is_head(name) else "A" if "lora_A" in name else "B"] += size
    ups = []
    for number, moving in ((1, "lora_B"), (2, "lora_A"), (3, "lora_B")):
        before = _by_name(run, run.state.params_D)
        after, report = run.round()
        assert report.survivors == 4
        for name, value in _by_name(run, after.params_D).items():
            moved = not np.array_equal(value, before[name])
            assert moved == (_is_head(name) or moving in name), (number, name)
        ups.append(report.bytes_up)
        sent = run.phase.sharing.part(number).sent
        assert sent.size == sizes["head"] + sizes[moving[-1]]
        assert 4 * 4 * sent.size <= report.bytes_up <= 4 * 4 * sent.size + (4000 if masked == "none" else 40_000)
    whole = federation(tuning=LORA, secagg={"name": masked}, server={"cohort_size": 4})
    _, report = whole.round()
    assert report.bytes_up - ups[0] == 4 * 4 * sizes["A"]
    assert report.bytes_up - ups[1] == 4 * 4 * sizes["B"]
    steps = run.phase.sharing.turns(3)
    assert {2.0, 3.0} == set(np.unique(steps))  # B for the second time, the head for the third


def test_rolora_noises_only_what_it_trains(federation: Callable[..., Any], recorded: Any) -> None:
    run = federation(tuning=LORA, server={"aggregation": "rolora", "cohort_size": 4})
    trainers = _recording(run, recorded)
    run.round()
    for trainer in trainers.values():
        for name, value in _by_name(run, trainer.delta_D).items():
            assert bool(value.any()) == ("lora_A" not in name)


def test_fedsa_sends_a_and_keeps_b(federation: Callable[..., Any], recorded: Any, tmp_path: Path) -> None:
    run = federation(**FREE | {"server": {"aggregation": "fedsa_lora", "cohort_size": 4}})
    start = _by_name(run, run.state.params_D)
    trainers = _recording(run, recorded)
    sharing = run.phase.sharing
    seen: dict[str, np.ndarray] = {}
    for trainer in trainers.values():
        trainer.around = lambda train, params_D, shard, *rest: (
            seen.__setitem__(shard.client_id, params_D),
            train(params_D, shard, *rest),
        )[1]
    before = run.state
    after, report = run.round()
    assert all("lora_B" in name for name in sharing.personal.names)
    assert sharing.shared.size + sharing.personal.size == sharing.layout.size
    assert report.bytes_up < 4 * (4 * sharing.shared.size + 200)
    assert report.bytes_down < 4 * (4 * sharing.shared.size + 400)
    mean = np.mean([trainer.delta_D for trainer in trainers.values()], axis=0)
    np.testing.assert_allclose(
        sharing.shared.take(after.params_D), sharing.shared.take(before.params_D + mean), atol=1e-6
    )
    np.testing.assert_array_equal(sharing.personal.take(after.params_D), sharing.personal.take(before.params_D))
    store = PersonalStore(tmp_path / "own")
    kept = {name: store.load(name, before=2)[PERSONAL] for name in trainers}
    for name, trainer in trainers.items():
        np.testing.assert_array_equal(kept[name], sharing.personal.take(before.params_D + trainer.delta_D))
    assert len({value.tobytes() for value in kept.values()}) == 4
    run.round()  # the second round starts from what each kept, and from the shared average
    for name in trainers:
        np.testing.assert_array_equal(sharing.personal.take(seen[name]), kept[name])
        np.testing.assert_array_equal(sharing.shared.take(seen[name]), sharing.shared.take(after.params_D))
    assert not any(start[name].any() for name in sharing.personal.names)


def test_personal_parts_are_clipped_and_noised_with_the_shared_ones_under_example_level(
    federation: Callable[..., Any], recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from privfed.federation import local

    lengths: list[int] = []
    plain = local.privatise_sum
    monkeypatch.setattr(
        local, "privatise_sum", lambda sum_D, **options: (lengths.append(sum_D.size), plain(sum_D, **options))[1]
    )
    run = federation(tuning=LORA, server={"aggregation": "fedsa_lora", "personal": ["head"], "cohort_size": 4})
    run.round()
    assert set(lengths) == {run.phase.layout.size}  # one vector, all of it under one clip
    assert len(run.holder.ledger.entries()) == 4


def test_under_client_level_only_what_is_sent_is_clipped(federation: Callable[..., Any], given: Any) -> None:
    run = federation(
        tuning=LORA,
        privacy={"unit": "client", "l2_clip_norm": 0.5},
        secagg={"name": "none"},
        server={"aggregation": "fedsa_lora", "cohort_size": 4},
    )
    sharing = run.phase.sharing
    update = np.full(run.phase.layout.size, 3.0, dtype=np.float32)
    run.trainers(lambda client: given(update))
    sent: list[np.ndarray] = []
    encode = type(run.phase.codec).encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(run.phase.codec), "encode", lambda self, v, stream: (sent.append(v), encode(self, v, stream))[1]
        )
        while not sent:
            run.round()
    for vector in sent:
        np.testing.assert_array_equal(vector, clip_update(sharing.shared.take(update), 0.5))
    kept = run.phase.store.load(_taken(run), before=100)[PERSONAL]
    np.testing.assert_array_equal(kept, np.full(sharing.personal.size, 3.0))
    assert run.phase.central.sensitivity == 0.5


def _taken(run: Any) -> str:
    return next(str(name) for name in run.phase.clients if run.phase.store.load(name, before=100))


def test_a_round_with_personal_parts_is_the_same_again_and_charged_once(
    federation: Callable[..., Any], tmp_path: Path
) -> None:
    run = federation(tuning=LORA, server={"aggregation": "fedsa_lora", "cohort_size": 4})
    run.round()
    first, _ = run_round(run.state, run.phase, run.holder, Silent())
    head, kept = run.holder.ledger.head(), _files(tmp_path)
    second, _ = run_round(run.state, run.phase, run.holder, Silent())
    assert second.params_D.tobytes() == first.params_D.tobytes()
    assert run.holder.ledger.head() == head
    assert _files(tmp_path) == kept
    # a client whose own state is another must not meet the same noise: that is another charge
    victim = sorted(run.phase.clients)[0]
    own = run.phase.store.load(victim, before=2)
    run.phase.store.save(victim, 1, {PERSONAL: own[PERSONAL] + np.float32(1e-3)})
    run_round(run.state, run.phase, run.holder, Silent())
    assert len(run.holder.ledger.entries()) == 9


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted((folder / "own").rglob("*.safetensors"))}


def test_a_client_that_fails_keeps_what_it_had(federation: Callable[..., Any], recorded: Any) -> None:
    run = federation(**FREE | {"server": {"aggregation": "fedsa_lora", "cohort_size": 4}})
    trainers = _recording(run, recorded)
    run.round()
    victim = sorted(trainers)[1]
    before = run.phase.store.load(victim, before=2)[PERSONAL]
    trainers[victim].around = lambda *_: (_ for _ in ()).throw(RuntimeError("on fire"))
    _, report = run.round()
    assert report.survivors == 3
    np.testing.assert_array_equal(run.phase.store.load(victim, before=3)[PERSONAL], before)


def test_where_personal_parts_start_has_to_be_told(federation: Callable[..., Any]) -> None:
    run = federation(**FREE | {"server": {"aggregation": "fedsa_lora"}})
    client = next(iter(run.phase.clients.values()))
    sharing = run.phase.sharing
    message = Broadcast(
        run_id="r",
        phase="train",
        round=1,
        layout_digest=sharing.layout.digest,
        params_D=sharing.shared.take(run.state.params_D),
    ).to_bytes()
    with pytest.raises(ClientError, match="where they start"):
        client.respond(message, lambda step, steps: None)


# rules that see each update


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
@pytest.mark.parametrize("rule", ["fedex_lora", "flora"])
def test_the_servers_model_is_the_average_of_the_clients_models(
    rule: str, weighting: str, federation: Callable[..., Any], given: Any
) -> None:
    run = federation(
        **FREE
        | {
            "server": {"aggregation": rule, "cohort_size": 4, "weighting": weighting},
            "partition": {"name": "quantity", "clients": 4, "alpha": 0.7, "min_size": 8},
        }
    )
    rng = np.random.default_rng(2)
    deltas = {name: rng.normal(0, 0.1, run.phase.layout.size).astype(np.float32) for name in run.phase.clients}
    sizes = np.array([len(run.phase.clients[name].shard) for name in deltas], dtype=np.float64)
    shares = sizes / sizes.sum() if weighting == "examples" else np.full(4, 0.25)
    run.trainers(lambda client: given(deltas[client.shard.client_id]))
    for _ in range(2):
        before = run.state
        after, _ = run.round()
        clients = [_by_name(run, before.params_D + delta_D) for delta_D in deltas.values()]
        averaged = _by_name(run, before.params_D + shares @ np.array(list(deltas.values())))
        now = _by_name(run, after.params_D)
        for pair in run.phase.sharing.pairs:
            products = [pair.scale * each[pair.b].astype(np.float64) @ each[pair.a] for each in clients]
            wanted = before.carried[pair.weight] + sum(s * p for s, p in zip(shares, products, strict=True))
            found = after.carried[pair.weight] + pair.scale * now[pair.b].astype(np.float64) @ now[pair.a]
            np.testing.assert_allclose(found, wanted, atol=1e-5)  # weights are sent on a grid of 2^-16
            apart = before.carried[pair.weight] + pair.scale * averaged[pair.b] @ averaged[pair.a]
            assert np.abs(apart - wanted).max() > 1e-2
    assert after.carried.keys() == {pair.weight for pair in run.phase.sharing.pairs}


def test_a_lost_round_leaves_what_is_carried(federation: Callable[..., Any], given: Any) -> None:
    run = federation(**FREE | {"server": {"aggregation": "flora", "cohort_size": 4}})
    run.round()
    before = run.state
    run.trainers(lambda client: given(np.full(run.phase.layout.size, np.nan, dtype=np.float32)))
    after, report = run.round()
    assert report.lost == "no client survived"
    assert after.params_D.tobytes() == before.params_D.tobytes()
    assert all(np.array_equal(after.carried[name], value) for name, value in before.carried.items())


def test_clients_train_on_the_carried_weights(federation: Callable[..., Any]) -> None:
    from privfed.federation.pairs import read_named

    run = federation(**FREE | {"server": {"aggregation": "fedsvd", "cohort_size": 4}})
    run.round()
    names = run.phase.sharing.carried
    assert all("lora_A" in name for name in names)
    assert not set(names) & set(run.phase.layout.names)
    moved = {name: value + np.float32(1) for name, value in run.state.carried.items()}
    run.state = replace(run.state, carried=moved)
    _, report = run.round()
    assert report.survivors == 4
    for name, value in read_named(run.stage.module, names).items():
        np.testing.assert_array_equal(value, moved[name])


# refusals that need the model


def test_a_variant_of_lora_is_refused(federation: Callable[..., Any]) -> None:
    from privfed.federation.pairs import check_pairs, find_pairs
    from privfed.rules import RULES

    run = federation(**FREE)
    rule = RULES.get("fedex_lora")()
    pairs = find_pairs(run.stage.module)
    check_pairs(run.stage.module, rule, pairs, "fedex_lora")
    layer = dict(run.stage.module.named_modules())[pairs[0].weight.removesuffix(".base_layer.weight")]
    layer.lora_variant["default"] = object()
    with pytest.raises(ModelError, match="variant of LoRA"):
        check_pairs(run.stage.module, rule, pairs, "fedex_lora")
    del layer.lora_variant["default"]
    layer.base_layer.weight.data = layer.base_layer.weight.data.half()
    with pytest.raises(ModelError, match="float32"):
        check_pairs(run.stage.module, rule, pairs, "fedex_lora")
    with pytest.raises(ModelError, match="has none"):
        check_pairs(run.stage.module, rule, (), "fedex_lora")


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ({"personal": ["nothing.*"]}, "matches none"),
        ({"personal": ["*"]}, "leaves no trained tensor"),
        ({"personal": ["*.lora_B.*"], "aggregation": "flexlora"}, "makes it anew"),
        ({"personal": ["head"], "aggregation": "fedex_lora"}, "whole model"),
    ],
)
def test_personal_parts_that_cannot_be(server: dict[str, Any], words: str, federation: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=words):
        federation(**FREE | {"server": server})


# control variates


@pytest.mark.parametrize("unit", ["none", "example"])
def test_scaffold_equals_the_papers_algorithm(unit: str, federation: Callable[..., Any], recorded: Any) -> None:
    """Algorithm 1 with option II, both messages by hand, against what the server derived from the first."""
    rate, steps = 0.5, 2
    tables = {"privacy": {"unit": unit}, "secagg": {"name": "none"}, "tuning": LORA}
    run = federation(**tables, server={"aggregation": "scaffold", "cohort_size": 3})
    trainers = _recording(run, recorded)
    size = run.phase.layout.size
    c, own = np.zeros(size), {name: np.zeros(size) for name in trainers}
    corrections: dict[str, np.ndarray] = {}
    for trainer in trainers.values():
        trainer.around = lambda train, params_D, shard, stream, on_step, work: (
            corrections.__setitem__(shard.client_id, work.correction_D),
            train(params_D, shard, stream, on_step, work),
        )[1]
    for _ in range(3):
        corrections.clear()
        before = run.state
        after, report = run.round()
        assert len(corrections) == report.survivors == 3
        changes = []
        for name, correction in corrections.items():
            np.testing.assert_allclose(correction, c - own[name], atol=1e-5)
            plus = own[name] - c - trainers[name].delta_D.astype(np.float64) / (rate * steps)
            changes.append(plus - own[name])
            own[name] = plus
        c = c + len(changes) / 4 * np.mean(changes, axis=0)
        np.testing.assert_allclose(after.carried[CONTROL], c, atol=1e-5)
        mean = np.mean([trainers[name].delta_D for name in corrections], axis=0)
        np.testing.assert_allclose(after.params_D, before.params_D + mean, atol=1e-6)
    assert np.abs(c).max() > 1e-3


def test_scaffolds_variates_are_functions_of_what_was_released(federation: Callable[..., Any]) -> None:
    """From broadcasts and sums alone the server's variate comes out, and the charges are those of FedAvg."""
    events = {}
    for rule in ("fedavg", "scaffold"):
        run = federation(tuning=LORA, secagg={"name": "none"}, server={"aggregation": rule, "cohort_size": 4})
        released = [run.state, *(run.round()[0] for _ in range(2))]
        assert run.plan.noise_multiplier == 1.0
        entries = run.holder.ledger.entries()[-8:]
        events[rule] = (run.plan.epsilon, run.plan.events_by_client, [e.charge.event for e in entries])
        ups = run.phase.sharing.part(1).sent.size
        if rule == "scaffold":
            c = np.zeros(ups)
            for before, after in pairwise(released):
                c = c + (-c - (after.params_D - before.params_D).astype(np.float64))  # K h = 1, all four took part
                np.testing.assert_allclose(after.carried[CONTROL], c, atol=1e-5)
    assert events["fedavg"] == events["scaffold"]


def test_scaffold_under_client_level_keeps_the_sensitivity_at_the_clip(
    federation: Callable[..., Any], given: Any
) -> None:
    run = federation(
        tuning=LORA,
        privacy={"unit": "client", "l2_clip_norm": 0.5},
        secagg={"name": "none"},
        server={"aggregation": "scaffold", "cohort_size": 4},
    )
    size = run.phase.layout.size
    huge = np.full(size, 2.0, dtype=np.float32)
    clipped = clip_update(huge, 0.5)
    run.trainers(lambda client: given(huge))
    run.phase = replace(run.phase, central=replace(run.phase.central, noise_multiplier=1e-6))
    assert run.phase.central.sensitivity == 0.5
    before = run.state
    after, report = run.round()
    # all that a client moved, in parameters and in the variate, is its clipped update (K h = 1)
    moved = after.params_D - before.params_D
    assert np.linalg.norm(moved - clipped * np.float32(report.survivors / 4)) < 1e-3
    np.testing.assert_allclose(after.carried[CONTROL], -moved, atol=1e-6)
    assert report.survivors == 4  # all of four, each with probability 1
    np.testing.assert_allclose(run.phase.store.load(_taken(run), before=2)[CONTROL], -clipped, atol=1e-7)


def test_the_broadcast_of_variates_is_counted(federation: Callable[..., Any]) -> None:
    downs, ups = {}, {}
    for rule in ("fedavg", "scaffold"):
        run = federation(**FREE | {"server": {"aggregation": rule, "cohort_size": 4}})
        _, report = run.round()
        downs[rule], ups[rule] = report.bytes_down, report.bytes_up
    assert ups["fedavg"] == ups["scaffold"]
    size = run.phase.layout.size
    assert 4 * 4 * size <= downs["scaffold"] - downs["fedavg"] <= 4 * (4 * size + 64)


# the clients' files


def test_a_store_gives_the_state_before_a_round_and_forgets_when_told(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path / "own")
    assert store.load("c", before=5) == {}
    for number in (1, 4, 7):
        store.save("c", number, {PERSONAL: np.full(2, number, dtype=np.float32)})
    assert [int(store.load("c", before=n)[PERSONAL][0]) for n in (2, 4, 5, 7, 8)] == [1, 1, 4, 4, 7]
    store.settle(4)  # the checkpoint of round 4 is durable; what is of round 7 may be repeated
    assert [int(store.load("c", before=n)[PERSONAL][0]) for n in (5, 8)] == [4, 7]
    assert store.load("c", before=4) == {}
    assert len(list((tmp_path / "own" / "c").iterdir())) == 2


@pytest.mark.parametrize("name", ["a/b", "../x", "", "A", "a" * 300, "ü", "a b", "con.", "x\x00y"])
def test_any_client_id_has_a_folder_of_its_own(name: str, tmp_path: Path) -> None:
    store = PersonalStore(tmp_path / "own")
    store.save(name, 1, {PERSONAL: np.ones(1, dtype=np.float32)})
    assert store.load(name, before=2)[PERSONAL][0] == 1
    assert [path.name for path in (tmp_path / "own").iterdir()] == [folder_name(name)]


def test_different_ids_never_share_a_folder() -> None:
    ids = ["a/b", "a_b", "a.b", "", "A", "a", "Ä", "ä", "a b", "a" * 80, "a" * 81, "a" * 300, "_", "/"]
    ids += [folder_name(each) for each in ids if folder_name(each) not in ids]
    assert len({folder_name(each).lower() for each in ids}) == len(ids)


def test_a_damaged_file_is_refused_with_its_name(tmp_path: Path) -> None:
    from privfed.errors import ResumeError

    store = PersonalStore(tmp_path / "own")
    store.save("c", 1, {PERSONAL: np.ones(1, dtype=np.float32)})
    next((tmp_path / "own" / "c").iterdir()).write_bytes(b"no")
    with pytest.raises(ResumeError, match="00000001"):
        store.load("c", before=2)
