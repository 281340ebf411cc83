"""What is refused from the model's shape alone: before data, weights or a run folder are touched, in the real words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privfed.config import parse_config
from privfed.errors import ConfigError, ModelError, PrivfedError
from privfed.federation.structure import check_structure
from privfed.models.loading import load_model, load_skeleton
from privfed.run import train
from privfed.tuning import TUNINGS, check

LORA = {"name": "lora", "r": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "trainable_tokens": {"token_indices": [5, 9]},
    "select": {"select": ["layers.*", "layer.*"]},
}
NO_DATA = {"path": "there/is/none.csv"}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a target that matches nothing": (
        {"tuning": {**LORA, "target_modules": ["qurey"]}},
        r"'qurey' is the name of none of its layers. Did you mean 'query'\?",
    ),
    "a rank above the layer": ({"tuning": {**LORA, "r": 33}}, r"tuning\.r = 33 is above the smaller side \(32\)"),
    "a block that is not there": (
        {"tuning": {**LORA, "layers_to_transform": [2]}},
        r"layers_to_transform names block 2, and .* has blocks 0 to 1",
    ),
    "a pattern that matches nothing": (
        {"tuning": {"name": "select", "select": "layer.7.*"}},
        r"tuning\.select = 'layer\.7\.\*' matches no parameter",
    ),
    "a personal part that is not there": (
        {"tuning": LORA, "server": {"personal": ["lora_C*"]}},
        r"server\.personal",
    ),
    "nothing left to share": ({"tuning": LORA, "server": {"personal": ["*"]}}, r"leaves no trained tensor to share"),
    "nothing to meter": ({"tuning": {"name": "bitfit"}, "server": {"meter": True}}, r"server\.meter"),
    "nothing to meter, all personal": (
        {"tuning": LORA, "server": {"meter": True, "aggregation": "fedsa_lora"}},
        r"server\.meter",
    ),
    "a meter of correlated noise": (
        {
            "tuning": LORA,
            "server": {"meter": True},
            "secagg": {"name": "none"},
            "privacy": {"unit": "client", "mechanism": "banded", "target_epsilon": 8.0},
        },
        r"server\.meter = true with privacy\.mechanism = 'banded'",
    ),
}


def _config(folder: Path, tables: dict[str, Any]) -> Any:
    return parse_config({"model": {"name": str(folder)}, "data": NO_DATA, **tables}, where="test")


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_the_model_is_one_sentence_before_any_data_is_read(
    name: str, tiny_bert: Path, tmp_path: Path
) -> None:
    tables, sentence = REFUSED[name]
    with pytest.raises((ConfigError, ModelError), match=sentence) as caught:
        train(_config(tiny_bert, tables), out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_fits_gets_as_far_as_the_data(tiny_bert: Path, tmp_path: Path) -> None:
    with pytest.raises(PrivfedError, match=r"none\.csv"):
        train(_config(tiny_bert, {"tuning": LORA}), out=tmp_path / "run")


def test_biases_of_a_model_that_has_none_are_refused_before_the_data(tiny_llama: Path, tmp_path: Path) -> None:
    tables = {"tuning": {"name": "bitfit"}, "model": {"name": str(tiny_llama), "task": "causal_lm"}}
    with pytest.raises(ModelError, match="this model has none"):
        train(_config(tiny_llama, tables), out=tmp_path / "run")


@pytest.mark.parametrize("name", TUNINGS.names())
def test_no_tuning_is_refused_that_the_real_model_takes(name: str, tiny_model: Callable[[str], Path]) -> None:
    encoder = "sequence_classification" in TUNINGS.get(name).tasks
    family, task = ("bert", "sequence_classification") if encoder else ("llama", "causal_lm")
    tuning = {"name": name, **OPTIONS.get(name, {})}
    config = _config(tiny_model(family), {"tuning": tuning, "model": {"name": str(tiny_model(family)), "task": task}})
    try:
        check(config.tuning, task)
    except ConfigError:
        return  # refused by its tables alone
    labels = ("a", "b") if task == "sequence_classification" else ()
    real = load_model(config.model, label_names=labels, seed=0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TUNINGS.get(name).apply(real, config.tuning, 0)
    except PrivfedError as error:
        wanted = str(error)
    else:
        check_structure(config)
        return
    try:
        assert check_structure(config) is False  # only weights can tell
    except PrivfedError as error:
        assert str(error) == wanted


def test_the_skeleton_has_the_models_shapes_and_no_values(tiny_bert: Path) -> None:
    config = _config(tiny_bert, {}).model
    skeleton = dict(load_skeleton(config).model.named_parameters())
    real = dict(load_model(config, label_names=("a", "b"), seed=0).model.named_parameters())
    assert {n: p.shape for n, p in skeleton.items()} == {n: p.shape for n, p in real.items()}
    assert all(p.is_meta for p in skeleton.values())
