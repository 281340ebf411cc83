"""RunConfig: the whole run as strict, frozen tables. What cannot hold is refused here, before any data is touched."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Self

import tomli_w
from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from privfed.compression import CODECS
from privfed.compression.checks import Setting, check_codec, check_downlink, largest_carried
from privfed.data import PARTITIONERS, form_of, has_labels
from privfed.data.canaries import CANARIES, check_canaries
from privfed.data.config import DataConfig
from privfed.data.sharding import no_classes
from privfed.errors import ConfigError
from privfed.models.config import ModelConfig
from privfed.privacy.config import PrivacyConfig
from privfed.privacy.discrete.config import check_distributed
from privfed.privacy.mechanisms import MECHANISMS
from privfed.registry import Registry
from privfed.rules import RULES, check_rule
from privfed.schedule import ClientConfig, HeadWarmStart, ServerConfig
from privfed.secagg.config import SecAggConfig
from privfed.table import Table
from privfed.tracking import TRACKERS
from privfed.tuning import TUNINGS


class LedgerConfig(Table):
    """Where the data holder's ledger is, and its cap.

    Attributes:
        path: The SQLite file. None: beside the data file, or in the run folder where there is no file.
        project: A name that groups runs in listings.
        epsilon_cap: Over all runs on the same data, at ``privacy.target_delta``; None leaves the stored cap.
    """

    path: str | None = None
    project: str = "default"
    epsilon_cap: float | None = Field(default=None, gt=0)


class EvaluateConfig(Table):
    """What is measured beside the scores, once, when training is over.

    Attributes:
        generate: For a causal language model: let it continue this many test rows, score what it writes (ROUGE, BLEU)
            and *show the rows in the report*.
        max_new_tokens: The most that it writes on each.
    """

    generate: int = Field(default=0, ge=0, le=1000)
    max_new_tokens: int = Field(default=64, ge=1)


class AuditConfig(Table):
    """What is kept for audits.

    Attributes:
        record: Keep in ``transcript/`` what went over the wire, for attacks to be run on: every broadcast, and each
            client's message, or under secure aggregation only the sum. Off by default, for *messages of single clients
            are then kept*; receipt and report say so.
        canaries: Plant so many canaries, each in the training data by the toss of a coin; 0 for none. ``privfed audit``
            then bounds epsilon from below by how well the coins can be told. *The model has seen made-up records*.
        canary: What a canary is: a ``mislabelled`` record, a text of ``rare_token`` words, or a record whose
            gradient is given: of one value (``gradient``), along a ``random_direction`` or an ``optimised_direction``
            (under unit ``client``: a client with such a record).
    """

    record: bool = False
    canaries: int = Field(default=0, ge=0)
    canary: str = "mislabelled"


def _tagged(registry: Registry[Any], default: str) -> Any:
    """Return a field type: a table whose ``name`` picks the plug-in whose table it is."""

    def pick(value: Any) -> Any:
        if isinstance(value, Table):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"expected a table with a name, got {value!r}")
        name = value.get("name", default)
        if not isinstance(name, str):
            raise ValueError(f"name must be a string, got {name!r}")
        return registry.get(name).config.model_validate(dict(value))

    return Annotated[SerializeAsAny[Table], BeforeValidator(pick)]


class RunConfig(Table):
    """A whole run. ``privfed config show <preset>`` prints one with every default."""

    seed: int = Field(default=0, ge=0)
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig(name="pydoc")
    partition: _tagged(PARTITIONERS, "iid") = Field(default_factory=lambda: PARTITIONERS.get("iid").config())  # type: ignore[valid-type]
    tuning: _tagged(TUNINGS, "ffa_lora") = Field(default_factory=lambda: TUNINGS.get("ffa_lora").config())  # type: ignore[valid-type]
    head_warm_start: HeadWarmStart = HeadWarmStart()
    client: ClientConfig = ClientConfig()
    server: ServerConfig = ServerConfig()
    privacy: PrivacyConfig = PrivacyConfig(target_epsilon=8.0)
    compression: _tagged(CODECS, "identity") = Field(default_factory=lambda: CODECS.get("identity").config())  # type: ignore[valid-type]
    downlink: _tagged(CODECS, "identity") = Field(default_factory=lambda: CODECS.get("identity").config())  # type: ignore[valid-type]
    secagg: SecAggConfig = SecAggConfig()
    ledger: LedgerConfig = LedgerConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    audit: AuditConfig = AuditConfig()
    tracking: _tagged(TRACKERS, "none") = Field(default_factory=lambda: TRACKERS.get("none").config())  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        form_of(self.data, self.model.task)
        if self.model.task != "causal_lm" and self.evaluate.generate:
            raise ConfigError(
                f'evaluate.generate = {self.evaluate.generate} with model.task = "{self.model.task}", which writes no '
                "text: set evaluate.generate = 0."
            )
        if self.model.packing and self.model.task != "causal_lm":
            raise ConfigError(
                f'model.packing = true with model.task = "{self.model.task}", whose records each need a sequence of '
                "their own: set model.packing = false."
            )
        if has_labels(self.model.task):
            return self
        name = str(getattr(self.partition, "name", ""))
        if PARTITIONERS.get(name).needs_labels:
            raise ConfigError(no_classes(name))
        if self.head_warm_start.name != "none":
            raise ConfigError(
                f'head_warm_start.name = "{self.head_warm_start.name}" trains a classification head, and '
                f'model.task = "{self.model.task}" has none: set head_warm_start.name = "none".'
            )
        return self

    @model_validator(mode="after")
    def _check_precision(self) -> Self:
        """An example must add at most the clip: what it does to the *rounding* of others' gradients counts too."""
        if self.privacy.unit != "example":
            return self
        reasons = {
            "autocast": (
                self.model.autocast == "bf16",
                "one more example in a batch changes its padding, and the bfloat16 rounding of all the others with it",
                "none",
            ),
            "quantization": (
                self.model.quantization == "8bit",
                "8-bit products pick their outlier columns over the whole batch, so examples touch each other",
                "4bit",
            ),
        }
        if self.model.packing:
            raise ConfigError(
                'model.packing = true with privacy.unit = "example": records that share a sequence have no gradients '
                "of their own to clip; set model.packing = false."
            )
        if self.model.dropout:
            raise ConfigError(
                f'model.dropout = {self.model.dropout:g} with privacy.unit = "example": an example draws another mask '
                "alone than in its batch, so that its gradient could not be checked; set model.dropout = 0.0."
            )
        for key, (given, reason, instead) in reasons.items():
            if given:
                raise ConfigError(
                    f'model.{key} = "{getattr(self.model, key)}" with privacy.unit = "example": {reason}, and the clip '
                    f'would not bound what one example does; set model.{key} = "{instead}".'
                )
        return self

    @model_validator(mode="after")
    def _check_codec(self) -> Self:
        check_downlink(self.downlink)
        rule, mechanism = RULES.get(self.server.rule), MECHANISMS.get(self.privacy.mechanism_name)
        tuning = str(getattr(self.tuning, "name", ""))
        check_codec(
            self.compression,
            Setting(
                masked=self.secagg.name == "masked",
                unit=self.privacy.unit,
                central=self.privacy.on and self.privacy.placed == "central",
                mechanism=self.privacy.mechanism_name,
                correlated=mechanism.correlated,
                two_sums=mechanism.two_sums,
                rule=self.server.rule,
                individual=rule.needs_individual,
                variates=rule.variates,
                weighted=self.server.weighting == "examples",
                meter=self.server.meter,
                layers=bool(self.server.layers),
                coordinatewise=rule.coordinatewise,
                tuning=tuning,
                scores=TUNINGS.get(tuning).scores,
            ),
        )
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        cohort = self.server.cohort_size
        if self.secagg.name == "masked" and cohort == 1:
            raise ValueError(
                'server.cohort_size = 1 with secagg.name = "masked": the sum of one update is that update; '
                'use a cohort of 2 or more, or secagg.name = "none"'
            )
        if self.secagg.name == "masked" and cohort is not None and self.privacy.unit != "client":
            try:
                self.secagg.requirements().least_survivors(cohort)
            except ConfigError as error:
                raise ValueError(f"server.cohort_size = {cohort}: {str(error).removesuffix('.')}") from error
        if self.privacy.unit == "client" and self.server.weighting == "examples":
            raise ValueError(
                'server.weighting = "examples" with privacy.unit = "client": weights would depend on the protected '
                'client; use weighting = "uniform"'
            )
        check_rule(
            self.server,
            self.client,
            tuning=str(getattr(self.tuning, "name", "")),
            unit=self.privacy.unit,
            masked=self.secagg.name == "masked",
        )
        if self.privacy.is_distributed:
            check_distributed(
                unit=self.privacy.unit,
                relation=self.privacy.neighboring_relation,
                client=self.client,
                server=self.server,
                warm=self.head_warm_start,
                secagg=self.secagg.name,
                compression=str(getattr(self.compression, "name", "")),
            )
        elif self.privacy.unit == "client":
            self._check_mechanism()
        return self

    @model_validator(mode="after")
    def _check_recording(self) -> Self:
        if self.audit.record and self.server.layers:
            raise ConfigError(
                f"audit.record = true with server.layers = {self.server.layers}: what was recorded would be read as if "
                "all clients had trained all tensors; set audit.record = false, or layers = []."
            )
        return self

    @model_validator(mode="after")
    def _check_canaries(self) -> Self:
        audit = self.audit
        if not audit.canaries:
            return self
        check_canaries(audit.canary, audit.canaries, task=self.model.task, unit=self.privacy.unit)
        if CANARIES.get(audit.canary).loss == "model":
            return self
        place = f'audit.canary = "{audit.canary}", whose gradient is given,'
        if self.head_warm_start.name != "none":
            raise ConfigError(
                f'{place} with head_warm_start.name = "{self.head_warm_start.name}": the two phases train different '
                'values; set head_warm_start.name = "none".'
            )
        if RULES.get(self.server.rule).alternates or self.server.layers or self.server.personal or self.server.ranks:
            raise ConfigError(
                f"{place} in a run whose clients do not all train and send every value in every round: set "
                'server.aggregation = "fedavg", and layers, personal and ranks to [].'
            )
        return self

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        most = getattr(self.tuning, "r", None)
        if self.server.ranks and most is not None and max(self.server.ranks) > most:
            raise ConfigError(
                f"server.ranks = {self.server.ranks} with tuning.r = {most}: no client's adapter is larger than the "
                f"server's; set tuning.r = {max(self.server.ranks)}, or lower the ranks."
            )
        return self

    def _check_mechanism(self) -> None:
        name, codec = self.privacy.mechanism_name, str(getattr(self.compression, "name", ""))
        mechanism = MECHANISMS.get(name)
        if mechanism.correlated and RULES.get(self.server.rule).alternates:
            raise ValueError(
                f"privacy.mechanism = {name!r} correlates the noise of one round with the next and "
                f'server.aggregation = {self.server.rule!r} sends other values in each; use "gaussian"'
            )
        if self.server.meter and name != "gaussian":
            raise ValueError(
                f"server.meter = true with privacy.mechanism = {name!r}: the meter reads noise of one size; "
                'use mechanism = "gaussian", or meter = false'
            )
        known = mechanism.codecs
        if known is not None and codec not in known:
            raise ValueError(
                f"compression.name = {codec!r} with privacy.mechanism = {name!r}: the mechanism sends values of its "
                f"own that this codec may cut; use compression.name = {known[0]!r}"
            )
        most = largest_clip(self)
        if most is not None and self.privacy.l2_clip_norm > most:
            own = hasattr(self.compression, "max_value")
            limit = f"compression.max_value = {most:g}" if own else f"the {most:g} that {codec!r} carries in any case"
            move = "raise max_value" if own else "raise inner.max_value, bound max_norm where there is one,"
            raise ValueError(
                f"privacy.l2_clip_norm = {self.privacy.l2_clip_norm:g} is above {limit}: clients with larger values "
                f"would drop out of rounds, which depends on their data; {move} or lower l2_clip_norm"
            )

    def ring_bits(self, clients: int) -> int:
        """Return the ring that masked sums of up to ``clients`` updates are taken in."""
        if self.secagg.ring_bits != "auto":
            return self.secagg.ring_bits
        return CODECS.get(str(getattr(self.compression, "name", None))).ring_bits(self.compression, clients)

    def digest(self) -> str:
        """Return the SHA-256 of the resolved configuration."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved tables; keys without a value are left out, as TOML has no null."""
        return self.model_dump(mode="python", exclude_none=True)

    def to_toml(self) -> str:
        """Return the resolved configuration as TOML."""
        return tomli_w.dumps(self.to_dict())


def largest_clip(config: RunConfig) -> float | None:
    """Return the largest norm of an update of which no value can be beyond the codec's range; None for no limit."""
    return largest_carried(config.compression, masked=config.secagg.name == "masked")
