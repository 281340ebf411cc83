"""Ten thousand clients: what a round makes and keeps follows its cohort, not the number of clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.federation.cohort import balanced_cohort
from privfed.federation.roster import Roster
from privfed.types import Shard

CLIENTS, COHORT = 10_000, 20


@pytest.fixture
def crowd(federation: Callable[..., Any], given: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return ``crowd(**tables)``: a run of client level over many clients, and the ids of each client made."""
    from privfed.federation import setup

    def build(**tables: Any) -> tuple[Any, list[str]]:
        made: list[str] = []
        client = setup.Client

        def counted(**fields: Any) -> Any:
            made.append(fields["shard"].client_id)
            return client(**{**fields, "trainer": given(np.zeros(fields["sharing"].layout.size, dtype=np.float32))})

        def gathered(config: Any) -> Any:
            material = gather(config)
            rows = material.shards[0].indices[:2]
            shards = tuple(Shard(client_id=f"c{i:05}", indices=rows) for i in range(CLIENTS))
            return replace(material, shards=shards)

        from privfed.federation import material as materials

        gather = materials.gather
        monkeypatch.setattr(setup, "Client", counted)
        monkeypatch.setattr(materials, "gather", gathered)
        server = {"cohort_size": COHORT, "rounds": 50, **tables.pop("server", {})}
        privacy = {"unit": "client", "target_delta": 1e-6, **tables.pop("privacy", {})}
        run = federation(privacy=privacy, server=server, secagg={"name": "none"}, **tables)
        return run, made

    return build


def test_only_the_cohorts_clients_are_ever_made(crowd: Callable[..., Any]) -> None:
    run, made = crowd(partition={"name": "iid", "clients": 20})
    assert made == []  # setting up makes none
    assert len(run.phase.clients) == CLIENTS
    assert "c00007" in run.phase.clients
    assert made == []
    for _ in range(5):
        made.clear()
        _, report = run.round()
        assert len(made) == len(set(made)) == report.cohort
        assert report.cohort < 3 * COHORT
    assert dict(run.state.taken) == {}  # nothing grows with the rounds


def test_a_state_of_many_clients_is_as_large_as_one_of_few(crowd: Callable[..., Any], tmp_path: Path) -> None:
    from privfed.federation.checkpoint import Checkpoint, save_checkpoint

    run, _ = crowd(partition={"name": "iid", "clients": 20})
    sizes = []
    for number in range(3):
        run.round()
        path = tmp_path / f"state{number}"
        save_checkpoint(path, Checkpoint(state=run.state, metrics_bytes=0))
        sizes.append(path.stat().st_size)
    assert max(sizes) - min(sizes) < 64
    assert max(sizes) < 4 * run.phase.layout.size + 2_000


def test_own_states_are_kept_on_disk_for_those_who_came(crowd: Callable[..., Any], tmp_path: Path) -> None:
    run, made = crowd(
        partition={"name": "iid", "clients": 20}, tuning={"name": "lora", "r": 2}, server={"aggregation": "fedsa_lora"}
    )
    came = set()
    for _ in range(3):
        made.clear()
        run.round()
        came |= set(made)
        run.phase.store.settle(run.state.round)
    assert {path.name for path in (tmp_path / "own").iterdir()} == came
    assert len(list((tmp_path / "own").rglob("*.safetensors"))) == len(came)


def test_a_roster_makes_each_client_when_it_is_asked_for() -> None:
    made: list[str] = []

    def make(shard: Shard) -> Any:
        made.append(shard.client_id)
        return shard

    shards = [Shard(client_id=name, indices=np.arange(1)) for name in ("b", "a", "c")]
    roster = Roster(shards, make)
    assert (list(roster), len(roster), "a" in roster, "x" in roster) == (["a", "b", "c"], 3, True, False)
    assert made == []
    assert roster["b"] is shards[0]  # type: ignore[comparison-overlap]
    assert [client.client_id for client in roster.values()] == ["a", "b", "c"]  # type: ignore[attr-defined]
    assert made == ["b", "a", "b", "c"]
    with pytest.raises(KeyError):
        roster["x"]


def test_keys_are_made_for_the_cohort_alone_and_are_the_same_each_time(
    federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from privfed.secagg import Identity

    made: list[bytes] = []
    from_seed = Identity.from_seed

    def counted(seed: bytes) -> Identity:
        made.append(seed)
        return from_seed(seed)

    monkeypatch.setattr(Identity, "from_seed", staticmethod(counted))
    run = federation(
        privacy={"unit": "none", "noise_multiplier": None},
        partition={"name": "iid", "clients": 8},
        server={"cohort_size": 4},
        secagg={"name": "masked"},
    )
    assert made == [] and len(run.phase.identities) == 8
    _, report = run.round()
    assert report.survivors == len(made) == len(set(made)) == 4
    one = run.phase.identities["client-0"]
    assert one is not run.phase.identities["client-0"]
    assert one.public == run.phase.identities["client-0"].public != run.phase.identities["client-1"].public


def test_balanced_cohorts_are_those_of_the_plain_definition() -> None:
    from privfed.rng import experiment_rng

    names = [f"c{i}" for i in range(53)]
    rng = np.random.default_rng(1)
    for number in range(20):
        taken = {name: int(count) for name, count in zip(names, rng.integers(0, 4, 53), strict=True) if count}
        order = experiment_rng(9, "cohort", "train", number).permutation(len(names))
        ranked = sorted(range(len(names)), key=lambda i, o=order, t=taken: (t.get(names[i], 0), o[i]))
        wanted = tuple(sorted(names[i] for i in ranked[:7]))
        assert balanced_cohort(names, taken, 7, seed=9, phase="train", round_number=number) == wanted
