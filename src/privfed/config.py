"""RunConfig: the whole run as strict, frozen tables; TOML in, TOML out.

Precedence: defaults < file < ``-s key=value``. What cannot hold is refused here, before any data is touched.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator

from privfed.compression import CODECS
from privfed.data import PARTITIONERS, form_of, has_labels
from privfed.data.config import DataConfig
from privfed.data.sharding import no_classes
from privfed.errors import ConfigError, UnknownNameError, nearest, unknown_name
from privfed.models.config import ModelConfig
from privfed.privacy.config import PrivacyConfig
from privfed.privacy.discrete.config import check_distributed
from privfed.privacy.mechanisms import MECHANISMS
from privfed.registry import Registry
from privfed.rules import RULES, check_rule
from privfed.schedule import ClientConfig, HeadWarmStart, ServerConfig
from privfed.secagg.session import Requirements
from privfed.table import Table
from privfed.tuning import TUNINGS


class SecAggConfig(Table):
    """Secure aggregation.

    Attributes:
        name: ``masked``: the server sees only the sum; ``none``: it sees each client's update.
        dropped: Largest share of the cohort that may drop, at any stages, without losing the round.
        corrupt: Largest share of the cohort that may tell the server all they know.
        n_min: Fewest survivors that a client takes part in a sum of; unset: those that ``dropped`` leaves. With
            fewer the round is lost and nothing revealed.
        sigma: Bits of statistical security of the graph; matters for cohorts above 50, whose graph is not complete.
        server: ``malicious``: it may name anyone as dropped; ``curious``: who drops is random, so that large cohorts
            get a sparser graph. The protocol's checks are the same.
        ring_bits: Bits of a value on the wire: 16, 20, 24 or 32, or ``auto`` for what the codec needs.
    """

    name: Literal["masked", "none"] = "masked"
    dropped: float = Field(default=0.3, ge=0, lt=0.5)
    corrupt: float = Field(default=0.1, ge=0, lt=1)
    n_min: int | None = Field(default=None, ge=2)
    sigma: float = Field(default=40.0, ge=20, le=128)
    server: Literal["malicious", "curious"] = "malicious"
    ring_bits: Literal["auto", 16, 20, 24, 32] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _check_replaced(cls, raw: Any) -> Any:
        if isinstance(raw, Mapping) and "threshold" in raw:
            raise ValueError(
                f"secagg.threshold = {raw['threshold']!r} was replaced by secagg.dropped, the share that may drop: "
                "write dropped = 1 - threshold"
            )
        return raw

    @model_validator(mode="after")
    def _check_requirements(self) -> Self:
        try:
            self.requirements()
        except ConfigError as error:
            raise ValueError(str(error).removesuffix(".")) from error
        return self

    def requirements(self) -> Requirements:
        """Return what a session has to stand."""
        return Requirements(
            dropped=self.dropped,
            corrupt=self.corrupt,
            n_min=self.n_min,
            sigma=self.sigma,
            server=self.server,
        )


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
    """Recording for audits; not available yet, so only ``false`` is taken."""

    record: Literal[False] = False


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
    secagg: SecAggConfig = SecAggConfig()
    ledger: LedgerConfig = LedgerConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    audit: AuditConfig = AuditConfig()

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        form_of(self.data, self.model.task)
        if self.model.task != "causal_lm" and self.evaluate.generate:
            raise ConfigError(
                f'evaluate.generate = {self.evaluate.generate} with model.task = "{self.model.task}", which writes no '
                "text: set evaluate.generate = 0."
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
        name = str(getattr(self.compression, "name", ""))
        masked = self.secagg.name == "masked"
        found = CODECS.get(name).declare(self.compression, masked)
        given, instead = f'compression.name = "{name}"', 'use compression.name = "identity" or "stochastic_quantizer"'
        if masked and not found.summable:
            raise ConfigError(f'{given} with secagg.name = "masked": its messages do not add up in a ring; {instead}.')
        missing = {
            "clients that keep a residual": found.stateful,
            "a server that keeps a state": found.server_state,
            "two exchanges a round": found.second_pass,
            "a server that decodes each message": found.needs_individual,
            "choices that are shared anew each round": found.needs_context,
        }
        for what, needed in missing.items():
            if needed:
                raise ConfigError(f"{given} needs {what}, which training does not provide yet; {instead}.")
        if self.privacy.unit == "client" and not (found.linear and found.bounded):
            raise ConfigError(
                f'{given} with privacy.unit = "client": noise needs a bound on what one client changes in the sum, '
                f"and this codec gives none; {instead}."
            )
        if self.server.weighting == "examples" and not found.scales:
            raise ConfigError(
                f'{given} with server.weighting = "examples": its message is the same whatever the weight; set '
                'server.weighting = "uniform".'
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

    def _check_mechanism(self) -> None:
        name, codec = self.privacy.mechanism_name, str(getattr(self.compression, "name", ""))
        mechanism = MECHANISMS.get(name)
        if mechanism.correlated and RULES.get(self.server.aggregation).alternates:
            raise ValueError(
                f"privacy.mechanism = {name!r} correlates the noise of one round with the next and "
                f'server.aggregation = {self.server.aggregation!r} sends other values in each; use "gaussian"'
            )
        known = mechanism.codecs
        if known is not None and codec not in known:
            raise ValueError(
                f"compression.name = {codec!r} with privacy.mechanism = {name!r}: the mechanism sends values of its "
                f"own that this codec may cut; use compression.name = {known[0]!r}"
            )
        most = largest_clip(self)
        if most is not None and self.privacy.l2_clip_norm > most:
            raise ValueError(
                f"privacy.l2_clip_norm = {self.privacy.l2_clip_norm:g} is above compression.max_value = {most:g}: "
                "clients with larger values would drop out of masked rounds, which depends on their data; raise "
                "max_value or lower l2_clip_norm"
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


MECHANISM = "privacy.mechanism"


def largest_clip(config: RunConfig) -> float | None:
    """Return the largest norm of an update of which no value can be beyond the codec's range; None for no limit."""
    fails_beyond = config.secagg.name == "masked" and getattr(config.compression, "name", "") == "identity"
    return float(getattr(config.compression, "max_value", math.inf)) if fails_beyond else None


