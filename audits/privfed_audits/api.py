"""Audits and curves from Python: what the command line does, as two functions."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from privfed.types import View

Say = Callable[[str], None]


def _silent(_line: str) -> None:
    """Say nothing."""


def audit(
    run: str | os.PathLike[str],
    *,
    attacks: Sequence[str] | None = None,
    view: View | None = None,
    clients: int = 1,
    say: Say = _silent,
) -> dict[str, Any]:
    """Attack a finished run and set what is proved against what its receipt claims; what ``privfed audit`` does.

    Writes ``audit/audit.json`` into the run folder, and what was proved of epsilon into its receipt.

    Args:
        run: A :class:`privfed.Run` or a run folder. A run on objects in memory has to be held, or loaded with them.
        attacks: Names of attacks to keep to, on membership or inversion. Default: all that the run allows.
        view: What the adversary sees: ``individual``, ``aggregate`` or ``release``. Default: all that the run allows.
        clients: Of how many clients single updates are inverted.
        say: Told what takes long, a line at a time.

    Returns:
        The content of ``audit/audit.json``. ``views`` has an entry for each view: ``empirical_epsilon`` is the lower
        bound, at 95% confidence over all views together (None where no coin was tossed), ``accounted_epsilon`` the
        claim, ``ceiling`` what the same bound yields for an ideal mechanism, ``attack``, ``auc``, ``tpr_at_fpr``,
        ``contradicted``. ``reconstruction`` has, by view, what inversion found beside what is guessed without updates.
        ``contradicted`` is true if any claim is.

    Raises:
        ConfigError: If there is no run, it is not finished, or it does not allow what is asked for.
        ResumeError: If the coins of its canaries are gone.
    """
    from privfed_audits.auditing import audit as attacked  # loads torch

    return attacked(Path(run), attacks=attacks, view=view, clients=clients, say=say)


def curves(
    grid: str | os.PathLike[str] | Mapping[str, Any],
    *,
    out: str | os.PathLike[str],
    settings: Sequence[str] = (),
    resume: bool = False,
    jobs: int | None = None,
    recommend: str | None = None,
    say: Say = _silent,
) -> dict[str, Any]:
    """Train and audit a grid of runs and write its page, tables and figures; what ``privfed curves`` does.

    Cells run in processes of their own, so a script that calls this has to be importable: call it under
    ``if __name__ == "__main__":``. A notebook needs nothing of the kind.

    Args:
        grid: A TOML file, the name of a preset (``quick``, ``paper``), or the same tables as a mapping.
        out: The grid's folder: new, or with ``resume`` the one to continue.
        settings: More settings for every cell, such as ``"server.rounds=5"``.
        resume: Continue the grid: what is finished stands, failed cells are run again.
        jobs: At most so many runs at once. Default: what cores and memory allow.
        recommend: Limits such as ``"epsilon<=4, bytes<=1MB"``: the best cells under them are named, and their
            ``run.toml`` written.
        say: Told how far it is, a line at a time.

    Returns:
        ``folder``, ``page``, how many ``cells`` are ``done``, ``refused`` and ``failed``, the cells whose promise an
        audit ``contradicted``, the ``choice`` in a sentence, and the ``recommendation``. The figures themselves are in
        ``tables/*.csv`` of the folder.

    Raises:
        ConfigError: If grid, limits or folder cannot be used.
        ResumeError: If there is no grid to continue, or it is another one.
    """
    from privfed_audits.grids.command import curves as run

    source = grid if isinstance(grid, Mapping) else os.fspath(grid)
    return run(source, out=Path(out), settings=settings, resume=resume, jobs=jobs, constraints=recommend, say=say)
