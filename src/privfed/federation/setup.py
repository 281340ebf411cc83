"""From a configuration and its data to phases that are ready to run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from privfed.compression import CODECS, Codec, Ring
from privfed.errors import ConfigError
from privfed.federation.client import Client, Holder
from privfed.federation.codecs import Downlink, Place, bound_of, codec_at
from privfed.federation.distributed import make_shares
from privfed.federation.fairness import Fairness, make_fairness
from privfed.federation.layers import OTHERS, Layers, deal_layers
from privfed.federation.local import ExampleDp, LocalTrainer, in_head
from privfed.federation.material import Material, plans
from privfed.federation.meter import make_meter
from privfed.federation.pairs import check_pairs, find_pairs, read_named
from privfed.federation.personal import PersonalStore
from privfed.federation.phases import TRAIN, phases
from privfed.federation.ranks import Support, deal_ranks, refusal
from privfed.federation.recorder import PhaseFacts, Recorder
from privfed.federation.roster import Roster
from privfed.federation.round import Phase
from privfed.federation.sharing import Sharing, share_out
from privfed.federation.state import first_state
from privfed.federation.workbench import Workbench, trained_lengths, trained_module
from privfed.models.examples import Examples
from privfed.privacy.mechanisms import AtWork, Site, built
from privfed.privacy.mechanisms.gaussian import GaussianAtWork
from privfed.privacy.plan import PhasePlan, Plan
from privfed.rules import made
from privfed.run_config import RunConfig, largest_clip
from privfed.schedule import ClientConfig, ServerConfig
from privfed.secagg import Identity
from privfed.tuning.layout import layout_of, read_flat
from privfed.types import PrivacyEvent, Shard

if TYPE_CHECKING:
    from privfed.federation.progress import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One phase ready to run: the module that trains, its examples, the phase itself, what clients are scored on."""

    module: nn.Module
    train: Examples
    test: Examples
    trainer: LocalTrainer
    phase: Phase
    fairness: Fairness | None = None


def make_stages(
    config: RunConfig,
    material: Material,
    bench: Workbench,
    plan: Plan | None,
    holder: Holder,
    progress: Progress,
    own: Path | None = None,
    transcript: Path | None = None,
) -> dict[str, Stage]:
    """Return the run's phases in order: the head alone on cached features where asked for, then the tuning.

    Args:
        config: The run.
        material: Its data.
        bench: Model and examples.
        plan: What it costs, or None without privacy.
        holder: The data holder.
        progress: Told what takes long.
        own: Folder for what clients keep to themselves; needed where the rule or ``server.personal`` has them keep
            anything.
        transcript: Folder to record the run in; None to leave that out.

    Raises:
        ConfigError: If the rule or ``server.personal`` does not fit what is trained.
        ModelError: If the model does not fit the rule or the warm start.
    """
    stages = {}
    counted = trained_lengths(config, bench.tuned) if config.privacy.is_distributed else None
    for (name, client, server), phase_plan in zip(phases(config), plans(config, material, counted), strict=True):
        module, train, test, prefix = trained_module(config, bench, name, progress)
        dp = None
        if plan is not None and config.privacy.unit == "example":
            dp = ExampleDp(
                l2_clip_norm=config.privacy.l2_clip_norm,
                noise_multiplier=None
                if config.privacy.is_distributed
                else plan.noise_multiplier * phase_plan.noise_scale,
            )
        sharing = sharing_of(config, module, prefix, client, server)
        packing = config.model.max_length if config.model.packing else 0
        trainer = LocalTrainer(module, prefix, train, client, dp, packing)
        phase = _phase(config, material, phase_plan, server, sharing, trainer, plan, holder, own)
        if transcript is not None:
            phase = replace(phase, recorder=_recorder(config, phase, transcript, plan, holder))
        fairness = _fairness(config, material) if name == TRAIN and material.simulated else None
        stages[name] = Stage(module=module, train=train, test=test, trainer=trainer, phase=phase, fairness=fairness)
    return stages


def _fairness(config: RunConfig, material: Material) -> Fairness | None:
    data = material.dataset
    return make_fairness(
        material.shards,
        train_labels=data.train.labels,
        test_labels=data.test.labels,
        test_clients=data.test.clients,
        classes=len(data.label_names),
        most=config.server.evaluate_clients,
        seed=config.seed,
    )


