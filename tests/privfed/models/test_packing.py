"""Records of a language model in shared sequences: the same losses and gradients as alone, where the model allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from privfed.errors import ConfigError, ModelError
from privfed.models.language import LanguageExamples, TokenSequence, _packs, packs_are_apart

LENGTHS = (9, 3, 5, 12, 4, 7, 2, 6)


@pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
def model(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A tiny decoder and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder: Path = request.getfixturevalue(request.param)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.config.use_cache = False
    return loaded.eval(), tokenizer


def examples_of(tokenizer: Any) -> LanguageExamples:
    """Return sequences of these lengths: some learn all but a prompt, one learns nothing."""
    draw = np.random.default_rng(3)
    sequences = []
    for number, length in enumerate(LENGTHS):
        learned = np.arange(length) >= (1 if number % 2 else length // 2)
        ids = draw.integers(5, len(tokenizer) - 1, length)
        sequences.append(TokenSequence(ids.astype(np.int64), learned & (number != 6)))
    return LanguageExamples(sequences, tokenizer)


@pytest.mark.parametrize("longest", [12, 16, 30, 64])
def test_packed_records_have_the_losses_and_gradients_that_they_have_alone(
    model: tuple[Any, Any], longest: int
) -> None:
    module, tokenizer = model
    examples, rows = examples_of(tokenizer), np.arange(len(LENGTHS))[::-1].copy()
    packed = examples.packed(rows, longest)
    assert packed.inputs["input_ids"].shape[1] <= longest
    assert packed.inputs["input_ids"].shape[0] < len(rows)
    found = []
    for batch in (examples.batch(rows), packed):
        module.zero_grad()
        losses = examples.losses(module, batch)
        (losses * torch.arange(1.0, 9.0)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        found.append((losses.detach(), gradient))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)
    assert float(found[0][0][1]) == 0.0  # the one that learns nothing, second from the end
    assert packs_are_apart(module, examples)


def test_a_model_that_lets_records_see_each_other_is_told_from_one_that_does_not(model: tuple[Any, Any]) -> None:
    module, tokenizer = model
    examples, forward = examples_of(tokenizer), module.forward

    def blind(**inputs: Any) -> Any:
        return forward(input_ids=inputs["input_ids"])  # positions run on, and so does attention

    module.forward = blind
    assert not packs_are_apart(module, examples)
    module.forward = lambda input_ids, attention_mask=None: forward(input_ids=input_ids, attention_mask=attention_mask)
    with pytest.raises(ModelError, match="takes no position_ids"):
        packs_are_apart(module, examples)


def test_packs_hold_every_record_once_and_are_no_longer_than_they_may() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        lengths, longest = draw.integers(1, 40, draw.integers(1, 30)).tolist(), int(draw.integers(5, 80))
        packs = _packs(lengths, longest)
        assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
        assert all(sum(lengths[n] for n in pack) <= max(longest, *lengths) for pack in packs)
        # first fit: no two packs could be one
        sums = sorted(sum(lengths[n] for n in pack) for pack in packs)
        assert len(packs) < 2 or sums[0] + sums[1] > max(longest, *lengths)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"privacy": {"unit": "example", "noise_multiplier": 1.0}}, "packing = true with privacy.unit = .example"),
        ({"model": {"task": "sequence_classification"}, "privacy": {"unit": "none"}}, "packing = true with model.task"),
    ],
)
def test_what_packing_does_not_go_with_is_refused(tables: dict[str, dict[str, Any]], words: str) -> None:
    from privfed.config import parse_config

    model = {"task": "causal_lm", "packing": True, **tables.get("model", {})}
    given = {"data": {"path": "rows.jsonl", "text": "text"}, "model": model, "privacy": tables["privacy"]}
    with pytest.raises(ConfigError, match=words):
        parse_config(given, where="test")
