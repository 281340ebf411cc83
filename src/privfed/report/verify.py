"""Checks a receipt offline: its bytes, its signature, and every epsilon, computed again from the events alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privfed.errors import ConfigError, LedgerError
from privfed.privacy.accountant import epsilon
from privfed.report import signing
from privfed.report.receipt import read_receipt, rendered
from privfed.types import VIEWS, PrivacyEvent

SLACK = 1e-6
"""How far, relatively, an epsilon may lie from what is computed again: other versions of numpy round otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What a check of a receipt found.

    Attributes:
        mismatches: What is wrong, a sentence each; none if all is well.
        too_small: Whether a stated epsilon is below what the events cost, or below what an attack proved.
        epsilon: Computed again, by view.
        signed_by: Fingerprint of the key, or None.
        checked: What was checked, a clause each.
    """

    mismatches: tuple[str, ...]
    too_small: bool
    epsilon: Mapping[str, float]
    signed_by: str | None
    checked: tuple[str, ...] = field(default=())

    @property
    def exit_code(self) -> int:
        """0, 1 for a mismatch, 4 for a claim that is too small."""
        return 4 if self.too_small else int(bool(self.mismatches))


def verify(run: Path, *, key: Path | None = None) -> Verification:
    """Check the receipt of a run folder, or a receipt file by itself.

    Beside the receipt only what lies in the folder is looked at, where it is there: the ledger, the adapter and the
    configuration. Nothing is fetched.

    Args:
        run: The folder, or the path of ``receipt.json``.
        key: Public key of whoever should have signed.

    Raises:
        ConfigError: If there is no receipt, it is none, or the key cannot be read.
    """
    path = run if run.is_file() else run / "receipt.json"
    receipt = read_receipt(path)
    wrong, checked = authenticity(path, key), ["the file's bytes", "the signature"]
    found, costs = _epsilons(receipt)
    wrong += [sentence for sentence, _ in costs]
    proved = _proved(receipt)
    wrong += proved
    checked.append("epsilon from the receipt's events")
    if path.parent.joinpath("config.toml").exists():
        wrong += _folder(path.parent, receipt)
        checked.append("the folder's configuration, adapter and ledger")
    return Verification(
        mismatches=tuple(wrong),
        too_small=bool(proved) or any(below for _, below in costs),
        epsilon=found,
        signed_by=signing.fingerprint(receipt),
        checked=tuple(checked),
    )


def authenticity(path: Path, key: Path | None = None) -> list[str]:
    """Return what is wrong with a receipt's bytes and signature, a sentence each.

    Raises:
        ConfigError: If it is no receipt, or the key cannot be read.
    """
    receipt = read_receipt(path)
    wrong = []
    if path.read_bytes() != rendered(receipt):
        wrong.append(f"{path} is not byte for byte as privfed writes this content: it was edited.")
    problem = signing.problem_of(receipt, key)
    return [*wrong, problem] if problem else wrong


def events_of(receipt: Mapping[str, Any]) -> tuple[PrivacyEvent, ...]:
    """Return the events of a receipt.

    Raises:
        ConfigError: If they are not events.
    """
    try:
        return tuple(_event(entry) for entry in receipt["events"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"The receipt's events cannot be read: {error}.") from error


def set_aside(receipt: Mapping[str, Any]) -> float:
    """Return the part of delta that the accountant did not get."""
    accountant = receipt.get("accountant") or {}
    return float(accountant.get("delta_set_aside", 0.0))


def _event(entry: Mapping[str, Any]) -> PrivacyEvent:
    parameters = tuple(
        (str(name), tuple(value) if isinstance(value, list) else value)
        for name, value in sorted(entry["parameters"].items())
    )
    return PrivacyEvent(**{**entry, "parameters": parameters})


def _epsilons(receipt: Mapping[str, Any]) -> tuple[dict[str, float], list[tuple[str, bool]]]:
    """Return epsilon by view from the events, and (sentence, whether the claim is too small) of each mismatch."""
    found: dict[str, float] = {}
    wrong: list[tuple[str, bool]] = []
    known: dict[tuple[float, str], float] = {}
    events = events_of(receipt)
    for view in VIEWS:
        entry = receipt["views"][view]
        claimed = entry["epsilon"]
        if claimed is None:
            continue
        delta, accountant = float(entry["delta"]) - set_aside(receipt), str(entry["accountant"])
        if (delta, accountant) not in known:
            known[delta, accountant] = epsilon(events, delta, accountant=accountant, fine=True)  # type: ignore[arg-type]
        value = found[view] = known[delta, accountant]
        if not events:
            wrong.append((f"The view {view} claims epsilon {claimed:g} and the receipt has no events.", True))
        elif abs(value - claimed) > SLACK * max(1.0, value):
            sentence = f"The view {view} claims epsilon {claimed:.6g}, and its events cost {value:.6g}."
            wrong.append((sentence, claimed < value))
    return found, wrong


def _proved(receipt: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each view whose claim an audit contradicted."""
    wrong = []
    for view in VIEWS:
        entry = receipt["views"][view]
        lower, claimed = entry.get("empirical_epsilon"), entry["epsilon"]
        if lower is not None and claimed is not None and lower > claimed:
            wrong.append(f"The view {view} claims epsilon {claimed:.6g}, and an attack proved at least {lower:.6g}.")
    return wrong


def _folder(folder: Path, receipt: Mapping[str, Any]) -> list[str]:
    """Return what in the run folder does not fit its receipt."""
    wrong = []
    digest = hashlib.sha256((folder / "config.toml").read_bytes()).hexdigest()
    if digest != receipt["config_digest"]:
        wrong.append("config.toml is not the configuration that the receipt is for.")
    weights = sorted((folder / "adapter").glob("*.safetensors"))
    if weights:
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
        if digest != receipt["adapter_sha256"]:
            wrong.append("The weights in adapter/ are not those that the receipt is for.")
    if (folder / "ledger.sqlite").exists() and receipt["private"]:
        wrong += _ledger(folder / "ledger.sqlite", receipt)
    return wrong


def _ledger(path: Path, receipt: Mapping[str, Any]) -> list[str]:
    """Return what in the ledger does not fit the receipt: a broken chain, or other events of the run."""
    from privfed.privacy.ledger import Ledger

    try:
        with Ledger.open(path, create=False) as ledger:
            wrong = [f"The ledger: {sentence}" for sentence in ledger.verify()]
            charged = ledger.events_of(receipt["run_id"])
            heads = {entry.hash for entry in ledger.entries()} | {ledger.head()}
    except LedgerError as error:
        return [f"The ledger cannot be read: {error}"]
    events = events_of(receipt)
    if events not in charged.values():
        wrong.append("The receipt's events are those of no client in the ledger.")
    if receipt["ledger_head"] not in heads:
        wrong.append("The ledger has no row of the hash that the receipt names: it was replaced or cut.")
    delta = max(float(entry["delta"] or 0.0) for entry in receipt["views"].values()) - set_aside(receipt)
    claimed = [entry["epsilon"] for entry in receipt["views"].values() if entry["epsilon"] is not None]
    accountant = receipt["accountant"]["name"]
    for own in {found for found in charged.values() if found and found != events}:
        cost = epsilon(own, delta, accountant=accountant)
        if claimed and cost > max(claimed) * (1 + 1e-3):
            wrong.append(f"A client in the ledger was charged epsilon {cost:.6g}, more than any view claims.")
    return wrong