def sharing_of(
    config: RunConfig, module: nn.Module, prefix: str | None, client: ClientConfig, server: ServerConfig
) -> Sharing:
    """Return how the trained tensors are shared out; tensors that the server carries are frozen from here on.

    Raises:
        ConfigError: If ``server.personal`` or the rule does not fit what is trained.
        ModelError: If the model's pairs are not what the rule computes with.
    """
    rule = made(server.aggregation)
    pairs = find_pairs(module) if rule.takes is not None or server.meter else ()
    check_pairs(module, rule, pairs, server.rule)
    carried = set(rule.carried(pairs))
    for name, parameter in module.named_parameters():
        if name in carried:
            parameter.requires_grad_(False)
    layout = layout_of(module)
    head_rate = client.head_learning_rate or client.learning_rate
    return share_out(
        rule,
        layout,
        pairs,
        patterns=server.personal,
        head=prefix,
        rates={
            name: client.local_steps * (head_rate if in_head(name, prefix) else client.learning_rate)
            for name in layout.names
        }
        if rule.variates
        else None,
        seed=config.seed,
    )


def _phase(
    config: RunConfig,
    material: Material,
    phase_plan: PhasePlan,
    server: ServerConfig,
    sharing: Sharing,
    trainer: LocalTrainer,
    plan: Plan | None,
    holder: Holder,
    own: Path | None,
) -> Phase:
    masked = config.secagg.name == "masked"
    if masked and config.privacy.placed != "central":  # a cohort drawn at random is looked at when it is drawn
        config.secagg.requirements().least_survivors(phase_plan.cohort_size)
    plugin = CODECS.get(str(getattr(config.compression, "name", None)))
    most = phase_plan.clients if config.privacy.placed == "central" else phase_plan.cohort_size
    ring_bits = config.ring_bits(most)
    codec = plugin.build(config.compression, Ring(bits=ring_bits, clients=most) if masked else None)
    largest = max(len(shard) for shard in material.shards)
    place = Place(seed=config.seed, run_id=holder.run_id, phase=phase_plan.name, round=1)
    central = _central(config, phase_plan, plan, codec, sharing, place)
    shares = make_shares(config, material.shards, phase_plan, plan, sharing.layout, trainer)
    store = _store(sharing, codec, own, phase_plan.name)
    downlink = _downlink(config, sharing, trainer)
    supports = deal_ranks(server.ranks, material.shards, sharing.layout, trainer.module)
    layers = deal_layers(server.layers, material.shards, sharing.layout, trainer.module)
    if masked:
        _check_hidden(config, supports, layers, sharing, phase_plan.cohort_size)

    def client(shard: Shard) -> Client:
        return Client(
            shard=shard,
            trainer=trainer,
            codec=codec,
            holder=holder,
            sharing=sharing,
            store=store,
            event=_participation(config, phase_plan, shard.client_id, plan),
            shares=shares,
            mechanism=central,
            weight=_weight(len(shard), largest) if config.server.weighting == "examples" else 1.0,
            seed=config.seed,
            downlink=downlink,
            support=supports.get(shard.client_id),
            trained=layers.by_client[shard.client_id] if layers else None,
        )

    return Phase(
        plan=phase_plan,
        server=server,
        clients=Roster(material.shards, client),
        codec=codec,
        codec_name=str(getattr(config.compression, "name", "")),
        sharing=sharing,
        store=store,
        masked=masked,
        requirements=config.secagg.requirements(),
        ring_bits=shares.params.ring_bits if shares else ring_bits,
        identities=_identities(material, holder) if masked else {},
        weighted=config.server.weighting == "examples",
        central=central,
        shares=shares,
        meter=make_meter(sharing, trainer, _noise(central, codec, phase_plan)) if server.meter else None,
        seed=config.seed,
        config_digest=config.digest(),
        downlink=downlink,
        layers=layers,
    )


def _recorder(config: RunConfig, phase: Phase, folder: Path, plan: Plan | None, holder: Holder) -> Recorder:
    central = config.privacy.placed == "central"
    facts = PhaseFacts(
        run_id=holder.run_id,
        phase=phase.plan.name,
        layout=phase.layout,
        shared=phase.sharing.shared.layout,
        extra=phase.central.extra if phase.central else 0,
        ring=(phase.ring_bits, phase.plan.clients if central else phase.plan.cohort_size) if phase.masked else None,
        noise_multiplier=plan.noise_multiplier * phase.plan.noise_scale if plan else None,
    )
    return Recorder(folder / phase.plan.name, facts)


def _check_hidden(
    config: RunConfig, supports: Mapping[str, Support], layers: Layers | None, sharing: Sharing, cohort: int
) -> None:
    """Refuse ranks or groups of blocks of which no masked round of a run could hide the clients.

    Raises:
        ConfigError: If a part of the model is trained by too few of all clients.
    """
    corrupt = config.secagg.requirements().most_corrupt(cohort)
    given, reason, instead = "", None, ""
    if supports:
        given, reason = f"server.ranks = {config.server.ranks}", refusal(supports.values(), corrupt + OTHERS)
        instead = "give the largest rank to more clients, or set"
    elif layers is not None:
        given = f"server.layers = {config.server.layers}"
        reason = layers.refusal(layers.by_client, sharing.shared, corrupt + OTHERS)
        instead = "use larger groups of blocks, so that each is trained by more clients, or"
    if reason is not None:
        raise ConfigError(
            f'{given} with secagg.name = "masked": {reason}, of which {corrupt} may be corrupt (secagg.corrupt = '
            f'{config.secagg.corrupt:g}); {instead} secagg.name = "none".'
        )


