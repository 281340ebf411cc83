"""A whole run, from a configuration to a run folder with adapter, receipt and report."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from privfed.config import RunConfig
from privfed.errors import BudgetExceededError, ConfigError, PrivfedError
from privfed.federation import canaries, recorder, saving, sentinels, setup, structure, workbench
from privfed.federation import material as materials
from privfed.federation.checkpoint import load_checkpoint
from privfed.federation.client import Holder
from privfed.federation.engines.in_process import Outcome, run_phases
from privfed.federation.exchange import Connect, Exchange
from privfed.federation.folder import RunFolder
from privfed.federation.generation import Generation, generate
from privfed.federation.opening import discard_unstarted, open_folder, open_ledger
from privfed.federation.phases import TRAIN
from privfed.federation.progress import Progress, Silent
from privfed.federation.records import partition_record, versions
from privfed.federation.shared import NOTHING, SharedWork
from privfed.models.language import LanguageExamples
from privfed.privacy.discrete.planning import survivors_events
from privfed.privacy.ledger import Ledger
from privfed.privacy.plan import PhasePlan, Plan
from privfed.privacy.spending import spent_so_far
from privfed.report.facts import receipt_facts
from privfed.report.html import write_report
from privfed.report.receipt import build_receipt, read_receipt, write_receipt
from privfed.rng import reproducible_key
from privfed.types import EVERYONE


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What ``train`` returns.

    Attributes:
        folder: The run folder.
        receipt: The content of receipt.json.
    """

    folder: Path
    receipt: Mapping[str, Any]


def train(
    config: RunConfig,
    *,
    out: Path,
    resume: bool = False,
    progress: Progress | None = None,
    engine: Engine | None = None,
    shared: SharedWork = NOTHING,
) -> RunResult:
    """Fine-tune as ``config`` says, from its first round or from where the folder's checkpoint stands.

    Args:
        config: The run.
        out: The run folder; new, or with ``resume`` the one to continue.
        resume: Continue the run in ``out``; the configuration must be the same.
        progress: Told what happens; silent by default.
        engine: Where the clients are; in this process by default.
        shared: What other runs of a grid have computed already; the result is the same to the bit without it.

    Returns:
        The folder and the receipt.

    Raises:
        ConfigError: If the configuration cannot hold, or the folder does not fit it.
        DataError: If the data cannot be used as described.
        ModelError: If the model or tuning cannot be had.
        BudgetExceededError: If the plan or a charge passes the data holder's cap.
        SentinelError: If a self-check fails; nothing more is released then.
    """
    watch = progress or Silent()
    started = time.perf_counter()
    materials.check_before_data(config)
    if engine is not None and config.audit.canaries:
        raise ConfigError(
            f"audit.canaries = {config.audit.canaries}: canaries are planted where all clients' data are, and here the "
            "sites hold theirs; set it to 0, or train in one process with `privfed train`."
        )
    structure.check_structure(config)
    run_folder = open_folder(config, out, resume=resume)
    if (run_folder.path / "receipt.json").exists():
        return _finish_again(config, run_folder, engine)
    try:
        setup.set_deterministic()
        material = materials.gather(config, shared) if engine is None else engine.material(config)
        if config.audit.canaries:
            under_way = load_checkpoint(run_folder.checkpoint) is not None
            coins = canaries.toss(run_folder.path, config, started=under_way)
            material = canaries.plant(config, material, coins)
        with ExitStack() as stack:
            ledger = stack.enter_context(open_ledger(config, run_folder, elsewhere=engine is not None))
            runner = _Run(config, run_folder, material, ledger, watch, engine, shared=shared)
            return runner.finish(runner.train(), started)
    except PrivfedError:
        discard_unstarted(run_folder)
        raise


class Engine(Protocol):
    """Where a run's clients are, if not in this process."""

    def material(self, config: RunConfig) -> materials.Material:
        """Return the data as the server has them."""

    def start(
        self,
        config: RunConfig,
        folder: RunFolder,
        stages: Mapping[str, setup.Stage],
        material: materials.Material,
        watch: Progress,
    ) -> Connect:
        """Get the clients ready; return what makes the exchange of each round."""

    def finish(self) -> None:
        """Tell the clients that the run is over."""


