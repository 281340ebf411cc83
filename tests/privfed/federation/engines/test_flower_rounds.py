"""A deployment's rounds, with real sites and without Flower: the same bits as in one process, and what faults cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.config import RunConfig
from privfed.data.config import DataConfig
from privfed.federation.checkpoint import load_checkpoint
from privfed.federation.engines.flower.engine import FlowerEngine
from privfed.federation.engines.flower.envelope import Ask
from privfed.federation.engines.flower.fleet import Deadlines
from privfed.privacy.ledger import Ledger
from privfed.run import train

from .deployment import Lab, LabChannel

QUICK = Deadlines(stage=0.05, opening=900.0, patience=900.0)


@pytest.fixture
def labs(tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    """Return ``labs(config, count, **lab)``: running sites, ended after the test."""
    made: list[Lab] = []

    def make(config: RunConfig, count: int = 4, **given: Any) -> Lab:
        made.append(Lab(config, count, tmp_path / f"sites{len(made)}", **given))
        return made[-1]

    yield make
    for lab in made:
        lab.close()


def _engine(lab: Lab) -> FlowerEngine:
    return FlowerEngine(sites=lab.sites, channel=LabChannel(lab), deadlines=QUICK)


def _params(folder: Path) -> np.ndarray:
    checkpoint = load_checkpoint(folder / "checkpoint" / "state.safetensors")
    assert checkpoint is not None
    return checkpoint.state.params_D


def _rounds(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [found for found in map(json.loads, lines) if found["kind"] == "round"]


def _deployed(config: RunConfig, lab: Lab, out: Path, **given: Any) -> Path:
    train(config, out=out, engine=_engine(lab), **given)
    return out


CASES: dict[str, dict[str, Any]] = {
    "masked": {},
    "plain, with error feedback": {"compression": {"name": "sign"}, "secagg": {"name": "none"}},
    "distributed": {
        "privacy": {"placement": "distributed"},
        "client": {"local_steps": 1},
        "server": {"cohort_size": 4},
    },
    "a warm start, weights": {
        "head_warm_start": {"name": "dp_probe", "rounds": 1, "sampling_probability": 0.5},
        "server": {"weighting": "examples", "cohort_size": 4},
        "partition": {"name": "quantity"},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_a_deployment_gives_the_same_bits_as_one_process(
    name: str, tiny_config: Callable[..., RunConfig], labs: Callable[..., Lab], tmp_path: Path
) -> None:
    config = tiny_config(**CASES[name])
    here = tmp_path / "here"
    train(config, out=here)
    lab = labs(config, 2, accept={"secagg": False})
    there = _deployed(config, lab, tmp_path / "there")
    np.testing.assert_array_equal(_params(there), _params(here))
    assert [r["survivors"] for r in _rounds(there)] == [r["survivors"] for r in _rounds(here)]
    kinds = [ask.kind for site, ask in lab.asks if site == "site-0"]
    masked = ["keys", "shares", *["train", "agree", "unmask"] * 2]  # three stages a round; two more before the first
    phases = 2 if "head_warm_start" in CASES[name] else 1
    if name == "masked":
        assert kinds == ["open", *masked, "close"]
    elif config.secagg.name == "none":
        assert kinds == ["open", "train", "train", "close"]
    else:
        assert kinds.count("keys") == phases


def _charges(lab: Lab) -> dict[str, list[tuple[str, int, str]]]:
    """Return each site's charges: (client, round, digest of the input)."""
    found = {}
    for name in lab.names:
        with Ledger.open(lab.folder / name / "ledger.sqlite") as ledger:
            assert ledger.verify() == []
            found[name] = [(e.charge.client_id, e.charge.round, e.charge.input_digest) for e in ledger.entries()]
    return found


def _restart(lab: Lab, site: str) -> None:
    lab.kill(site)
    lab.start(site)


@pytest.mark.slow
def test_a_site_killed_in_any_stage_costs_its_clients_only_and_comes_back(
    tiny_config: Callable[..., RunConfig], labs: Callable[..., Lab], tmp_path: Path
) -> None:
    config = tiny_config(server={"rounds": 18, "cohort_size": 4, "evaluate_every": 18})
    lab = labs(config)
    due = {"shares": 0, "train": 1, "agree": 3, "unmask": 5}  # the n-th time that site-3 is asked for it
    seen = dict.fromkeys(due, -1)

    def broken(site: str, ask: Ask, found: Lab) -> bool:
        if site == "site-3" and ask.kind in due:
            seen[ask.kind] += 1
            if seen[ask.kind] == due[ask.kind]:
                _restart(found, site)  # just before the message arrives
        return False

    lab.broken = broken
    rounds = _rounds(_deployed(config, lab, tmp_path / "run"))
    assert all(seen[kind] > due[kind] for kind in due if kind != "shares")  # each happened, and it was back after it
    assert [each["lost"] for each in rounds] == [None] * 18
    assert all(each["survivors"] >= 3 for each in rounds)
    assert rounds[-1]["survivors"] == 4
    charges = _charges(lab)
    for name in lab.names:
        assert len({(client, number) for client, number, _ in charges[name]}) == len(charges[name])
    assert {len(charges[name]) for name in lab.names if name != "site-3"} == {18}
    sessions = [ask.body["session"][2] for site, ask in lab.asks if site == "site-0" and ask.kind == "keys"]
    assert sessions == sorted(set(sessions))