def _noise(central: AtWork | None, codec: Codec, phase: PhasePlan) -> float | None:
    """Return the standard deviation of the server's noise in a value of an average, for the meter.

    None where the codec does something with a noised sum before values come of it.
    """
    if not isinstance(central, GaussianAtWork):  # the configuration takes the meter with no other mechanism
        return 0.0
    if codec.properties.needs_context or not codec.properties.linear:
        return None
    return central.noise_multiplier * central.sensitivity / phase.cohort_size


def _store(sharing: Sharing, codec: Codec, own: Path | None, phase: str) -> PersonalStore | None:
    if not sharing.personal.size and not sharing.rule.variates and not codec.properties.stateful:
        return None
    if own is None:
        raise ConfigError("Clients of this run keep a state of their own: give a folder for it.")
    # rounds count from 1 in each phase: another phase's files must not be taken for this one's
    return PersonalStore(own if phase == TRAIN else own.with_name(f"{own.name}-{phase}"))


def _identities(material: Material, holder: Holder) -> Mapping[str, Identity]:
    """Return the signing keys that the holder gives its clients for this run; a resumed run has the same."""

    def identity(shard: Shard) -> Identity:
        return Identity.from_seed(holder.stream("identity", shard.client_id).bytes(32))

    return Roster(material.shards, identity)


def _weight(size: int, largest: int) -> float:
    """Return n / n_max on the 16-bit grid on which weights travel, never 0."""
    return max(1, round(size / largest * (1 << 16))) / (1 << 16)


def _participation(config: RunConfig, phase: PhasePlan, client: str, plan: Plan | None) -> PrivacyEvent | None:
    if plan is None or config.privacy.placed == "central":
        return None
    if config.privacy.is_distributed:
        of_phase = [name for name, _, _ in phases(config)].index(phase.name)
        return plan.events_by_client[client][of_phase].one_step()
    return PrivacyEvent(
        unit="example",
        noise_multiplier=plan.noise_multiplier * phase.noise_scale,
        sampling_probability=phase.probabilities[client],
        steps=phase.local_steps,
        relation=config.privacy.neighboring_relation,
    )


def _downlink(config: RunConfig, sharing: Sharing, trainer: LocalTrainer) -> Downlink | None:
    """Return how broadcasts are encoded; None where parameters are sent as they are.

    Changes are counted from what the configuration alone makes: the model before any training, as the rule starts it.
    """
    name = str(getattr(config.downlink, "name", ""))
    if name == "identity":
        return None
    carried = read_named(trainer.module, sharing.carried)
    start = first_state("start", read_flat(trainer.module), carried, sharing)
    return Downlink(
        codec=CODECS.get(name).build(config.downlink, None),
        layout=sharing.shared.layout,
        start_S=sharing.shared.take(start.params_D),
        seed=config.seed,
    )


def _central(
    config: RunConfig, phase: PhasePlan, plan: Plan | None, codec: Codec, sharing: Sharing, place: Place
) -> AtWork | None:
    """Return the server's mechanism under client level.

    One client changes the codec's linear sum by at most its bound on the clipped update (times 2 where a client is
    replaced, which the accountant's relation covers). A codec of which each round has another bound brings it with the
    round; here it is that of a first round of the most values.

    Raises:
        ConfigError: If the codec gives no bound.
    """
    if plan is None or config.privacy.placed != "central":
        return None
    size = sharing.largest(phase.rounds)
    sent = next(part for part in (sharing.part(number).sent for number in (1, 2)) if part.size == size)
    first = codec_at(codec, place, sent, codec.public_state(codec.start_state(size)))

    def bound(clip: float, length: int) -> float:
        return bound_of(first, length)(clip)

    site = Site(
        plan=phase,
        noise_multiplier=plan.noise_multiplier,
        relation=config.privacy.neighboring_relation,
        l2_clip_norm=config.privacy.l2_clip_norm,
        largest_clip=largest_clip(config),
        size=size,
        bound=bound,
        seed=config.seed,
    )
    return built(config.privacy.mechanism).at_work(site)


def set_deterministic() -> None:
    """Keep torch deterministic: a resumed run must equal an unbroken one to the bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU's first matrix product runs
    # unlike use_deterministic_algorithms, this does not import torch's compiler (a second of start-up)
    torch.set_deterministic_debug_mode("error")