TAGGED = ("partition", "tuning", "compression", "head_warm_start", "secagg", MECHANISM)


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a TOML file or a preset, with overrides applied.

    Args:
        source: A path, or the name of a shipped preset. A path that exists wins.
        overrides: ``key=value`` pairs; the value is TOML, or a bare string.

    Raises:
        ConfigError: If the file cannot be read, a key is unknown, or a value cannot hold.
    """
    return parse_config(_overridden(source, overrides), where=source)


def load_budget_config(source: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, bool]:
    """Return a configuration that may give both an epsilon and a noise multiplier, and whether it does.

    A run takes one of the two; a question about the rounds that a budget affords takes both.

    Raises:
        ConfigError: As :func:`load_config`.
    """
    raw = _overridden(source, overrides)
    privacy = raw.get("privacy", {})
    if not isinstance(privacy, dict) or not {"target_epsilon", "noise_multiplier"} <= privacy.keys():
        return parse_config(raw, where=source), False
    target = privacy.pop("target_epsilon")
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 < target < math.inf:
        raise ConfigError(f"{source}: privacy.target_epsilon is {target!r}, expected a finite number above 0.")
    found = parse_config(raw, where=source)
    privacy_table = found.privacy.model_copy(update={"target_epsilon": float(target)})
    return found.model_copy(update={"privacy": privacy_table}), True


def parse_config(raw: Mapping[str, Any], *, where: str) -> RunConfig:
    """Return the configuration of parsed TOML.

    Raises:
        ConfigError: One sentence for each problem found.
    """
    try:
        return RunConfig.model_validate(dict(raw))
    except ValidationError as error:
        raise ConfigError(f"{where}: " + " ".join(_sentences(error, raw))) from error


def presets() -> dict[str, str]:
    """Return the shipped presets: name to TOML text."""
    folder = importlib.resources.files("privfed") / "presets"
    files = [f for f in folder.iterdir() if f.name.endswith(".toml")]
    return {f.name.removesuffix(".toml"): f.read_text(encoding="utf-8") for f in sorted(files, key=lambda f: f.name)}


def differences(left: RunConfig, right: RunConfig) -> list[str]:
    """Return one line ``key: left -> right`` for each value that differs."""
    a, b = _flat(left.to_dict()), _flat(right.to_dict())
    keys = sorted(a.keys() | b.keys())
    return [f"{k}: {a.get(k, 'unset')!r} -> {b.get(k, 'unset')!r}" for k in keys if a.get(k) != b.get(k)]


def _read(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    elif "." in source or "/" in source:
        raise ConfigError(
            f"There is no file {source!r}: pass a TOML file or one of the presets {', '.join(presets())}."
        )
    elif source not in presets():
        raise unknown_name("preset", source, presets())
    else:
        text = presets()[source]
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}.") from error


def _overridden(source: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the tables of ``source`` with overrides applied; a ``name`` first, since it may reset its table."""
    raw = _read(source)
    names = [*(f"{table}.name" for table in TAGGED), MECHANISM]
    for override in sorted(overrides, key=lambda text: text.partition("=")[0].strip() not in names):
        apply_override(raw, override)
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set in ``raw`` what ``key=value`` says; the value is TOML, or a bare string.

    Raises:
        ConfigError: If it has no key, or the key runs through a value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"-s {override}: expected key=value, such as -s tuning.r=16.")
    *tables, last = key.strip().split(".")
    table = raw
    for name in tables:
        table = table.setdefault(name, {})
        if isinstance(table, str) and key.strip().startswith(f"{MECHANISM}."):
            table = raw["privacy"]["mechanism"] = {"name": table}  # a name alone is short for its table
        if not isinstance(table, dict):
            raise ConfigError(f"-s {override}: {name!r} is a value, not a table.")
    value = _value(text.strip())
    if last == "name" and ".".join(tables) in TAGGED and _name(table, ".".join(tables)) != value:
        table.clear()  # another plug-in: its options start from its own defaults
    if tables == ["data"] and last in ("name", "path"):
        table.pop("path" if last == "name" else "name", None)  # one replaces the other
    if value is None:
        table.pop(last, None)
    else:
        table[last] = value


