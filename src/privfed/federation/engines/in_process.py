"""The in-process engine: every client in turn on this machine, a checkpoint after every round.

Messages between clients and server are bytes even here, so that what the server can see is what it would see.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from privfed.config import RunConfig
from privfed.federation.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from privfed.federation.client import Holder
from privfed.federation.evaluate import Score, evaluate
from privfed.federation.folder import RunFolder
from privfed.federation.phases import TRAIN
from privfed.federation.progress import Progress
from privfed.federation.round import RoundReport, run_round
from privfed.federation.setup import Stage
from privfed.federation.state import ServerState
from privfed.tuning.layout import read_flat, write_flat
from privfed.types import Float32

Spent = Callable[[str, int], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What training left behind."""

    state: ServerState
    score: Score
    probe_accuracy: float | None
    totals: Mapping[str, float]
    start_D: Mapping[str, Float32] = field(repr=False)


def run_phases(
    stages: Mapping[str, Stage],
    config: RunConfig,
    folder: RunFolder,
    holder: Holder,
    progress: Progress,
    label_names: Sequence[str],
    spent: Spent,
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

    Raises:
        BudgetExceededError: If a charge would pass the holder's cap.
    """
    checkpoint = load_checkpoint(folder.checkpoint)
    if checkpoint:
        folder.cut_metrics(checkpoint.metrics_bytes)
    names = list(stages)
    totals: dict[str, float] = dict(checkpoint.totals) if checkpoint else {}
    start_D = {name: read_flat(stage.module) for name, stage in stages.items()}
    first = names.index(checkpoint.state.phase) if checkpoint else 0
    state = ServerState(phase=names[0], round=0, params_D=start_D[names[0]])
    score: Score | None = None
    for position in range(first, len(names)):
        stage = stages[names[position]]
        resumed = checkpoint is not None and checkpoint.state.phase == names[position]
        # a later phase starts from what the earlier one left in the module they share
        state = (
            checkpoint.state
            if resumed and checkpoint
            else ServerState(phase=names[position], round=0, params_D=read_flat(stage.module))
        )
        loop = _Loop(stage, config, folder, holder, progress, label_names, spent, totals)
        state, score = loop.run(state)
    if score is None:
        score = evaluate(stages[names[-1]].module, stages[names[-1]].test, label_names)
    probe = totals.get("probe_accuracy")
    return Outcome(state=state, score=score, probe_accuracy=probe, totals=totals, start_D=start_D)


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

    def run(self, state: ServerState) -> tuple[ServerState, Score]:
        """Return the state after the last round and its score."""
        plan = self.stage.phase.plan
        score: Score | None = None
        if state.round == 0:
            score = self._evaluate(state)
            self._save(state)
        while state.round < plan.rounds:
            before = time.perf_counter()
            state, report = run_round(state, self.stage.phase, self.holder, self.progress)
            epsilon = self.spent(plan.name, state.round)
            self._add(report)
            self.folder.log(_round_record(report, epsilon))
            due = state.round % self.stage.phase.server.evaluate_every == 0 or state.round == plan.rounds
            score = self._evaluate(state) if due else None
            self.totals["seconds"] = self.totals.get("seconds", 0.0) + time.perf_counter() - before
            self._save(state)
            self.progress.round_done(plan.name, state.round, plan.rounds, epsilon)
        write_flat(self.stage.module, state.params_D)
        self.stage.trainer.close()
        final = score or evaluate(self.stage.module, self.stage.test, self.label_names)
        if plan.name != TRAIN:
            self.totals["probe_accuracy"] = final.accuracy
        return state, final

    def _evaluate(self, state: ServerState) -> Score:
        write_flat(self.stage.module, state.params_D)
        score = evaluate(self.stage.module, self.stage.test, self.label_names)
        name = self.stage.phase.plan.name
        self.folder.log(
            {
                "kind": "eval",
                "phase": name,
                "round": state.round,
                "accuracy": score.accuracy,
                "macro_f1": score.macro_f1,
                "loss": score.loss if math.isfinite(score.loss) else None,
                "n": score.n,
                "majority": score.majority,
            }
        )
        self.progress.evaluated(name, state.round, score.accuracy)
        return score

    def _save(self, state: ServerState) -> None:
        save_checkpoint(
            self.folder.checkpoint,
            Checkpoint(state=state, metrics_bytes=self.folder.metrics_bytes(), totals=self.totals),
        )

    def _add(self, report: RoundReport) -> None:
        for key, value in (("bytes_up", report.bytes_up), ("bytes_down", report.bytes_down)):
            self.totals[key] = self.totals.get(key, 0.0) + value
        self.totals["train_seconds"] = self.totals.get("train_seconds", 0.0) + report.seconds["train"]


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
