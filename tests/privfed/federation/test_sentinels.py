"""Sentinels: a sound model passes, and each planted fault is caught by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from privfed.errors import ModelError, SentinelError
from privfed.federation.sentinels import (
    Moves,
    check_frozen,
    check_gradients,
    check_moved,
    frozen_digests,
    probe_examples,
)
from privfed.models.examples import Examples, FeatureExamples
from privfed.privacy.per_example import PerExampleModel
from privfed.privacy.per_example.sites import EmbeddingSite
from privfed.tuning.layout import layout_of, read_flat
from privfed.types import ParamLayout

WIDTH, CLASSES = 6, 3
FEATURES = FeatureExamples(torch.zeros(4, WIDTH), torch.zeros(4, dtype=torch.int64))


def _probe() -> Examples:
    return probe_examples(FEATURES, CLASSES)


class Net(nn.Module):
    """Two layers; ``between`` is where a fault goes."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.first, self.last = nn.Linear(WIDTH, 5), nn.Linear(5, CLASSES)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        return self.last(self.between(hidden) if self.between else hidden)


class Unused(Net):
    """Has a trained tensor that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


@pytest.mark.parametrize("private", [True, False])
def test_a_sound_module_passes_and_is_left_as_it_was(private: bool) -> None:
    module = Net()
    before = read_flat(module).tobytes()
    sentence, vanishing = check_gradients(module, _probe(), private=private)
    assert sentence.startswith("4 trained tensors")
    assert vanishing == frozenset()
    assert read_flat(module).tobytes() == before
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("tuning", ["lora", "ffa_lora", "bitfit", "full"])
def test_the_tunings_of_a_real_transformer_pass(tuning: str, federation: Callable[..., Any]) -> None:
    run = federation(tuning={"name": tuning})
    module = run.bench.tuned.model
    probe = probe_examples(run.bench.train, CLASSES)
    before = read_flat(module).tobytes()
    sentence, vanishing = check_gradients(module, probe, private=True)
    assert sentence.startswith(f"{len(layout_of(module).names)} trained tensors: per-example gradients equal")
    assert read_flat(module).tobytes() == before
    # the attention's key biases shift every score alike, which softmax ignores
    assert all(name.endswith("key.bias") for name in vanishing)
    assert bool(vanishing) == (tuning in ("bitfit", "full"))


@pytest.mark.parametrize("private", [True, False])
def test_a_tensor_without_a_gradient_is_named(private: bool) -> None:
    module = Unused()
    before = read_flat(module).tobytes()
    with pytest.raises(SentinelError, match=r"spare\.weight has no gradient"):
        check_gradients(module, _probe(), private=private)
    assert read_flat(module).tobytes() == before


@pytest.mark.parametrize(
    "couple",
    [
        lambda h: h - h.mean(dim=0),
        lambda h: h + 0.01 * h.mean(dim=0),
        lambda h: h / (1e-3 + h.std(dim=0, unbiased=False)) if len(h) > 1 else h,
        lambda h: h + 0.01 * h.flip(0),
        lambda h: h.detach() if len(h) > 1 else h,
        lambda h: h * len(h),
    ],
)
def test_examples_that_touch_each_other_are_caught(couple: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module = Net(couple)
    with pytest.raises(ModelError, match="mixes the examples of a batch"):
        check_gradients(module, _probe(), private=True)
    check_gradients(module, _probe(), private=False)


@pytest.mark.parametrize("chance", [nn.Dropout(0.5), lambda h: h + 1e-3 * torch.randn_like(h)])
def test_chance_is_caught(chance: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(ModelError, match="draws random numbers"):
        check_gradients(Net(chance), _probe(), private=True)


def test_a_wrong_gradient_is_named_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = PerExampleModel.gradients

    def wrong(self: PerExampleModel, *args: Any) -> list[torch.Tensor]:
        found = gradients(self, *args)
        found[2] = found[2] * 1.001
        return found

    monkeypatch.setattr(PerExampleModel, "gradients", wrong)
    with pytest.raises(SentinelError, match=r"gradient of last\.weight differs .* by 0\.001"):
        check_gradients(Net(), _probe(), private=True)


def test_swapped_examples_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = PerExampleModel.gradients
    monkeypatch.setattr(PerExampleModel, "gradients", lambda *args: [g.flip(0) for g in gradients(*args)])
    with pytest.raises(SentinelError, match=r"gradient of first\.weight"):
        check_gradients(Net(), _probe(), private=True)


def test_a_position_table_looked_up_once_for_the_batch_is_not_taken_for_one_example(
    federation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the expansion the engine falls back to larger parts of the model."""
    run = federation(tuning={"name": "full"})
    probe = probe_examples(run.bench.train, CLASSES)
    assert "closed form embedding" in check_gradients(run.bench.tuned.model, probe, private=True)[0]
    monkeypatch.setattr(EmbeddingSite, "_expand", lambda *args: None)
    sentence, _ = check_gradients(run.bench.tuned.model, probe, private=True)
    assert "unit-vmap" in sentence
    assert "embedding" not in sentence


