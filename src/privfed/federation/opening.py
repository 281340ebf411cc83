"""A run's folder and ledger, opened for it to begin or to go on."""

from __future__ import annotations

import shutil
from pathlib import Path

from privfed import objects
from privfed.config import RunConfig, differences, parse_config
from privfed.errors import ConfigError, ResumeError
from privfed.federation import folder as folders
from privfed.federation.checkpoint import load_checkpoint
from privfed.federation.folder import RunFolder
from privfed.privacy.ledger import Ledger


def ledger_path(config: RunConfig, run_folder: Path) -> Path:
    """Return where the data holder's ledger is: as configured, beside the data file, or in the run folder."""
    if config.ledger.path is not None:
        return Path(config.ledger.path)
    if config.data.path is not None:
        data = Path(config.data.path)
        return data.with_name(f"{data.name}.privfed-ledger.sqlite")
    return run_folder / "ledger.sqlite"


def open_folder(config: RunConfig, out: Path, *, resume: bool) -> RunFolder:
    """Return a new run folder with the configuration in it, or with ``resume`` the one that is there.

    Raises:
        ResumeError: If the run there has another configuration.
        ConfigError: If the folder cannot be had.
    """
    if not resume:
        return folders.create(out, config.to_toml())
    run_folder, raw = folders.reopen(out)
    stored = parse_config(raw, where=str(out / "config.toml"))
    # where figures are sent changes nothing of the run
    changed = [line for line in differences(stored, config) if not line.startswith("tracking.")]
    for table in ("data", "model"):
        before, now = getattr(stored, table).name, getattr(config, table).name
        if before != now and (objects.is_object(before) or objects.is_object(now)):
            raise ResumeError(
                f"The run in {out} was started with {table}.name = {_named(before)}, and now it is {_named(now)}: "
                f"hand over the same object ({table}=...), with the same content in the same order."
            )
    if changed:
        raise ResumeError(
            f"The run in {out} has another configuration ({'; '.join(changed)}): resume with the same one."
        )
    return run_folder


def _named(name: str | None) -> str:
    return "unset" if name is None else repr(objects.short(name)) if objects.is_object(name) else repr(name)


def open_ledger(config: RunConfig, run_folder: RunFolder, *, elsewhere: bool) -> Ledger:
    """Open the data holder's ledger, or where clients are elsewhere the server's own record of what it asked of them.

    Raises:
        ConfigError: If its folder cannot be made.
    """
    path = ledger_path(config, run_folder.path) if not elsewhere else run_folder.path / "ledger.sqlite"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The ledger's folder {path.parent} cannot be made ({error}): pass --ledger.") from error
    ledger = Ledger.open(path)
    link = run_folder.path / "ledger.sqlite"
    if path.resolve() != link.resolve() and not link.is_symlink():
        link.symlink_to(path.resolve())
    return ledger


def discard_unstarted(run_folder: RunFolder) -> None:
    """Remove the folder of a run that was refused before its first round: nothing half written stays."""
    if load_checkpoint(run_folder.checkpoint) is not None:
        return
    shutil.rmtree(run_folder.path, ignore_errors=True)
