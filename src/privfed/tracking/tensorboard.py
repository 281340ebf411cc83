"""TensorBoard: event files, by default in the run folder; look at them with ``tensorboard --logdir runs``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from privfed.table import Table
from privfed.tracking import TRACKERS, TrackedRun, TrackerPlugin

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardConfig(Table):
    """Options.

    Attributes:
        log_dir: The folder of the event files; each run has a folder in it that is called as the run's. Unset: the
            folder ``tensorboard`` in the run folder.
    """

    name: Literal["tensorboard"] = "tensorboard"
    log_dir: str | None = Field(default=None, min_length=1)


class TensorBoard:
    """Writes scalars."""

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write figures of one step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, finished: bool) -> None:  # noqa: ARG002
        """Write what is left."""
        self._writer.close()


def start(config: TensorBoardConfig, run: TrackedRun) -> TensorBoard:
    """Return a writer into a folder without event files: a resumed run's figures are written again from the first."""
    from torch.utils.tensorboard import SummaryWriter

    folder = run.folder / "tensorboard" if config.log_dir is None else Path(config.log_dir) / run.folder.resolve().name
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()
    writer = SummaryWriter(str(folder))
    writer.add_text("config", "\n".join(f"    {key} = {value!r}" for key, value in run.config.items()))
    return TensorBoard(writer)


TRACKERS.register("tensorboard")(TrackerPlugin(config=TensorBoardConfig, build=start, package="tensorboard"))