@pytest.mark.slow
def test_a_dead_server_resumes_to_the_same_bits_and_charges_nothing_twice(
    tiny_config: Callable[..., RunConfig], labs: Callable[..., Lab], tmp_path: Path
) -> None:
    config = tiny_config(server={"rounds": 3, "cohort_size": 4})
    train(config, out=tmp_path / "whole")

    class Died(BaseException):
        """The server's process is gone."""

    lab, asked = labs(config, 2), iter(range(10_000))

    def die(_site: str, ask: Ask, _lab: Lab) -> bool:
        # the second round's vectors are all sent, and the server ends before it unmasks them
        if ask.kind == "unmask" and next(asked) == len(lab.names):
            raise Died
        return False

    lab.broken = die
    with pytest.raises(Died):
        _deployed(config, lab, tmp_path / "run")
    before = _charges(lab)
    lab.broken = None
    out = _deployed(config, lab, tmp_path / "run", resume=True)
    np.testing.assert_array_equal(_params(out), _params(tmp_path / "whole"))
    for site, charges in _charges(lab).items():
        assert charges[: len(before[site])] == before[site]
        assert sorted(number for _, number, _ in charges) == [1, 1, 2, 2, 3, 3]


@pytest.mark.slow
def test_a_round_that_is_repeated_is_not_unmasked_for_other_survivors(
    tiny_config: Callable[..., RunConfig], labs: Callable[..., Lab], tmp_path: Path
) -> None:
    """Two sums of the same updates, one without a site, would show that site's update to the server."""
    config = tiny_config(server={"rounds": 2, "cohort_size": 4}, client={"deadline_s": 15.0})

    class Died(BaseException):
        """The server's process is gone."""

    lab = labs(config)

    def die(_site: str, ask: Ask, _lab: Lab) -> bool:
        if ask.kind == "unmask":
            raise Died
        return False

    lab.broken = die
    with pytest.raises(Died):
        _deployed(config, lab, tmp_path / "run")
    first = iter(range(10_000))
    lab.broken = lambda site, ask, _lab: site == "site-3" and ask.kind == "train" and next(first) == 0
    rounds = _rounds(_deployed(config, lab, tmp_path / "run", resume=True))
    assert rounds[0]["lost"]
    assert rounds[1]["survivors"] == 4


@pytest.mark.slow
def test_a_cut_link_is_waited_for_and_heals(
    tiny_config: Callable[..., RunConfig], labs: Callable[..., Lab], tmp_path: Path
) -> None:
    config = tiny_config(server={"rounds": 3, "cohort_size": 4}, client={"deadline_s": 15.0})
    lab = labs(config)
    cut = iter(range(10_000))

    def broken(site: str, ask: Ask, _lab: Lab) -> bool:
        return site in ("site-2", "site-3") and ask.kind == "train" and next(cut) < 2

    lab.broken = broken
    rounds = _rounds(_deployed(config, lab, tmp_path / "run"))
    assert rounds[0]["lost"]  # two of four are fewer than a masked sum takes
    assert [each["survivors"] for each in rounds[1:]] == [4, 4]


@pytest.mark.slow
def test_sites_with_files_of_their_own_train_on_them_alone(
    tiny_config: Callable[..., RunConfig], text_csv: Path, tmp_path: Path
) -> None:
    """The server's rows give classes and test rows; each site's file is seen by that site only."""
    names = [f"site-{number}" for number in range(3)]
    head, *rows = text_csv.read_text(encoding="utf-8").splitlines()
    own = {}
    for number, name in enumerate(names):
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join([head, *rows[60 + 60 * number : 120 + 60 * number]]), encoding="utf-8")
        own[name] = DataConfig(path=str(path))
    config = tiny_config(data={"client": None}, server={"cohort_size": 3})
    lab = Lab(config, 3, tmp_path / "sites", own=own)
    try:
        out = _deployed(config, lab, tmp_path / "run")
        assert [each["survivors"] for each in _rounds(out)] == [3, 3]
        digests = {name: {e.charge.data_digest for e in lab.ledger(name).entries()} for name in names}
        assert len(set.union(*digests.values())) == 3
        start = next(json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
        assert start["train_rows"] == sum(lab.sites.sizes.values())
        assert (out / "receipt.json").exists()
    finally:
        lab.close()