def test_a_clipped_sum_of_something_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PerExampleModel.clipped_sum
    monkeypatch.setattr(PerExampleModel, "clipped_sum", lambda self, *args: right(self, *args[:-1], args[-1] * 1.01))
    with pytest.raises(SentinelError, match=r"clipped sum differs by 0\.0"):
        check_gradients(Net(), _probe(), private=True)


def test_a_layer_that_mixes_examples_by_design_is_refused() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES))
    with pytest.raises(ModelError, match="Per-example gradients are not available"):
        PerExampleModel(module)


def test_the_probe_is_made_up_and_reaches_every_length(tiny_bert: Path) -> None:
    from transformers import AutoTokenizer

    from privfed.models.examples import TextExamples

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    texts = TextExamples(["a client's secret"], np.zeros(1, dtype=np.int64), tokenizer, 24)
    probe = probe_examples(texts, 2)
    assert len(probe) == 3
    assert len(set(probe.lengths.tolist())) == 3


# after training


def test_frozen_weights_that_stay_pass_and_one_that_moves_is_named() -> None:
    module = Net()
    module.first.requires_grad_(False)
    module.register_buffer("scale", torch.ones(2))
    before = frozen_digests(module)
    assert set(before) == {"first.weight", "first.bias", "scale"}
    with torch.no_grad():
        module.last.weight += 1  # trained: free to move
    assert check_frozen(before, frozen_digests(module)).startswith("frozen weights unchanged (SHA-256 ")
    with torch.no_grad():
        module.first.bias[0] += 1e-7
    with pytest.raises(SentinelError, match=r"changed first\.bias, which"):
        check_frozen(before, frozen_digests(module))


def test_a_changed_buffer_is_named() -> None:
    module = Net()
    module.register_buffer("scale", torch.ones(2))
    before = frozen_digests(module)
    module.scale[1] = 2
    with pytest.raises(SentinelError, match="changed scale"):
        check_frozen(before, frozen_digests(module))


def moved_in(layout: ParamLayout, start: np.ndarray, *rounds: np.ndarray) -> frozenset[str]:
    moves = Moves(layout, start)
    for params in rounds:
        moves.saw(params)
    return moves.names


def test_a_tensor_that_stood_still_is_named() -> None:
    module = Net()
    layout, start = layout_of(module), read_flat(module)
    moved = start + np.float32(1e-3)
    everything = moved_in(layout, start, moved)
    assert check_moved(layout, everything, frozenset()) == "all 4 trained tensors with a gradient moved"
    end = moved.copy()
    end[30:35] = start[30:35]  # first.bias, after 30 weights
    but_one = moved_in(layout, start, end, end + np.float32(1e-3) * (end != start), end)
    with pytest.raises(SentinelError, match=r"did not move first\.bias:"):
        check_moved(layout, but_one, frozenset())
    assert check_moved(layout, but_one, frozenset({"first.bias"})).startswith("all 3 ")
    with pytest.raises(SentinelError, match=r"first\.weight, first\.bias, last\.weight, last\.bias"):
        check_moved(layout, moved_in(layout, start, start, start), frozenset())


def test_a_tensor_that_came_back_to_its_start_has_moved() -> None:
    """As a bias of two classes does that takes steps of one size: start and end alone would say that it stood still."""
    module = Net()
    layout, start = layout_of(module), read_flat(module)
    there = start.copy()
    there[30:35] += np.float32(0.25)
    assert moved_in(layout, start, there, start) == {"first.bias"}
    assert moved_in(layout, start, start, there, start) == {"first.bias"}
    assert moved_in(layout, start, start, start) == frozenset()


def test_where_a_codec_leaves_values_out_one_moved_tensor_will_do() -> None:
    module = Net()
    layout, start = layout_of(module), read_flat(module)
    end = start.copy()
    end[30:35] += np.float32(1e-3)
    one = moved_in(layout, start, end)
    sentence = check_moved(layout, one, frozenset(), dense=False)
    assert sentence == "1 of 4 trained tensors with a gradient moved, as clients send some values only"
    with pytest.raises(SentinelError, match=r"first\.weight, first\.bias"):
        check_moved(layout, frozenset(), frozenset(), dense=False)
    with pytest.raises(SentinelError, match=r"first\.weight, last\.weight"):
        check_moved(layout, one, frozenset())
