"""``privfed ledger``: what was spent on which data, by which runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privfed.config import load_config
from privfed.errors import ConfigError
from privfed.privacy.accountant import epsilon
from privfed.privacy.ledger import Entry, Ledger
from privfed.types import Unit


def overview(path: Path, *, verify: bool, delta: float | None, set_cap: float | None, unit: str) -> dict[str, Any]:
    """Return charges and sums of the ledger at ``path`` (a file, or a run folder that holds or links one).

    Without a ``delta``, a run folder's own is taken, and 1e-5 elsewhere.

    Raises:
        ConfigError: If there is no ledger there.
    """
    file = path / "ledger.sqlite" if path.is_dir() else path
    if not file.exists():
        raise ConfigError(f"There is no ledger at {file}: pass a ledger file or a run folder.")
    if delta is None:
        delta = _delta_of(path)
    with Ledger.open(file, create=False) as ledger:
        problems = ledger.verify() if verify else []
        if problems:  # nothing in a damaged ledger is worth adding up
            unread: dict[str, Any] = {"entries": None, "head": None, "data": []}
            return {"ledger": str(file), **unread, "verified": False, "problems": problems, "ok": False}
        entries = ledger.entries()
        data = sorted({entry.charge.data_digest for entry in entries})
        kind: Unit = "client" if unit == "client" else "example"
        if set_cap is not None:
            for digest in data:
                ledger.set_cap(data_digest=digest, unit=kind, epsilon=set_cap, delta=delta)
        return {
            "ledger": str(file),
            "entries": len(entries),
            "head": ledger.head(),
            "data": [_data_set(ledger, digest, entries, kind, delta) for digest in data],
            **({"verified": True, "problems": [], "ok": True} if verify else {}),
        }


def _delta_of(path: Path) -> float:
    config = path / "config.toml"
    return load_config(str(config)).privacy.target_delta if config.is_file() else 1e-5


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return the overview as text."""
    charges = "damaged" if found["head"] is None else f"{found['entries']} charges, head {found['head'][:16]}"
    out = [f"{found['ledger']}: {charges}"]
    for data in found["data"]:
        spent = "without bound" if data["epsilon"] is None else f"epsilon {data['epsilon']:.4f}"
        cap = "no cap" if data["cap"] is None else f"cap {data['cap']:g}, {data['left']:.4f} left at least"
        out.append(f"data {data['data_digest'][:12]}: {spent} at delta {data['delta']:g} per {data['unit']}; {cap}")
        out.extend(
            f"  run {run['run_id'][:12]}  {run['project']}  {run['charges']} charges, {run['clients']} clients, "
            f"{run['first']} to {run['last']}, "
            + ("without bound" if run["epsilon"] is None else f"epsilon {run['epsilon']:.4f} for the worst client")
            for run in data["runs"]
        )
    if "verified" in found:
        out.append("hash chain: sound" if found["verified"] else "hash chain: BROKEN")
        out.extend(f"  {problem}" for problem in found["problems"])
    return out


def _data_set(ledger: Ledger, digest: str, entries: list[Entry], unit: Unit, delta: float) -> dict[str, Any]:
    mine = [entry for entry in entries if entry.charge.data_digest == digest]
    cap = ledger.cap(digest, unit)
    spent = ledger.spent(data_digest=digest, unit=unit, delta=cap.delta if cap else delta)
    runs = dict.fromkeys(entry.charge.run_id for entry in mine)
    return {
        "data_digest": digest,
        "unit": unit,
        "delta": cap.delta if cap else delta,
        "epsilon": spent if math.isfinite(spent) else None,
        "cap": cap.epsilon if cap else None,
        "left": max(0.0, cap.epsilon - spent) if cap else None,
        "runs": [_run(ledger, run, [e for e in mine if e.charge.run_id == run], delta) for run in runs],
    }


def _run(ledger: Ledger, run_id: str, entries: list[Entry], delta: float) -> dict[str, Any]:
    events = ledger.events_of(run_id)
    worst = max((epsilon(found, delta) for found in set(events.values())), default=0.0)
    return {
        "run_id": run_id,
        "project": entries[0].charge.project,
        "unit": entries[0].charge.event.unit,
        "charges": len(entries),
        "clients": len(events),
        "first": entries[0].time,
        "last": entries[-1].time,
        "epsilon": worst if math.isfinite(worst) else None,
    }