def _value(text: str) -> Any:
    """Return the TOML value of ``text``; a bare word is a string (so ``none`` is a name), ``unset`` removes the key."""
    if text == "unset":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _sentences(error: ValidationError, raw: Mapping[str, Any]) -> list[str]:
    found = []
    for problem in error.errors():
        place = [str(part) for part in problem["loc"]]
        key = ".".join(place)
        if problem["type"] == "extra_forbidden":
            known = _known_keys(place[:-1], raw)
            hint = nearest(place[-1], known) or " Known: " + ", ".join(known) + "."
            found.append(f"Unknown key {key!r}.{hint}")
        elif problem["type"] == "value_error":
            found.append(f"{key}: {problem['ctx']['error']}." if key else f"{problem['ctx']['error']}.")
        elif problem["type"] == "model_type":
            found.append(f"{key} = {problem['input']!r}: expected a table of keys, [{key}].")
        else:
            found.append(f"{key} = {problem['input']!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}.")
    return found


def _known_keys(place: Sequence[str], raw: Mapping[str, Any]) -> list[str]:
    model: Any = RunConfig
    registries: dict[str, Registry[Any]] = {
        "partition": PARTITIONERS,
        "tuning": TUNINGS,
        "compression": CODECS,
        "mechanism": MECHANISMS,
    }
    for depth, name in enumerate(place):
        section = raw.get(name, {}) if isinstance(raw, Mapping) else {}
        raw = section
        if name in registries and isinstance(section, Mapping):
            model = registries[name].get(_name(section, ".".join(place[: depth + 1]))).config
        else:
            field = model.model_fields.get(name)
            model = field.annotation if field else None
        if not hasattr(model, "model_fields"):
            return []
    return list(model.model_fields)


def _name(table: Mapping[str, Any], place: str) -> str:
    """Return the ``name`` that a table picks, by default where it does not say."""
    model: Any = PrivacyConfig if place == MECHANISM else RunConfig
    default = model.model_fields[place.rpartition(".")[2]].get_default(call_default_factory=True)
    return str(table.get("name", getattr(default, "name", "")))


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


__all__ = ["RunConfig", "UnknownNameError", "differences", "load_config", "parse_config", "presets"]
