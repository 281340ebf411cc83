"""A run at a site: its plan, its model and the phases, made once from what the server sent and the site approved."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from privfed.config import RunConfig, parse_config
from privfed.data.config import DataConfig
from privfed.errors import ConfigError, ProtocolError
from privfed.federation import material as materials
from privfed.federation import setup, workbench
from privfed.federation.client import Holder
from privfed.federation.cohort import balanced_cohort, with_cohort
from privfed.federation.engines.flower.policy import Policy, approve, refusal
from privfed.federation.progress import Progress
from privfed.federation.setup import Stage
from privfed.federation.site_material import site_material
from privfed.federation.sites import Sites
from privfed.privacy.discrete.planning import survivors_events
from privfed.privacy.ledger import Ledger
from privfed.privacy.plan import PhasePlan, Plan
from privfed.rng import reproducible_key
from privfed.secagg import Identity
from privfed.types import EVERYONE


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFacts:
    """What a site is, whatever run it takes part in.

    Attributes:
        name: The site, as in the roster.
        identity: Signs its replies.
        clients: The signing keys of its clients.
        sites: The pinned roster.
        policy: Caps and conditions.
        own: Its ``[data]`` table, where it has data of its own.
        models: Where models are at this site, by ``model.name``; others are taken as named.
        folder: What it keeps between rounds.
    """

    name: str
    identity: Identity = field(repr=False)
    clients: Mapping[str, Identity] = field(repr=False)
    sites: Sites
    policy: Policy
    own: DataConfig | None
    models: Mapping[str, str]
    folder: Path


@dataclass(slots=True)
class SiteRun:
    """One run, approved and ready."""

    config: RunConfig
    run_id: str
    digest: str
    holder: Holder
    stages: Mapping[str, Stage]
    schedules: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    taken: dict[str, dict[str, int]] = field(default_factory=dict)

    def stage(self, name: object) -> tuple[int, Stage]:
        """Return a phase and its number.

        Raises:
            ProtocolError: If the run has no such phase.
        """
        if not isinstance(name, str) or name not in self.stages:
            raise ProtocolError(f"The server names the phase {name!r}; the run has {', '.join(self.stages)}.")
        return list(self.stages).index(name), self.stages[name]

    @property
    def masked(self) -> bool:
        """Whether updates leave under masks only."""
        return self.config.secagg.name == "masked"

    @property
    def guarded(self) -> bool:
        """Whether even a failure's message says too much of a client."""
        return self.config.privacy.unit == "client" or self.config.privacy.is_distributed

    def cohort(self, name: str, number: int) -> tuple[str, ...] | None:
        """Return who takes part in a round, worked out here; None where the server draws the cohort in private."""
        phase = self.stages[name].phase
        if phase.central:
            return None
        known = self.schedules.setdefault(name, [])
        names = sorted(phase.clients)
        while len(known) < number:
            taken, at = self.taken.get(name, {}), len(known) + 1
            cohort = balanced_cohort(names, taken, phase.plan.cohort_size, seed=phase.seed, phase=name, round_number=at)
            known.append(cohort)
            self.taken[name] = with_cohort(taken, cohort)
        return known[number - 1]

    def use(self, name: str) -> None:
        """Let go of the hooks that other phases put on the modules they share."""
        for other, stage in self.stages.items():
            if other != name:
                stage.trainer.close()


def approved_run(
    facts: SiteFacts, ledger: Ledger, run_id: str, toml: Mapping[str, object], classes: tuple[str, ...], watch: Progress
) -> SiteRun:
    """Check a run against the site's policy and caps, then make it ready: data, model, phases.

    Args:
        facts: The site.
        ledger: The site's ledger.
        run_id: The run.
        toml: Its configuration as parsed TOML.
        classes: The classes in the server's order, where sites bring their own data.
        watch: Told what takes long.

    Raises:
        ConfigError: If the configuration cannot hold, or the site does not accept it.
        BudgetExceededError: If the plan passes a cap.
        DataError: If the site's data do not fit.
        ModelError: If the model cannot be had.
    """
    config = parse_config(toml, where="the server's configuration")
    digest = config.digest()
    reason = refusal(facts.policy, config, len(facts.sites.sizes))
    if reason is not None:
        raise ConfigError(f"{reason}.")
    config = _at_home(config, facts)
    setup.set_deterministic()
    material = site_material(config, facts.sites, facts.name, classes, facts.own)
    distributed = config.privacy.is_distributed
    bench = workbench.build(config, material, watch, scored=False) if distributed else None
    lengths = workbench.trained_lengths(config, bench.tuned) if bench else None
    plan = materials.plan_privacy(config, material, lengths)
    holder = _holder(facts, ledger, config, run_id, material)
    _approve(facts, holder, config, plan, materials.plans(config, material, lengths))
    stages = setup.make_stages(
        config,
        material,
        bench or workbench.build(config, material, watch, scored=False),
        plan,
        holder,
        watch,
        own=facts.folder / "runs" / run_id,
    )
    return SiteRun(config=config, run_id=run_id, digest=digest, holder=holder, stages=stages)


def _at_home(config: RunConfig, facts: SiteFacts) -> RunConfig:
    """Return the configuration with the model where it is at this site."""
    path = facts.models.get(config.model.name)
    if path is None:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"name": path})})


def _holder(facts: SiteFacts, ledger: Ledger, config: RunConfig, run_id: str, material: materials.Material) -> Holder:
    reproducible = config.privacy.reproducible_noise or not config.privacy.on
    own_clients = "\x1f".join(sorted(facts.clients))
    return Holder(
        ledger=ledger,
        key=reproducible_key(config.seed) if reproducible else ledger.run_key(run_id),
        run_id="reproducible" if reproducible else run_id,
        ledger_run_id=run_id,
        data_digest=material.dataset.digest,
        partition_digest=hashlib.sha256(f"{material.partition_digest}/{own_clients}".encode()).hexdigest(),
        project=config.ledger.project,
    )


def _approve(
    facts: SiteFacts, holder: Holder, config: RunConfig, plan: Plan | None, phases: Sequence[PhasePlan]
) -> None:
    """Check the plan; where the server adds the noise charge all of it, for not every round is seen from here."""
    if plan is None:
        return
    events = {c: e for c, e in plan.events_by_client.items() if c in facts.clients or c == EVERYONE}
    if config.privacy.is_distributed:
        events[EVERYONE] = survivors_events(config.privacy, plan, phases)
    approve(
        facts.policy,
        holder.ledger,
        events,
        run_id=holder.ledger_run_id,
        project=holder.project,
        data_digest=holder.data_digest,
        partition_digest=holder.partition_digest,
    )
    if config.privacy.placed == "central":
        for number, event in enumerate(plan.events_by_client[EVERYONE]):
            holder.charge(EVERYONE, f"plan {number}", 0, config.digest(), event)
