"""Read a run folder into one typed value; whatever a run has not written yet is None or empty."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from privfed.errors import ConfigError
from privfed.report.receipt import read_receipt


class _Line(BaseModel):
    """A record of the run folder. Unknown keys are ignored, so that newer runs can still be read."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Client(_Line):
    """One client of the simulated partition."""

    client_id: str
    size: int
    label_counts: tuple[int, ...]


class Partition(_Line):
    """Who holds what; known only because the clients are simulated."""

    label_names: tuple[str, ...]
    clients: tuple[Client, ...]
    partitioner: str = ""
    note: str = ""


class Start(_Line):
    """The line that opens a run."""

    clients: int
    rounds: int
    trained_parameters: int | None = None
    model_parameters: int | None = None
    tuning: str = ""
    planned_epsilon: float | None = None
    train_rows: int | None = None
    test_rows: int | None = None


class Eval(_Line):
    """Scores on the test rows after a round; round 0 is before training."""

    phase: str = "train"
    round: int
    metric: str = "accuracy"
    accuracy: float | None = None
    macro_f1: float | None = None
    matthews: float | None = None
    majority: float | None = None
    perplexity: float | None = None
    token_accuracy: float | None = None
    loss: float | None = None
    n: int | None = None
    clients_metric: str = ""
    clients_mean: float | None = None
    clients_worst_tenth: float | None = None
    clients_scored: int | None = None
    clients_basis: str = ""


class Dropped(_Line):
    """A client that left a round."""

    client_id: str
    reason: str = ""


class Round(_Line):
    """What happened in a round."""

    phase: str = "train"
    round: int
    survivors: int
    cohort: int
    dropped: tuple[Dropped, ...] = ()
    epsilon: float | None = None
    seconds: dict[str, float] = {}
    bytes_up: int = 0
    bytes_up_per_client: int = 0
    bytes_down: int = 0
    update_norm: float | None = None
    saturated: int | None = 0


