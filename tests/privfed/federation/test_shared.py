"""Work that runs share: the same bits with it and without, and nothing mixed up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from privfed.federation.shared import NOTHING, SharedWork
from privfed.run import train

LAST = {"name": "lora", "r": 2, "layers_to_transform": [1]}
# steps that move every tensor of so small a model, without noise to help
NO_PRIVACY = {"unit": "none", "target_epsilon": None}
ADAM = {"optimizer": "adamw", "learning_rate": 0.01}
WARM = {"name": "dp_probe", "rounds": 1, "noise_scale": 2.0}


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "adapter").glob("*.safetensors"))]


def test_runs_that_share_give_the_same_bits(tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    configs = {
        "lora": tiny_config(tuning=LAST, head_warm_start=WARM),
        "ffa": tiny_config(tuning={**LAST, "name": "ffa_lora"}, head_warm_start=WARM),
        "head": tiny_config(tuning={"name": "head"}),
        "none": tiny_config(tuning=LAST, head_warm_start=WARM, privacy=NO_PRIVACY, client=ADAM),
        "other seed": tiny_config(tuning=LAST, head_warm_start=WARM, seed=4),
    }
    shared = SharedWork(tmp_path / "shared")
    for name, config in configs.items():
        alone = train(config, out=tmp_path / f"{name} alone")
        together = train(config, out=tmp_path / f"{name} together", shared=shared)
        assert weights(alone.folder) == weights(together.folder), name
        assert alone.receipt["utility"] == together.receipt["utility"], name
    # one data set, one pair of splits and one of frozen states, whatever is tuned and drawn
    assert shared.made["data"] == 1 and shared.made["examples"] == 2 and shared.made["states"] == 2
    assert shared.found["data"] == 4 and shared.found["states"] == 6
    # another process, or the same grid resumed, finds what took long in the folder
    later = SharedWork(tmp_path / "shared")
    again = train(configs["lora"], out=tmp_path / "later", shared=later)
    assert "states" not in later.made and "features" not in later.made and later.found["states"] == 2
    assert weights(again.folder) == weights(tmp_path / "lora alone")


def test_states_are_named_by_what_they_are_computed_from(tiny_config: Callable[..., Any]) -> None:
    from privfed.federation import material, workbench
    from privfed.federation.progress import Silent

    config = tiny_config(tuning=LAST)
    shared = SharedWork()
    bench = workbench.build(config, material.gather(config, shared), Silent(), shared)
    prefix, model = bench.train._prefix, bench.tuned.model
    assert prefix is not None and shared.made["states"] == 2

    def asked() -> int:
        shared.states(prefix, model, bench.train, bench.tuned.head)
        return shared.made["states"]

    assert asked() == 2
    with torch.no_grad():
        model.get_submodule(bench.tuned.head).modules_to_save["default"].weight.add_(1.0)
        trained = next(p for n, p in model.named_parameters() if "layer.1" in n and p.requires_grad)
        trained.add_(1.0)
    assert asked() == 2  # neither the head nor a later block is read by the frozen ones
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "word_embeddings" in n)[7].add_(0.5)
    assert asked() == 3
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layer.0" in n).add_(0.5)
    assert asked() == 4


def test_only_so_much_is_kept_and_nothing_kept_is_handed_out_to_be_changed(tiny_config: Callable[..., Any]) -> None:
    shared = SharedWork(keep=2)
    for key in ("a", "b", "a", "c", "a", "b"):
        assert shared.once("kind", lambda key=key: key, lambda key=key: key.upper()) == key.upper()  # type: ignore[misc]
    assert shared.made == {"kind": 4} and shared.found == {"kind": 2}
    config = tiny_config()
    first = shared.model(config.model, ("x", "y", "z"), 1)
    with torch.no_grad():
        next(first.model.parameters()).zero_()
    second = shared.model(config.model, ("x", "y", "z"), 1)
    assert shared.made["model"] == 1 and float(next(second.model.parameters()).detach().abs().sum()) > 0


def test_a_file_that_a_kill_cut_short_is_computed_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def make() -> list[torch.Tensor]:
        calls.append(1)
        return [torch.arange(3)]

    for _ in range(2):
        SharedWork(tmp_path).once("states", lambda: "key", make, durable=True)
    assert len(calls) == 1
    (path,) = tmp_path.glob("states-*.pt")
    path.write_bytes(path.read_bytes()[:40])
    found = SharedWork(tmp_path).once("states", lambda: "key", make, durable=True)
    assert len(calls) == 2 and torch.equal(found[0], torch.arange(3))


@pytest.mark.parametrize("change", ["data", "model"])
def test_other_data_and_another_model_are_not_taken(
    tiny_config: Callable[..., Any], text_csv: Path, change: str, tmp_path: Path
) -> None:
    copied = tmp_path / "rows.csv"
    copied.write_text(text_csv.read_text())
    shared = SharedWork()
    config = tiny_config(data={"path": str(copied)})
    before = shared.dataset(config)
    if change == "data":
        copied.write_text(text_csv.read_text().replace("cat", "dog"))
        assert shared.dataset(config).digest != before.digest and shared.made["data"] == 2
    else:
        short = config.model.model_copy(update={"max_length": 5})
        loaded = shared.model(config.model, before.label_names, 0)
        long = shared.examples(before.train, before.kind, loaded, config.model)
        assert shared.examples(before.train, before.kind, loaded, short).lengths.max() == 5 < long.lengths.max()


def test_nothing_keeps_nothing() -> None:
    assert not NOTHING.on
    assert [NOTHING.once("kind", lambda: "key", object) is NOTHING.once("kind", lambda: "key", object)] == [False]
    assert NOTHING.made == {}
