"""The in-process engine: every client in turn on this machine, a checkpoint after every round.

Messages between clients and server are bytes even here, so that what the server can see is what it would see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from privfed.config import RunConfig
from privfed.errors import ConfigError
from privfed.federation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from privfed.federation.client import Holder
from privfed.federation.evaluate import Score, evaluate, scores_by_row
from privfed.federation.exchange import Connect, Exchange
from privfed.federation.fairness import ByRow
from privfed.federation.folder import RunFolder
from privfed.federation.meter import NOTE, MeterReading
from privfed.federation.pairs import read_named, write_named
from privfed.federation.personal import PERSONAL
from privfed.federation.phases import TRAIN
from privfed.federation.progress import Progress
from privfed.federation.round import RoundReport, run_round
from privfed.federation.sentinels import Moves
from privfed.federation.setup import Stage
from privfed.federation.state import ServerState, first_state
from privfed.tuning.layout import read_flat, write_flat

Spent = Callable[[str, int], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What training left behind.

    Attributes:
        moved: Names of the tensors of the last phase that were ever elsewhere than at their start.
    """

    state: ServerState
    score: Score
    probe_accuracy: float | None
    totals: Mapping[str, float]
    moved: frozenset[str]


def run_phases(
    stages: Mapping[str, Stage],
    config: RunConfig,
    folder: RunFolder,
    holder: Holder,
    progress: Progress,
    label_names: Sequence[str],
    spent: Spent,
    connect: Connect = Exchange,
) -> Outcome:
    """Run every phase from where the folder's checkpoint stands to the end.

    Args:
        stages: The phases, in order.
        config: The run.
        folder: Where metrics and checkpoints go.
        holder: The data holder.
        progress: Told what happens.
        label_names: For per-class scores.
        spent: Maps (phase, completed rounds) to the epsilon spent so far, None without a guarantee.
        connect: Makes the path of each round's messages: by default the clients of this process.

    Raises:
        BudgetExceededError: If a charge would pass the holder's cap.
    """
    checkpoint = load_checkpoint(folder.checkpoint)
    if checkpoint:
        folder.cut_metrics(checkpoint.metrics_bytes)
    names = list(stages)
    totals: dict[str, float] = dict(checkpoint.totals) if checkpoint else {}
    fresh_D = {name: read_flat(stage.module) for name, stage in stages.items()}
    first = names.index(checkpoint.state.phase) if checkpoint else 0
    state = checkpoint.state if checkpoint else None
    score: Score | None = None
    moves: Moves | None = None
    for position in range(first, len(names)):
        stage = stages[names[position]]
        fresh = state is None or state.phase != names[position]
        if state is None or fresh:
            # a later phase starts from what the earlier one left in the module they share
            state = start_of(stage)
        # a phase that is resumed has left its start already, as far as that can still be seen
        moves = Moves(stage.phase.layout, state.params_D if fresh else fresh_D[names[position]])
        moves.saw(state.params_D)
        loop = _Loop(stage, config, folder, holder, progress, label_names, spent, totals, moves, connect)
        state, score = loop.run(state, fresh=fresh)
    if score is None or state is None or moves is None:
        raise ConfigError("A run has at least one phase.")
    probe = totals.get("probe_accuracy")
    return Outcome(state=state, score=score, probe_accuracy=probe, totals=totals, moved=moves.names)


def start_of(stage: Stage) -> ServerState:
    """Return the state of a phase before its first round, from what its module holds."""
    sharing = stage.phase.sharing
    carried = read_named(stage.module, sharing.carried)
    return first_state(stage.phase.plan.name, read_flat(stage.module), carried, sharing)


def set_state(stage: Stage, state: ServerState) -> None:
    """Write the server's model into the module: personal tensors are at their start in it."""
    write_flat(stage.module, state.params_D)
    write_named(stage.module, state.carried)


def own_answers(stage: Stage, state: ServerState, client_id: str, rows: NDArray[np.int64]) -> ByRow | None:
    """Return how a client's own model does on these test rows; None if it has no model yet."""
    phase = stage.phase
    own = phase.store.load(client_id, before=state.round + 1) if phase.store else {}
    if PERSONAL not in own:
        return None
    write_flat(stage.module, phase.sharing.personal.put(state.params_D, own[PERSONAL]))
    return scores_by_row(stage.module, stage.test, rows)


