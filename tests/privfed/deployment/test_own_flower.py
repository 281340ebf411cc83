"""In a Flower deployment of one's own: `flwr run` with the app of `privfed serve --bundle`, and sites at sockets."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from privfed.config import RunConfig
from privfed.deployment.processes import environment, flower, free_port, run, start, wait_for_port
from privfed.federation.checkpoint import load_checkpoint
from privfed.privacy.ledger import Ledger
from privfed.run import train

from .processes import Deployment

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'privfed[flower]'")
LINK = "lab"


@pytest.fixture
def deployment(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> Iterator[Deployment]:
    """Two sites of two clients."""
    found = Deployment(tiny_config(server={"rounds": 1, "cohort_size": 4}), tmp_path / "there", 2)
    yield found
    found.close()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_flwr_run_trains_the_same_bits(
    deployment: Deployment, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    folder, home = deployment.folder, tmp_path / "home"
    env = {**environment(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.{LINK}]\naddress = "127.0.0.1:{deployment.port}"\ninsecure = true\n')
    app = [sys.executable, "-m", "privfed.cli", "serve", "run.toml", "--bundle", "app"]
    written = subprocess.run(app, cwd=folder, check=True, capture_output=True, text=True)
    typed = next(line for line in written.stderr.splitlines() if line.startswith("$ flwr run"))

    def started(name: str, command: Sequence[str]) -> None:
        stack.callback(start(name, command, log=folder / f"{name}.log", env=env).stop)

    with ExitStack() as stack:
        listen = ["--host", "127.0.0.1", "--port", str(deployment.port)]
        link = start("link", [flower("flower-superlink"), *listen, "--insecure"], log=folder / "link.log", env=env)
        stack.callback(link.stop)
        wait_for_port("127.0.0.1", deployment.port, link)
        for name in deployment.names:
            socket = tmp_path / name
            deployment.join(name, "--socket", str(socket))
            deployment.wait(socket.exists)
            node = ["--superlink", f"127.0.0.1:{deployment.port}", "--insecure", "--port", str(free_port())]
            started(f"node-{name}", [flower("flower-supernode"), *node, "--node-config", f'privfed-site="{socket}"'])
        _, *command = shlex.split(typed.replace("NAME-OF-YOUR-SUPERLINK", LINK).replace(str(Path("runs/x")), "run"))
        found = run([flower(command[0]), command[1], str(folder / command[2]), *command[3:]], env=env)
        assert found.returncode == 0, found.stdout + found.stderr
        outcome = folder / "run-server" / "outcome.json"
        deployment.wait(outcome.exists, 600.0)
    assert json.loads(outcome.read_text()) == {"folder": str(folder / "run")}
    train(tiny_config(server={"rounds": 1, "cohort_size": 4}), out=tmp_path / "here")
    here, there = (load_checkpoint(f / "checkpoint" / "state.safetensors") for f in (tmp_path / "here", folder / "run"))
    assert here is not None
    assert there is not None
    np.testing.assert_array_equal(there.state.params_D, here.state.params_D)
    for name in deployment.names:
        with Ledger.open(folder / name / "ledger.sqlite") as ledger:
            assert (ledger.verify(), len(ledger.entries())) == ([], 2)
