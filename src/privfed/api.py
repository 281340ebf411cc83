"""privfed from Python: what the command line does, as functions that return a :class:`Run`."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privfed import objects
from privfed.config import RunConfig, parse_config, read_tables, with_overrides
from privfed.errors import ConfigError, ResumeError

if TYPE_CHECKING:
    from privfed.federation.progress import Progress
    from privfed.models.loading import LoadedModel

# keys of a table that an object takes the place of
_REPLACED = {"data": ("name", "path", "test_path", "subset"), "model": ("name", "revision")}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """A run folder, read. It is path-like: whatever takes the folder takes a ``Run``.

    Attributes:
        path: The run folder.
        config: What was run, every default included.
        receipt: The content of ``receipt.json``; None for a run that is not finished.
        metrics: The lines of ``metrics.jsonl`` in order, as ``pandas.DataFrame(run.metrics)`` takes them; where a
            resumed run wrote a round twice, the later line.
    """

    path: Path
    config: RunConfig = field(repr=False)
    receipt: Mapping[str, Any] | None = field(repr=False)
    metrics: tuple[Mapping[str, Any], ...] = field(repr=False)
    _held: tuple[objects.Handed, ...] = field(default=(), repr=False)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end and has a receipt."""
        return self.receipt is not None

    @property
    def adapter(self) -> Path:
        """The folder of what was trained, in peft's format (or transformers', where a whole model is trained)."""
        return self.path / "adapter"

    @property
    def ledger(self) -> Path:
        """The data holder's ledger."""
        return (self.path / "ledger.sqlite").resolve()

    @property
    def epsilon(self) -> float | None:
        """Epsilon against whoever gets the trained model; None for a run that is unfinished or not private."""
        if self.receipt is None:
            return None
        value = self.receipt["views"].get("release", {}).get("epsilon")
        return None if value is None else float(value)

    def load_model(self) -> LoadedModel:
        """Return what was trained, ready for use: ``.model`` in evaluation mode, ``.tokenizer`` or ``.processor``.

        Raises:
            ConfigError: If the run has no result yet.
            ModelError: If its base model is not here.
        """
        from privfed.export import load_trained

        return load_trained(self.path)


