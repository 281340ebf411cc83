"""Runs the combinations that the matrix allows: two rounds of a tiny model, of one tuning of each class.

The matrix is asked, so what a new plug-in allows is run as well. The model, its tuning and the data are made once and
shared; rounds, clients, noise, codecs and secure aggregation are the real ones. What a client trains in a first round
is the same in most cells, from the same values, batch and noise: it is trained once and remembered. That every tuning
of a class trains is what the contract tests of tunings are for. The tuning of a mask's scores is a class of its own for
one codec's sake; with the other codecs it runs under plain averaging only. Two test files share the cells, so that two
processes can.

Shape suffix: D trained values.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.combinations import AXES, Cell, Matrix
from privfed.tuning import TUNINGS

MATRIX = functools.cache(Matrix)
MASKS = "bernoulli_mask"
MEMORY = Path("/dev/shm")  # where there is one, a ledger there waits for no disk
CODECS = [choice.label for choice in MATRIX().axes["codec"]]


class Bench:
    """What cells share: the data, and a model for each tuning that goes back to its start before each cell."""

    def __init__(self, tiny_bert: Path, text_csv: Path) -> None:
        self.fixed: dict[str, dict[str, Any]] = {
            "model": {"name": str(tiny_bert), "max_length": 12},
            "data": {"path": str(text_csv), "limit": 60},
        }
        self._material: Any = None
        self._made: dict[str, Any] = {}
        self._plans: dict[Any, Any] = {}
        self.trained: dict[Any, Any] = {}

    def config(self, tables: Mapping[str, Mapping[str, Any]]) -> Any:
        from privfed.config import parse_config

        raw: dict[str, Any] = {**tables, "data": {}}
        raw |= {name: {**raw.get(name, {}), **table} for name, table in self.fixed.items()}
        # the cheaper accountant, and the few examples that a step sees
        raw["privacy"] = {"accountant": "rdp", **raw["privacy"]}
        raw["client"] = {**raw["client"], "sampling_probability": 0.3, "learning_rate": 0.1}
        return parse_config(raw, where="cell")

    def material(self, config: Any) -> Any:
        from privfed.federation import material as materials

        self._material = self._material or materials.gather(config)
        return self._material

    def tuned(self, tuning: str, config: Any) -> Any:
        from privfed.federation import workbench
        from privfed.federation.progress import Silent

        if tuning not in self._made:
            bench = workbench.build(config, self.material(config), Silent())
            start = {name: value.clone() for name, value in bench.tuned.model.state_dict().items()}
            trained = {name for name, value in bench.tuned.model.named_parameters() if value.requires_grad}
            self._made[tuning] = (bench, start, trained)
        bench, start, trained = self._made[tuning]
        bench.tuned.model.load_state_dict(start)
        for name, value in bench.tuned.model.named_parameters():
            value.requires_grad_(name in trained)
        return bench

    def plan(self, cell: Cell, config: Any, bench: Any) -> Any:
        from privfed.federation import material as materials
        from privfed.federation import workbench

        key = (cell[0], cell[2], cell[4])
        if key not in self._plans:
            lengths = workbench.trained_lengths(config, bench.tuned) if config.privacy.is_distributed else None
            self._plans[key] = materials.plan_privacy(config, self.material(config), lengths)
        return self._plans[key]


def remembering(known: dict[Any, Any], tuning: str) -> Any:
    """Return a class of trainers that train each client once from the same values, batches and noise.

    Local training is a function of its arguments: 32 bytes of the client's stream say whether it is the same stream.
    """
    from privfed.federation.local import LocalTrainer

    class Remembering(LocalTrainer):
        def run(self, params_D: Any, shard: Any, stream: Any, on_step: Any, work: Any = None) -> Any:
            asked = hashlib.sha256(params_D.tobytes() + stream.bytes(32))
            for part in (work.frozen, {"": work.correction_D}, work.support) if work else ():
                for name, value in sorted(part.items()):
                    asked.update(name.encode() + (b"" if value is None else value.tobytes()))
            active = work.active if work else None
            key = (tuning, self.dp, shard.client_id, active, asked.hexdigest())
            if key not in known:
                known[key] = super().run(params_D, shard, stream, on_step, work)
            return known[key].copy()

    return Remembering


def run_cell(cell: Cell, number: int, bench: Bench, ledger: Any, folder: Path) -> list[str]:
    """Run two rounds of a cell and return what is wrong with them."""
    from privfed.federation import setup
    from privfed.federation.client import Holder
    from privfed.federation.engines.in_process import start_of
    from privfed.federation.progress import Silent
    from privfed.federation.round import run_round

    config = bench.config(MATRIX().tables(cell))
    material, tuned = bench.material(config), bench.tuned(cell[0], config)
    holder = Holder(
        ledger=ledger,
        key=bytes(32),
        run_id="cell",
        ledger_run_id=f"cell{number}",
        data_digest=material.dataset.digest,
        partition_digest=material.partition_digest,
        project="default",
    )
    plan = bench.plan(cell, config, tuned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "LocalTrainer", remembering(bench.trained, cell[0]))
        stage = setup.make_stages(config, material, tuned, plan, holder, Silent(), folder / str(number))["train"]
    try:
        state = start = start_of(stage)
        wrong = []
        for _ in range(2):
            state, report = run_round(state, stage.phase, holder, Silent())
            if report.lost or report.dropped or not report.survivors:
                wrong.append(f"round {report.round}: {report.lost or report.dropped or 'nobody came'}")
            if not 0 < report.update_norm < np.inf:
                wrong.append(f"round {report.round}: the update's norm is {report.update_norm}")
        moved = [name for name, value in state.carried.items() if not np.array_equal(value, start.carried[name])]
        if not moved and np.array_equal(state.params_D, start.params_D):
            wrong.append("nothing moved")
        return wrong
    finally:
        stage.trainer.close()


def smaller(base: Path, folder: Path) -> Path:
    """Save the model in ``base`` with a single block to ``folder``; nothing here depends on its depth."""
    import torch
    from transformers import BertConfig, BertModel

    shutil.copytree(base, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        BertModel(BertConfig.from_pretrained(base, num_hidden_layers=1)).save_pretrained(folder)
    return folder


def failures(codec: str, secagg: str, bench: Bench, folder: Path) -> list[str]:
    """Run every allowed combination of a codec with or without masking; return what went wrong."""
    from privfed.privacy.ledger import Ledger

    matrix, found = MATRIX(), []
    mine = [
        cell
        for cell in matrix.cells()
        if cell[1] == codec
        and cell[4] == secagg
        and cell not in matrix.refused
        and (cell[3] == "fedavg" or codec == MASKS or not TUNINGS.get(cell[0]).scores)
    ]
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else folder))
        ledger = stack.enter_context(Ledger.open(Path(place) / "ledger.sqlite"))
        for number, cell in enumerate(mine):
            try:
                wrong = run_cell(cell, number, bench, ledger, folder)
            except Exception as error:  # noqa: BLE001  (all cells are to be heard)
                wrong = [f"{type(error).__name__}: {error}"]
            found += [f"{dict(zip(AXES, cell, strict=True))}: {each}" for each in wrong]
    return found