@dataclass(slots=True)
class _Loop:
    """The rounds of one phase."""

    stage: Stage
    config: RunConfig
    folder: RunFolder
    holder: Holder
    progress: Progress
    label_names: Sequence[str]
    spent: Spent
    totals: dict[str, float]
    moves: Moves
    connect: Connect

    def run(self, state: ServerState, *, fresh: bool) -> tuple[ServerState, Score]:
        """Return the state after the last round and its score.

        Args:
            state: Where the phase stands.
            fresh: Whether it starts here; a checkpoint of its start has its first score already.
        """
        plan = self.stage.phase.plan
        score: Score | None = None
        if fresh:
            score = self._evaluate(state)
            self._save(state)
        while state.round < plan.rounds:
            before = time.perf_counter()
            state, report = run_round(state, self.stage.phase, self.holder, self.progress, self.connect)
            self.moves.saw(state.params_D)
            epsilon = self.spent(plan.name, state.round)
            self._add(report)
            self.folder.log(_round_record(report, epsilon))
            if report.meter:
                self.folder.log(_meter_record(report, report.meter))
            due = state.round % self.stage.phase.server.evaluate_every == 0 or state.round == plan.rounds
            score = self._evaluate(state) if due else None
            self.totals["seconds"] = self.totals.get("seconds", 0.0) + time.perf_counter() - before
            self._save(state)
            self.progress.round_done(plan.name, state.round, plan.rounds, epsilon)
        phase = self.stage.phase
        if phase.recorder:
            phase.recorder.released(state.round, phase.sharing.shared.take(state.params_D), state.carried)
        set_state(self.stage, state)
        self.stage.trainer.close()
        final = score or evaluate(self.stage.module, self.stage.test, self.label_names)
        if plan.name != TRAIN:
            self.totals["probe_accuracy"] = final.value
        return state, final

    def _evaluate(self, state: ServerState) -> Score:
        set_state(self.stage, state)
        score = evaluate(self.stage.module, self.stage.test, self.label_names)
        name = self.stage.phase.plan.name
        found = {**score.record(), **self._clients(state, score)}
        self.folder.log({"kind": "eval", "phase": name, "round": state.round, **found})
        if state.round == 0 and score.primary == "perplexity":  # a language model can do its task before any tuning
            self.totals["base_perplexity"] = score.value
        self.progress.evaluated(name, state.round, score.primary, score.value)
        return score

    def _clients(self, state: ServerState, score: Score) -> dict[str, float | int | str | None]:
        """Return how evenly the clients are served, as far as that can be said."""
        stage, fairness = self.stage, self.stage.fairness
        if fairness is None:
            return {}
        if stage.phase.store is None or not stage.phase.sharing.personal.size:
            found = fairness.shared(score.by_row)
        else:
            found = fairness.personal(score.by_row, partial(own_answers, stage, state))
            set_state(stage, state)
        if found is None:
            return {}
        self.totals |= {"clients_mean": found.mean, "clients_worst_tenth": found.worst_tenth}
        return found.record()

    def _save(self, state: ServerState) -> None:
        save_checkpoint(
            self.folder.checkpoint,
            Checkpoint(state=state, metrics_bytes=self.folder.metrics_bytes(), totals=self.totals),
        )
        if self.stage.phase.store:
            self.stage.phase.store.settle(state.round)

    def _add(self, report: RoundReport) -> None:
        for key, value in (("bytes_up", report.bytes_up), ("bytes_down", report.bytes_down)):
            self.totals[key] = self.totals.get(key, 0.0) + value
        self.totals["train_seconds"] = self.totals.get("train_seconds", 0.0) + report.seconds["train"]


def _meter_record(report: RoundReport, reading: MeterReading) -> dict[str, object]:
    return {
        "kind": "simulation",
        "phase": report.phase,
        "round": report.round,
        "aggregation_error": reading.error,
        "aggregation_error_relative": reading.relative,
        "noise_product": reading.noise_product,
        "note": NOTE,
    }


def _round_record(report: RoundReport, epsilon: float | None) -> dict[str, object]:
    return {
        "kind": "round",
        "phase": report.phase,
        "round": report.round,
        "survivors": report.survivors,
        "cohort": report.cohort,
        "dropped": [{"client_id": client, "reason": reason} for client, reason in report.dropped],
        "lost": report.lost,
        "epsilon": epsilon,
        "seconds": {key: round(value, 4) for key, value in report.seconds.items()},
        "bytes_up": report.bytes_up,
        "bytes_up_per_client": report.bytes_up // max(1, report.survivors),
        "bytes_down": report.bytes_down,
        "update_norm": report.update_norm,
        "saturated": report.saturated,
        "terms": list(report.terms),
    }