class LabelScore(_Line):
    """Scores of one class."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


class Sample(_Line):
    """What a language model wrote on a test row, and what stands there."""

    prompt: str
    reference: str
    generated: str


class Finish(_Line):
    """The line that closes a run."""

    seconds: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None
    generation: dict[str, float] = {}
    samples: tuple[Sample, ...] = ()
    per_class: tuple[LabelScore, ...] = ()
    bytes_up: int | None = None
    adapter_sha256: str | None = None


class Inverted(_Line):
    """What an audit read out of the updates that one view shows, beside guesses that saw no update."""

    attack: str
    token_recall: float
    token_precision: float
    rouge_l: float
    prior_token_recall: float
    prior_token_precision: float
    prior_rouge_l: float


class Audit(_Line):
    """The part of ``audit/audit.json`` that a report shows."""

    reconstruction: dict[str, Inverted] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """The lines of ``metrics.jsonl``; where a resumed run wrote a round twice, the later line counts."""

    start: Start | None = None
    evals: tuple[Eval, ...] = ()
    rounds: tuple[Round, ...] = ()
    finish: Finish | None = None
    torn: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """All that a report shows of one run folder."""

    name: str
    config_text: str
    config: dict[str, Any]
    receipt: dict[str, Any] | None
    partition: Partition | None
    metrics: Metrics
    inverted: dict[str, Inverted] = field(default_factory=dict)

    @property
    def table(self) -> dict[str, Any]:
        """The ``[privacy]`` table of the configuration."""
        found = self.config.get("privacy")
        return found if isinstance(found, dict) else {}

    @property
    def unit(self) -> str:
        """What is protected: example, client or none."""
        if self.receipt:
            return str(self.receipt["setting"]["unit"])
        return str(self.table.get("unit", "none"))

    @property
    def reproducible(self) -> bool:
        """Whether the noise can be recomputed by anyone who knows the seed."""
        if self.receipt:
            return self.receipt["mechanism"]["noise_source"] == "reproducible" and self.unit != "none"
        return any(
            value == "reproducible" or ("reproducible" in key and value is True) for key, value in self.table.items()
        )

    @property
    def may_show_epsilon(self) -> bool:
        """Whether an epsilon of this run means anything: private, or private as far as it got."""
        if self.receipt:
            return bool(self.receipt["private"])
        return self.unit != "none" and not self.reproducible


def load_run(folder: Path) -> RunView:
    """Read a run folder, finished or not.

    Raises:
        ConfigError: If it is not a run folder, or one of its files is garbled.
    """
    config_path = folder / "config.toml"
    if not config_path.is_file():
        raise ConfigError(
            f"{folder} is not a run folder: it has no config.toml. Give the folder that 'privfed train' wrote."
        )
    config_text = _read(config_path)
    try:
        config = tomllib.loads(config_text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{config_path} is not valid TOML: {error}.") from error
    receipt_path = folder / "receipt.json"
    return RunView(
        name=folder.resolve().name,
        config_text=config_text,
        config=config,
        receipt=read_receipt(receipt_path) if receipt_path.exists() else None,
        partition=_load_partition(folder / "partition.json"),
        metrics=load_metrics(folder / "metrics.jsonl"),
        inverted=_load_audit(folder / "audit" / "audit.json").reconstruction,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text: {error}.") from error


def _load_audit(path: Path) -> Audit:
    if not path.exists():
        return Audit()
    try:
        values = json.loads(_read(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from error
    return _parse(Audit, values, str(path))


def _load_partition(path: Path) -> Partition | None:
    if not path.exists():
        return None
    try:
        values = json.loads(_read(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from error
    partition = _parse(Partition, values, str(path))
    width = len(partition.label_names)
    if any(len(client.label_counts) != width for client in partition.clients):
        raise ConfigError(f"{path} is garbled: not every client has one count for each of the {width} labels.")
    return partition


def load_metrics(path: Path) -> Metrics:
    """Read ``metrics.jsonl``; a last line that a kill cut short is left out and noted.

    Raises:
        ConfigError: If any other line is not what it should be.
    """
    lines, torn = _read_lines(path)
    start, finish = None, None
    evals: dict[tuple[str, int], Eval] = {}
    rounds: dict[tuple[str, int], Round] = {}
    for number, values in lines:
        where = f"{path}, line {number},"
        match values["kind"]:
            case "start":
                start = _parse(Start, values, where)
            case "eval":
                score = _parse(Eval, values, where)
                evals[score.phase, score.round] = score
            case "round":
                done = _parse(Round, values, where)
                rounds[done.phase, done.round] = done
            case "finish":
                finish = _parse(Finish, values, where)
    return Metrics(
        start=start,
        evals=tuple(sorted(evals.values(), key=_order)),
        rounds=tuple(sorted(rounds.values(), key=_order)),
        finish=finish,
        torn=torn,
    )


def load_rows(path: Path) -> tuple[dict[str, Any], ...]:
    """Return the lines of ``metrics.jsonl`` as they are; of a round that was written twice, the later ones.

    Raises:
        ConfigError: If a line is not what it should be.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for _, values in _read_lines(path)[0]:
        rows[values["kind"], values.get("phase"), values.get("round")] = values
    return tuple(rows.values())


def _read_lines(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], bool]:
    """Return (line number, object) of every line, and whether a kill cut the last one short."""
    if not path.exists():
        return [], False
    text = _read(path)
    lines = text.splitlines()
    found: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number},"
        try:
            values = json.loads(line)
        except ValueError as error:
            if number == len(lines) and not text.endswith("\n"):
                return found, True
            raise ConfigError(f"{where} is not valid JSON: {error}.") from error
        if not isinstance(values, dict) or values.get("kind") is None:
            raise ConfigError(f"{where} has no 'kind': expected an object as 'privfed train' writes it.")
        found.append((number, values))
    return found, False


def _order(line: Eval | Round) -> tuple[bool, int]:
    """Sort by phase, the warm start first, then by round."""
    return line.phase != "warm_start", line.round


M = TypeVar("M", bound=_Line)


def _parse(model: type[M], values: object, where: str) -> M:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the value"
        raise ConfigError(f"{where} is garbled: {field}: {first['msg']}.") from error