def train(
    config: RunConfig | Mapping[str, Any] | str | os.PathLike[str],
    *,
    settings: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    data: Any = None,
    test: Any = None,
    model: Any = None,
    tokenizer: Any = None,
    processor: Any = None,
    ledger: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Fine-tune as ``config`` says; what ``privfed train`` does.

    Args:
        config: A TOML file, the name of a preset, tables as a mapping, or a configuration.
        settings: Overrides such as ``"privacy.target_epsilon=4"``, as ``-s`` takes them.
        out: The run folder, new, or with ``resume`` the one to continue. Default: ``runs/<file or preset>``.
        data: Training rows in place of ``[data] name`` or ``path``: a ``datasets.Dataset``, or a ``DatasetDict`` with
            the split ``train``. With privacy on, say where the ledger is as well.
        test: Test rows beside ``data``, a ``datasets.Dataset``. Default: the split test, validation or dev of
            ``data``, or else rows held out by their content.
        model: A transformers model in place of ``model.name``, with its ``tokenizer`` or ``processor``. It is copied,
            never changed. A classifier's head is new.
        tokenizer: What makes the inputs of ``model`` from texts.
        processor: What makes the inputs of ``model`` from images.
        ledger: The data holder's ledger, where all runs on the same records add up. Default: as ``[ledger]`` says.
        resume: Continue the run in ``out``: the configuration and the objects must be the same.
        progress: Told what happens; silent by default. ``privfed.console.make_progress()`` draws bars.

    Returns:
        The finished run.

    Raises:
        ConfigError: If the configuration cannot hold, or the folder or the objects do not fit it.
        DataError: If the data cannot be used as described.
        ModelError: If the model or tuning cannot be had.
        BudgetExceededError: If the plan or a charge passes the data holder's cap.
        SentinelError: If a self-check fails; nothing more is released then.
    """
    from privfed.federation import folder as folders
    from privfed.federation.follow import following

    raw = _tables(config, settings)
    folder = Path(out) if out is not None else _default_folder(config)
    if resume:
        folders.reopen(folder)
    else:
        folders.check_new(folder)  # before anything that takes long
    if ledger is not None:
        raw["ledger"] = {**raw.get("ledger", {}), "path": os.fspath(ledger)}
    where = os.fspath(config) if isinstance(config, (str, os.PathLike)) else "config"
    found, held = _with_objects(raw, where, data, test, model, tokenizer, processor)
    if data is not None and found.privacy.on and found.ledger.path is None:
        raise ConfigError(
            "data= is an object and has no file for a ledger to lie beside: pass ledger='rows.ledger.sqlite', the same "
            "for every run on these rows, so that what they spend adds up."
        )
    from privfed.run import train as run  # loads torch

    with following(found, folder, progress) as watch:
        result = run(found, out=folder, resume=resume, progress=watch)
    return _read(result.folder, held)


def load_run(
    path: str | os.PathLike[str],
    *,
    data: Any = None,
    test: Any = None,
    model: Any = None,
    tokenizer: Any = None,
    processor: Any = None,
) -> Run:
    """Read a run folder, finished or not.

    Args:
        path: The folder that ``privfed train`` or :func:`train` wrote.
        data: For a run that was trained on objects: the same ``data`` again, where something is to be done with it.
        test: The same ``test`` again.
        model: The same ``model`` again.
        tokenizer: Its tokenizer.
        processor: Its image processor.

    Raises:
        ConfigError: If it is not a run folder, one of its files is garbled, or an object is not the run's.
    """
    run = _read(Path(path), ())
    if data is None and test is None and model is None and tokenizer is None and processor is None:
        return run
    found, held = _with_objects(run.config.to_dict(), str(path), data, test, model, tokenizer, processor)
    for table in ("data", "model"):
        given, own = getattr(found, table).name, getattr(run.config, table).name
        if given != own:
            raise ResumeError(
                f"{table}= is {objects.short(given)}, and the run in {path} has {table}.name = "
                f"{objects.short(own or '')!r}: pass the object that it was trained with, rows in the same order."
            )
    return Run(path=run.path, config=run.config, receipt=run.receipt, metrics=run.metrics, _held=held)


def _tables(config: RunConfig | Mapping[str, Any] | str | os.PathLike[str], settings: Sequence[str]) -> dict[str, Any]:
    """Return a configuration of any form as tables, with overrides applied; nothing is checked yet."""
    if isinstance(config, (str, os.PathLike)):
        return read_tables(os.fspath(config), settings)
    if not isinstance(config, (RunConfig, Mapping)):
        raise ConfigError(
            f"config is a {type(config).__name__}, expected a file, the name of a preset, a mapping of tables or a "
            "RunConfig."
        )
    raw = config.to_dict() if isinstance(config, RunConfig) else copy.deepcopy(dict(config))
    return with_overrides(raw, settings)


def _default_folder(config: object) -> Path:
    if isinstance(config, (str, os.PathLike)):
        return Path("runs") / Path(config).name.removesuffix(".toml")
    raise ConfigError("out is not given, and the configuration has no name to make it from: pass out='runs/mine'.")


def _with_objects(
    raw: dict[str, Any], where: str, data: Any, test: Any, model: Any, tokenizer: Any, processor: Any
) -> tuple[RunConfig, tuple[objects.Handed, ...]]:
    """Take objects over; return the configuration that names them, and what keeps them findable."""
    if test is not None and data is None:
        raise ConfigError("test= is given without data=: pass the training rows as data= too, or set [data] test_path.")
    if model is None and (tokenizer is not None or processor is not None):
        raise ConfigError("tokenizer= or processor= is given without model=: pass both, or set model.name for both.")
    for table, given in (("data", data), ("model", model)):
        if given is not None and isinstance(raw.setdefault(table, {}), dict):
            raw[table] = {key: value for key, value in raw[table].items() if key not in _REPLACED[table]}
            raw[table]["name"] = objects.PREFIX  # until its content is known
    config = parse_config(raw, where=where)
    task, held = config.model.task, []
    if data is not None:
        from privfed.data.objects import hand_over as take_data

        held.append(take_data(data, test, config.data, task))
        raw["data"]["name"] = held[-1].name
    if model is not None:
        from privfed.models.objects import hand_over as take_model

        held.append(take_model(model, processor if task == "image_classification" else tokenizer, task))
        raw["model"]["name"] = held[-1].name
    return parse_config(raw, where=where) if held else config, tuple(held)


def _read(folder: Path, held: tuple[objects.Handed, ...]) -> Run:
    from privfed.report.load import load_rows
    from privfed.report.load import load_run as load_view

    view = load_view(folder)
    return Run(
        path=folder,
        config=parse_config(view.config, where=str(folder / "config.toml")),
        receipt=view.receipt,
        metrics=load_rows(folder / "metrics.jsonl"),
        _held=held,
    )
