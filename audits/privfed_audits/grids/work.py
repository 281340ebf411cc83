"""What a worker does: train a cell's run, audit it, and say in one record what came of it."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from privfed.errors import ConfigError, DataError, ModelError, PrivfedError
from privfed.federation.shared import SharedWork
from privfed.report.load import load_metrics
from privfed.run_config import RunConfig
from privfed.types import VIEWS, View
from privfed_audits.grids.store import Record

REFUSALS = (ConfigError, DataError, ModelError)
ROC_POINTS = 48


def run_cell(
    config: RunConfig, folder: Path, shared: SharedWork, *, audit: bool = True, attacks: Sequence[str] = ()
) -> Record:
    """Train and audit one run; whatever goes wrong is part of the record.

    Args:
        config: The run.
        folder: Its run folder, new.
        shared: What this worker's cells share.
        audit: Whether to audit it.
        attacks: Names of attacks; empty for the audit's own choice.
    """
    started, wall = time.process_time(), time.perf_counter()
    try:
        record = {"state": "done", **_trained(config, folder, shared)}
        record["train_cpu_seconds"] = round(time.process_time() - started, 2)
        if audit:
            record["audit"] = _audited(folder, attacks, shared)
    except REFUSALS as error:
        record = {"state": "refused", "reason": str(error)}
    except PrivfedError as error:
        record = {"state": "failed", "reason": str(error)}
    except MemoryError:
        record = {"state": "failed", "reason": "The machine has too little memory for this cell: lower -j."}
    except Exception as error:  # noqa: BLE001 - a fault of one cell must not end the grid; it is kept and shown
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        record = {"state": "failed", "reason": f"{type(error).__name__}: {error} ({where})"}
    record["cpu_seconds"] = round(time.process_time() - started, 2)
    record["wall_seconds"] = round(time.perf_counter() - wall, 2)
    return record


def peak_memory() -> int:
    """Return the most memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _trained(config: RunConfig, folder: Path, shared: SharedWork) -> Record:
    from privfed.run import train

    receipt = train(_with_own_ledger(config, folder), out=folder, shared=shared).receipt
    metrics = load_metrics(folder / "metrics.jsonl")
    main = [line for line in metrics.rounds if line.phase == "train" and line.survivors]
    sent = [line.bytes_up / line.survivors for line in metrics.rounds if line.survivors]
    return {
        "utility": dict(receipt["utility"]),
        "promises": {view: _promise(receipt, view) for view in VIEWS},
        "simulated": "simulated" in receipt,
        "noise_multiplier": receipt["mechanism"]["noise_multiplier"],
        "bytes_round": statistics.fmean(line.bytes_up / line.survivors for line in main) if main else 0.0,
        "bytes_run": sum(sent),
        "trained": metrics.start.trained_parameters if metrics.start else None,
    }


def _with_own_ledger(config: RunConfig, folder: Path) -> RunConfig:
    """Return the run with its ledger in its folder, where it would be beside the data: cells run at the same time."""
    if config.data.path is None or config.ledger.path is not None:
        return config
    ledger = config.ledger.model_copy(update={"path": str(folder / "ledger.sqlite")})
    return config.model_copy(update={"ledger": ledger})


def _promise(receipt: Mapping[str, Any], view: str) -> Record:
    """Return what the accountant says of a view; of an experiment's noise what it would have been."""
    stated = receipt["views"][view]
    if stated["epsilon"] is not None:
        return {"epsilon": stated["epsilon"], "delta": stated["delta"], "unit": stated["unit"]}
    simulated = receipt.get("simulated", {})
    epsilon = simulated.get("epsilon", {}).get(view)
    if epsilon is None:
        return {"epsilon": None, "delta": None, "unit": None, "why": stated["why"]}
    return {"epsilon": epsilon, "delta": simulated["delta"], "unit": receipt["setting"]["unit"]}


def _audited(folder: Path, attacks: Sequence[str], shared: SharedWork) -> Record:
    """Return what the audit found, or why it found nothing; the run counts either way."""
    from privfed_audits.auditing import audit

    try:
        found = dict(audit(folder, attacks=list(attacks) or None, shared=shared, as_if_secret=True))
    except PrivfedError as error:
        return {"failed": str(error)}
    for view, entry in found["views"].items():
        entry["roc"] = thinned(entry["roc"])
        entry["roc"]["allowed"] = _allowed(folder, view, entry["roc"]["fpr"])
    return found


def _allowed(folder: Path, view: View, fpr: Sequence[float]) -> list[float] | None:
    """Return the most true positives that the accountant allows at these false ones; None without a guarantee."""
    import numpy as np

    from privfed.report.receipt import read_receipt
    from privfed_audits.claims import claim_of

    limit = claim_of(read_receipt(folder / "receipt.json"), view, as_if_secret=True).tradeoff()
    return None if limit is None else [float(tpr) for tpr in limit.tpr(np.asarray(fpr))]


def thinned(roc: Mapping[str, Sequence[float]], most: int = ROC_POINTS) -> dict[str, list[float]]:
    """Return at most ``most`` points of a ROC, even on its logarithmic axis, its ends among them."""
    import numpy as np

    fpr = np.asarray(roc["fpr"], dtype=float)
    if len(fpr) <= most:
        return {key: [float(v) for v in values] for key, values in roc.items()}
    low = float(fpr[fpr > 0].min()) if (fpr > 0).any() else 1e-4
    wanted = np.concatenate([[0.0], np.geomspace(low, 1.0, most - 1)])
    places = np.searchsorted(fpr, wanted, side="right") - 1
    picked = np.unique(np.concatenate([places[places >= 0], [len(fpr) - 1]]))  # below the first point there is none
    return {key: [float(np.asarray(values)[i]) for i in picked] for key, values in roc.items()}


def worker(connection: Any, folder: str, audit: bool, attacks: Sequence[str]) -> None:
    """Run the cells that come over ``connection`` until it closes; the entry point of a worker process."""
    import signal
    import threading
    from multiprocessing import parent_process

    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who stops a grid at the terminal stops it through its parent
    torch.set_num_threads(1)  # the bits of a result must not depend on how many cells run at once
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.join,), daemon=True).start()
    from privfed.config import parse_config
    from privfed_audits.grids.store import Store

    store = Store(path=Path(folder))
    shared = SharedWork(store.shared)
    while (task := connection.recv()) is not None:
        key, raw = task
        config = parse_config(tomllib.loads(raw), where=key)
        record = run_cell(config, store.work(key), shared, audit=audit, attacks=attacks)
        record["peak_bytes"] = peak_memory()
        store.keep(key, _plain(record))
        connection.send((key, record["state"], record["wall_seconds"], record["peak_bytes"]))


def _plain(value: Any) -> Any:
    """Return a record as JSON has it: what is no finite number becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _end_with(wait: Callable[[], None]) -> None:
    """End this process when its parent has ended: a killed grid leaves nobody behind who writes into its folder."""
    import os

    wait()
    os._exit(1)


__all__ = ["peak_memory", "run_cell", "thinned", "worker"]
