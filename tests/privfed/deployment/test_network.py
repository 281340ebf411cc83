"""A deployment whose parties are hosts of their own, in network namespaces: late and lost packets, and a cut link."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from privfed.config import RunConfig
from privfed.federation.checkpoint import load_checkpoint
from privfed.run import train

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'privfed[flower]'")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark that does this at length; skips where there can be no such hosts."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    module = importlib.import_module("flower_network")
    reason = module.why_not()
    if reason is not None:
        pytest.skip(f"No hosts of their own: {reason}.")
    return module


def test_the_wire_is_late_loses_and_is_cut(network: ModuleType) -> None:
    """Otherwise the test below would be of a good network."""
    hosts = network.Network(1)
    try:
        server, site, wire = hosts.hosts["server"], hosts.hosts["site-0"], hosts.wire
        listening = server.inside(lambda: network.socket.create_server((server.address, 5000)))
        with listening:
            assert site.round_trip(server.address, 5000) < 1.0
            wire.delay = 0.2
            assert site.round_trip(server.address, 5000) >= 0.4
            wire.delay = 0.0
            hosts.cut("site-0")
            mend = threading.Timer(1.5, hosts.cut)
            mend.start()
            assert site.round_trip(server.address, 5000) >= 1.4
            mend.join()
            assert wire.counts["cut"] > 0
            wire.loss = 0.3
            for _ in range(10):
                site.round_trip(server.address, 5000)
            assert wire.counts["lost"] > 0
    finally:
        hosts.close()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_bad_network_costs_time_and_no_bits(
    network: ModuleType, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = tiny_config(server={"rounds": 3, "cohort_size": 4}, client={"deadline_s": 60.0})
    (tmp_path / "run.toml").write_text(config.to_toml())
    train(config, out=tmp_path / "here")
    hosts = network.Network(2)
    try:
        lab = network.Lab(tmp_path / "there", str(tmp_path / "run.toml"), (), sites=2, place=hosts.place)
        hosts.wire.delay, hosts.wire.loss = 0.03, 0.02
        try:
            server = lab.serve("--stage-seconds", "120")
            for name in lab.names:
                lab.join(name)
            lab.wait(lambda: len(lab.rounds()) >= 1, 400.0)
            hosts.cut("site-1")
            lab.wait(lambda: hosts.wire.counts["cut"] > 5, 60.0)
            hosts.cut()
            lab.wait(lambda: server.poll() is not None, 400.0)
        finally:
            lab.close()
    finally:
        hosts.close()
    assert server.returncode == 0, lab.said("server")
    assert [each["survivors"] for each in lab.rounds()] == [4, 4, 4]
    assert hosts.wire.counts["lost"] > 0
    here, there = (
        load_checkpoint(folder / "checkpoint" / "state.safetensors")
        for folder in (tmp_path / "here", lab.folder / "run")
    )
    assert here is not None
    assert there is not None
    np.testing.assert_array_equal(there.state.params_D, here.state.params_D)
    assert all("ledger sound: True, 6 charges, 0 made twice" in line for line in lab.ledgers())