@dataclass(slots=True)
class _Run:
    """One run's parts while it goes on."""

    config: RunConfig
    folder: RunFolder
    material: materials.Material
    ledger: Ledger
    watch: Progress
    engine: Engine | None = None
    plan: Plan | None = None
    bench: workbench.Workbench | None = None
    results: dict[str, str] | None = None
    stage: setup.Stage | None = None
    shared: SharedWork = NOTHING

    def train(self) -> Outcome:
        """Plan, check, train every phase, check again."""
        distributed = self.config.privacy.is_distributed
        if distributed:  # its noise depends on how many values are trained
            self.bench = self._built()
        self.plan = self._planned()
        holder = self._holder()
        self._approve(holder)
        self.bench = self.bench or self._built()
        stages = setup.make_stages(
            self.config,
            self.material,
            self.bench,
            self.plan,
            holder,
            self.watch,
            self.folder.own,
            self.folder.transcript if self.config.audit.record else None,
        )
        self.stage = stages[TRAIN]
        vanishing = self._check_before(stages)
        frozen = sentinels.frozen_digests(self.bench.tuned.model)
        self._open_metrics(stages)
        spent = spent_so_far(self.config.privacy, self.plan, self._phases())
        connect: Connect = Exchange
        if self.engine is not None:
            connect = self.engine.start(self.config, self.folder, stages, self.material, self.watch)
        names = self.material.dataset.label_names
        outcome = run_phases(stages, self.config, self.folder, holder, self.watch, names, spent, connect)
        self._check_after(stages, outcome, vanishing, frozen)
        return outcome

    def finish(self, outcome: Outcome, started: float) -> RunResult:
        """Write adapter, receipt and report; erase the run's key."""
        digest = self._save_adapter(outcome)
        record = self._finish_record(outcome, digest, time.perf_counter() - started)
        self.folder.log(record)
        facts = receipt_facts(
            config=self.config,
            folder_id=(self.folder.run_id, self.folder.created),
            material=self.material,
            plan=self.plan,
            ledger=self.ledger,
            outcome=outcome,
            adapter_digest=digest,
            sentinels=self.results or {},
            versions=versions(),
            notes=(*saving.notes(self._stage()), *self._recorded(), *filter(None, [self._bench().packing])),
        )
        receipt = build_receipt(facts)
        write_receipt(self.folder.path / "receipt.json", receipt)
        write_report(self.folder.path)
        self.ledger.erase_run_key(self.folder.run_id)
        if self.engine is not None:
            self.engine.finish()
        return RunResult(folder=self.folder.path, receipt=receipt)

    def _built(self) -> workbench.Workbench:
        self.watch.message(f"Loading {self.config.model.name}")
        return workbench.build(self.config, self.material, self.watch, self.shared)

    def _lengths(self) -> Mapping[str, int] | None:
        distributed = self.config.privacy.is_distributed
        return workbench.trained_lengths(self.config, self._bench().tuned) if distributed else None

    def _phases(self) -> list[PhasePlan]:
        return materials.plans(self.config, self.material, self._lengths())

    def _planned(self) -> Plan | None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan = materials.plan_privacy(self.config, self.material, self._lengths())
        for warning in caught:
            self.watch.message(f"Warning: {warning.message}")
        if plan is not None:
            self.watch.message(
                f"Plan: epsilon {plan.epsilon:.3g} at delta {plan.delta:g} per {self.config.privacy.unit}, "
                f"noise multiplier {plan.noise_multiplier:.3g}"
            )
        return plan

    def _holder(self) -> Holder:
        reproducible = self.config.privacy.reproducible_noise or not self.config.privacy.on
        key = reproducible_key(self.config.seed) if reproducible else self.ledger.run_key(self.folder.run_id)
        return Holder(
            ledger=self.ledger,
            key=key,
            # streams derive from the run's id as well, which must not make a reproducible run differ from its twin
            run_id="reproducible" if reproducible else self.folder.run_id,
            ledger_run_id=self.folder.run_id,
            data_digest=self.material.dataset.digest,
            partition_digest=self.material.partition_digest,
            project=self.config.ledger.project,
        )

    def _approve(self, holder: Holder) -> None:
        """Check the whole plan against the data holder's cap, once."""
        unit = self.config.privacy.unit
        cap = self.config.ledger.epsilon_cap
        if unit == "none":
            self._refuse_unprotected()
            return
        if cap is not None:
            self.ledger.set_cap(
                data_digest=holder.data_digest, unit=unit, epsilon=cap, delta=self.config.privacy.target_delta
            )
        if self.plan is not None:
            records = {}
            if self.config.privacy.is_distributed:
                records[EVERYONE] = survivors_events(self.config.privacy, self.plan, self._phases())
            self.ledger.approve(
                {**self.plan.events_by_client, **records},
                run_id=self.folder.run_id,
                data_digest=holder.data_digest,
                partition_digest=holder.partition_digest,
            )

    def _refuse_unprotected(self) -> None:
        for unit in ("example", "client"):
            cap = self.ledger.cap(self.material.dataset.digest, unit)
            if cap is not None:
                raise BudgetExceededError(
                    f'privacy.unit = "none" spends without limit, and the data holder\'s cap is epsilon '
                    f"{cap.epsilon:g} per {unit}: turn privacy on."
                )

    def _check_before(self, stages: Mapping[str, setup.Stage]) -> frozenset[str]:
        self.results = {}
        vanishing: frozenset[str] = frozenset()
        for name, stage in stages.items():
            probe = sentinels.probe_examples(stage.train, len(self.material.dataset.label_names))
            private = self.config.privacy.unit == "example"
            sentence, vanishing = sentinels.check_gradients(stage.module, probe, private=private)
            self.results[f"gradients_{name}"] = f"passed: {sentence}"
        return vanishing

    def _check_after(
        self, stages: Mapping[str, setup.Stage], outcome: Outcome, vanishing: frozenset[str], frozen: Mapping[str, str]
    ) -> None:
        stage = stages[TRAIN]
        after = sentinels.frozen_digests(self._bench().tuned.model)
        results = self.results if self.results is not None else {}
        plan, sharing = stage.phase.plan, stage.phase.sharing
        results["frozen"] = f"passed: {sentinels.check_frozen(frozen, after, sharing.carried)}"
        if plan.rounds * plan.local_steps > 1:
            sentinels.check_carried(frozen, after, sharing.carried)
            still = vanishing | (set(sharing.layout.names) - sharing.must_move(plan.rounds, plan.local_steps))
            moved = sentinels.check_moved(
                sharing.layout,
                outcome.moved,
                still,
                # a block whose clients were in no cohort stands still
                dense=stage.phase.codec.properties.dense
                and (stage.phase.layers is None or plan.cohort_size == plan.clients),
            )
            results["moved"] = f"passed: {moved}"

    def _bench(self) -> workbench.Workbench:
        if self.bench is None:
            raise RuntimeError("the model is not loaded yet")
        return self.bench

    def _recorded(self) -> tuple[str, ...]:
        """Return what the receipt says of a recorded run."""
        config = self.config
        if not config.audit.record:
            return ()
        placement = config.privacy.placed if config.privacy.on else "none"
        return (recorder.note(masked=config.secagg.name == "masked", placement=placement),)

    def _stage(self) -> setup.Stage:
        if self.stage is None:
            raise RuntimeError("the phases are not made yet")
        return self.stage

    def _open_metrics(self, stages: Mapping[str, setup.Stage]) -> None:
        """Write the partition and the opening line, unless a resumed run has them."""
        if load_checkpoint(self.folder.checkpoint) is not None:
            return
        self.folder.cut_metrics(0)
        self.folder.write_json("partition.json", partition_record(self.config, self.material))
        model = self._bench().tuned.model
        self.folder.log(
            {
                "kind": "start",
                "time": self.folder.created,
                "clients": len(self.material.shards),
                "trained_parameters": stages[TRAIN].phase.layout.size,
                "model_parameters": sum(p.numel() for p in model.parameters()),
                "rounds": self.config.server.rounds,
                "tuning": getattr(self.config.tuning, "name", ""),
                "planned_epsilon": self.plan.epsilon if self.plan else None,
                "train_rows": sum(map(len, self.material.shards)),
                "test_rows": len(self.material.dataset.test),
            }
        )

    def _save_adapter(self, outcome: Outcome) -> str:
        """Write ``adapter/`` so that it is there whole or not at all; return the weights' SHA-256.

        Clients' own models go to ``clients/``, where they have any.
        """
        saving.save_clients(self._bench().tuned, self._stage(), outcome.state, self.folder.clients)
        temporary = self.folder.path / "adapter.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        saving.save_model(self._bench().tuned, self._stage(), temporary)
        if self.material.dataset.label_names:
            names = json.dumps(list(self.material.dataset.label_names), ensure_ascii=False, indent=1)
            (temporary / "label_names.json").write_text(names + "\n", encoding="utf-8")
        shutil.rmtree(self.folder.adapter, ignore_errors=True)
        temporary.replace(self.folder.adapter)
        weights = sorted(self.folder.adapter.glob("*.safetensors"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()

    def _finish_record(self, outcome: Outcome, digest: str, seconds: float) -> dict[str, Any]:
        written = self._generation()
        scores = {name: value for name, value in outcome.score.record().items() if name != "loss"}
        return {
            "kind": "finish",
            "seconds": round(seconds, 2),
            **scores,
            "per_class": list(outcome.score.per_class),
            **({} if written is None else {"generation": dict(written.metrics), "samples": list(written.samples)}),
            "bytes_up": int(outcome.totals.get("bytes_up", 0)),
            "adapter_sha256": digest,
        }

    def _generation(self) -> Generation | None:
        """Let a language model write on a few test rows, where the configuration asks for it."""
        evaluate = self.config.evaluate
        bench = self._bench()
        if not evaluate.generate or not isinstance(bench.test, LanguageExamples):
            return None
        self.watch.message(f"Writing on {min(evaluate.generate, len(bench.test))} test rows")
        return generate(bench.tuned.model, bench.test, evaluate.generate, evaluate.max_new_tokens)


def _finish_again(config: RunConfig, run_folder: RunFolder, engine: Engine | None) -> RunResult:
    """Do what comes after the receipt: a run that was stopped there has no more to train, and perhaps no key."""
    write_report(run_folder.path)
    with open_ledger(config, run_folder, elsewhere=engine is not None) as ledger:
        ledger.erase_run_key(run_folder.run_id)
    return RunResult(folder=run_folder.path, receipt=read_receipt(run_folder.path / "receipt.json"))
