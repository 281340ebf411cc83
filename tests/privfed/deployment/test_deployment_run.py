"""Two sites, two rounds, over Flower's real processes with TLS and node authentication."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from privfed.config import RunConfig
from privfed.federation.checkpoint import load_checkpoint
from privfed.privacy.ledger import Ledger
from privfed.run import train

from .processes import Deployment

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'privfed[flower]'")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_sites_over_flower_train_the_same_bits(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config(server={"cohort_size": 4}, client={"deadline_s": 60.0})
    train(config, out=tmp_path / "here")
    deployment = Deployment(config, tmp_path / "there", 2)
    try:
        server = deployment.serve()
        sites = {name: deployment.join(name) for name in deployment.names}
        assert server.wait(600) == 0, deployment.said()
        for process in sites.values():
            process.send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in sites.values()] == [0, 0]
    finally:
        deployment.close()
    here, there = (
        load_checkpoint(folder / "checkpoint" / "state.safetensors")
        for folder in (tmp_path / "here", deployment.folder / "run")
    )
    assert here is not None
    assert there is not None
    np.testing.assert_array_equal(there.state.params_D, here.state.params_D)
    receipts = [
        json.loads((folder / "receipt.json").read_text()) for folder in (tmp_path / "here", deployment.folder / "run")
    ]
    assert receipts[0]["views"]["release"]["epsilon"] == receipts[1]["views"]["release"]["epsilon"]
    for name in deployment.names:
        with Ledger.open(deployment.folder / name / "ledger.sqlite") as ledger:
            assert ledger.verify() == []
            assert len(ledger.entries()) == 4  # two clients, two rounds
    said = deployment.said()
    for command in ("flower-superlink", "--enable-supernode-auth", "flwr supernode register", "flwr run"):
        assert command in said
    assert "flower-supernode" in deployment.said("site-0.log")
