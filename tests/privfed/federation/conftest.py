"""A federation on the tiny model, built by the real set-up code, for tests that drive single rounds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.federation.client import Client, Holder
from privfed.federation.progress import Silent
from privfed.federation.round import Phase, RoundReport, run_round
from privfed.federation.state import ServerState
from privfed.types import Float32, Shard

sys.path.insert(0, str(Path(__file__).parent))  # for by_hand


@dataclass
class Federation:
    """The parts of one run, before its first round."""

    config: Any
    material: Any
    plan: Any
    bench: Any
    stages: Any
    holder: Holder
    stack: ExitStack

    def __post_init__(self) -> None:
        from privfed.federation.engines.in_process import start_of

        self.phase: Phase = self.stage.phase
        self.state: ServerState = start_of(self.stage)

    @property
    def stage(self) -> Any:
        """The main phase."""
        return self.stages["train"]

    def trainers(self, change: Callable[[Client], Any]) -> None:
        """Give each client the trainer that ``change`` returns for it."""
        clients = {name: replace(client, trainer=change(client)) for name, client in self.phase.clients.items()}
        self.phase = replace(self.phase, clients=clients)

    def round(self, progress: Any = None) -> tuple[ServerState, RoundReport]:
        """Run the next round and keep its state."""
        self.state, report = run_round(self.state, self.phase, self.holder, progress or Silent())
        return self.state, report


class Given:
    """A trainer that returns what it was given, in place of training."""

    def __init__(self, answer: Float32 | Callable[[Float32], Float32]) -> None:
        self.answer = answer

    def run(self, params_D: Float32, shard: Shard, stream: Any, on_step: Any, work: Any = None) -> Float32:
        """Return the answer."""
        return self.answer(params_D) if callable(self.answer) else self.answer


class Recorded:
    """A trainer that trains for real and keeps the last update; ``around`` may interfere."""

    def __init__(self, trainer: Any, around: Callable[..., Any] | None = None) -> None:
        self.trainer, self.around = trainer, around
        self.delta_D: Float32 | None = None

    def run(self, params_D: Float32, shard: Shard, stream: Any, on_step: Any, work: Any = None) -> Float32:
        """Train."""
        run = self.trainer.run
        arguments = (params_D, shard, stream, on_step, work)
        self.delta_D = self.around(run, *arguments) if self.around else run(*arguments)
        return self.delta_D


@pytest.fixture
def federation(tiny_config: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Federation]]:
    """Return ``federation(**tables)``: the parts of a run of noise multiplier 1 with a ledger of its own."""
    from privfed.federation import material as materials
    from privfed.federation import setup, workbench
    from privfed.privacy.ledger import Ledger

    with ExitStack() as stack:

        def build(*, key: bytes = bytes(32), **tables: Any) -> Federation:
            # a given noise: solving for one takes seconds
            privacy = {"target_epsilon": None, "noise_multiplier": 1.0, **tables.pop("privacy", {})}
            config = tiny_config(privacy=privacy, **tables)
            material = materials.gather(config)
            bench = workbench.build(config, material, Silent())
            distributed = config.privacy.is_distributed
            lengths = workbench.trained_lengths(config, bench.tuned) if distributed else None
            plan = materials.plan_privacy(config, material, lengths)
            ledger = stack.enter_context(Ledger.open(tmp_path / "ledger.sqlite"))
            holder = Holder(
                ledger=ledger,
                key=key,
                run_id="run",
                ledger_run_id="run",
                data_digest=material.dataset.digest,
                partition_digest=material.partition_digest,
                project="default",
            )
            stages = setup.make_stages(config, material, bench, plan, holder, Silent(), tmp_path / "own")
            made = Federation(config, material, plan, bench, stages, holder, stack)
            stack.callback(made.stage.trainer.close)
            return made

        yield build


@pytest.fixture(scope="session")
def given() -> type[Given]:
    """The trainer that returns what it was given."""
    return Given


@pytest.fixture(scope="session")
def recorded() -> type[Recorded]:
    """The trainer that keeps its update."""
    return Recorded


@pytest.fixture
def broadcasts(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The broadcast of each answer, as clients got it."""
    heard: list[bytes] = []
    respond = Client.respond

    def listening(client: Client, broadcast: bytes, *rest: Any) -> Any:
        heard.append(broadcast)
        return respond(client, broadcast, *rest)

    monkeypatch.setattr(Client, "respond", listening)
    return heard


@pytest.fixture
def noised(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[np.ndarray]]:
    """What the server hands to the codec after noise and average: means of linear sums."""
    seen: list[Any] = []
    from privfed.federation import round as rounds

    release = rounds._release

    def watching(*args: Any) -> Any:
        found = release(*args)
        seen.append(found.mean_D)
        return found

    monkeypatch.setattr(rounds, "_release", watching)
    yield seen
