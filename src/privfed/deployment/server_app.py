"""The ServerApp: the run's own code with the Flower engine. All it does is to put the two together.

``flwr run`` configures it with the keys of the bundle's ``[tool.flwr.app.config]``; paths are on the SuperLink's host.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from privfed.config import load_config
from privfed.deployment.watch import JsonLog, Watch
from privfed.errors import PrivfedError
from privfed.federation.engines.flower.engine import FlowerEngine
from privfed.federation.engines.flower.fleet import Deadlines
from privfed.federation.engines.flower.grid import GridChannel
from privfed.federation.sites import read_sites
from privfed.files import write_atomic

PID, OUTCOME, LOG, STAGES, PROMETHEUS = "serverapp.pid", "outcome.json", "server.log", "stages.jsonl", "metrics.prom"

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Train as the run's configuration says, with clients at Flower's nodes.

    Raises:
        PrivfedError: If the run cannot go on; ``outcome.json`` says why, and `privfed serve` with it.
    """
    from privfed.run import train  # loads torch

    given = context.run_config
    out = Path(str(given["out"]))
    state = Path(str(given["state"]) or f"{out}-server")
    state.mkdir(parents=True, exist_ok=True)
    write_atomic(state / PID, str(os.getpid()).encode())
    watch = Watch(state / LOG, state / PROMETHEUS, out / "metrics.jsonl")
    try:
        sites = read_sites(Path(str(given["roster"])))
        engine = FlowerEngine(
            sites=sites,
            channel=GridChannel(grid, sites, watch),
            deadlines=Deadlines(
                stage=float(given["stage-seconds"]),
                opening=float(given["opening-seconds"]),
                patience=float(given["patience-seconds"]),
            ),
            log=JsonLog(state / STAGES),
        )
        config = load_config(str(given["config"]))
        result = train(config, out=out, resume=bool(given["resume"]), progress=watch, engine=engine)
    except PrivfedError as error:
        found = {"kind": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
        write_atomic(state / OUTCOME, json.dumps({"error": found}).encode())
        raise
    write_atomic(state / OUTCOME, json.dumps({"folder": str(result.folder)}).encode())
