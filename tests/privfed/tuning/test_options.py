"""Options of a tuning: passed through by peft's names, kept by the configuration, refused in one sentence."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import tomllib

import pytest
from click.testing import CliRunner
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig

from privfed.cli import main
from privfed.config import differences, parse_config
from privfed.errors import ConfigError
from privfed.federation.material import check_before_data
from privfed.tuning import TUNINGS, check
from privfed.tuning.lora_options import NOT_OFFERED, LoraOptions


def parsed(**tuning):
    return parse_config({"tuning": tuning}, where="test")


def refusal(**tuning):
    """Return the sentence with which a table is refused, without a model and without data."""
    with pytest.raises(ConfigError) as caught:
        found = parsed(**tuning)
        check(found.tuning, found.model.task)
    text = str(caught.value)
    assert "\n" not in text and text.endswith((".", "?"))
    return text


def test_extra_keys_survive_toml_digest_and_diff():
    one = parsed(name="vera", r=16, target_modules=["query", "key"], d_initial=0.2)
    again = parse_config(tomllib.loads(one.to_toml()), where="again")
    assert again == one and again.digest() == one.digest()
    assert again.tuning.options() == {"r": 16, "target_modules": ["query", "key"], "d_initial": 0.2}
    other = parsed(name="vera", r=8, target_modules=["query", "key"], d_initial=0.2)
    assert differences(one, other) == ["tuning.r: 16 -> 8"]
    assert other.digest() != one.digest()
    nested = parsed(name="loha", rank_pattern={"query": 4})
    assert tomllib.loads(nested.to_toml())["tuning"] == {"name": "loha", "rank_pattern": {"query": 4}}


def test_a_configuration_loads_without_peft():
    script = (
        "import sys; from privfed.config import parse_config\n"
        "parse_config({'tuning': {'name': 'ia3', 'target_modules': ['value']}}, where='x').to_toml()\n"
        "parse_config({'tuning': {'name': 'dora', 'r': 4}}, where='x').to_toml()\n"
        "assert not {'peft', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize(
    ("tuning", "parts"),
    [
        ({"name": "ia3", "target_module": ["a"]}, ["Unknown key 'tuning.target_module'", "'target_modules'"]),
        ({"name": "vera", "zzzz": 1}, ["Unknown key 'tuning.zzzz'", "Known: bias, d_initial"]),
        ({"name": "vera", "r": "16"}, ["tuning.r = '16'", "integer"]),
        ({"name": "vera", "r": True}, ["tuning.r = True", "integer"]),
        ({"name": "vera", "target_modules": 3}, ["tuning.target_modules = 3"]),
        ({"name": "oft", "r": 4, "oft_block_size": 8}, ['tuning.name = "oft" cannot have these options']),
        ({"name": "vera", "vera_dropout": 0.1}, ["tuning.vera_dropout = 0.1", "only 0 is taken"]),
        ({"name": "loha", "module_dropout": 0.5}, ["only 0 is taken", "leave it out"]),
        ({"name": "p_tuning", "encoder_dropout": 0.5}, ["only 0 is taken"]),
        ({"name": "adalora", "total_step": 9}, ["tuning.total_step is not offered", "schedule"]),
        ({"name": "adalora", "eva_config": {}}, ["not offered", "without noise"]),
        ({"name": "multitask_prompt_tuning", "prompt_tuning_init_state_dict_path": "x.pt"}, ["pickle"]),
        ({"name": "prompt_tuning", "token_dim": 4}, ["tuning.token_dim follows from the model"]),
        ({"name": "prompt_tuning", "prompt_tuning_init": "TXT"}, ["tuning.prompt_tuning_init = 'TXT'", "TEXT"]),
        ({"name": "trainable_tokens"}, ["needs tuning.token_indices"]),
        ({"name": "xlora"}, ["trained before"]),
        ({"name": "cpt"}, ['model.task = "sequence_classification"', "causal_lm"]),
        ({"name": "fourierft", "scaling": math.nan}, ["scaling = nan", "finite"]),
        ({"name": "lora", "lora_dropout": 0.1}, ["only 0 is taken"]),
        ({"name": "lora", "eva_config": {}}, ["eva_config is not offered", "without noise"]),
        ({"name": "lora", "init_lora_weights": "eva"}, ["'eva'", "gaussian"]),
        ({"name": "lora", "init_lora_weights": False}, ["leave it out"]),
        ({"name": "lora", "use_dora": True, "init_lora_weights": "pissa"}, ["use_dora", "leave one of them out"]),
        ({"name": "lora", "init_lora_weights": "olora", "rank_pattern": {"a": 2}}, ["rank_pattern"]),
        ({"name": "lora", "lora_bias": True, "bias": "all"}, ["lora_bias"]),
        ({"name": "dora", "lora_bias": True}, ["lora_bias", "use_dora"]),
        ({"name": "lora", "target_modules": "a.*", "layers_to_transform": [0]}, ["layers_to_transform"]),
        ({"name": "lora", "layers_pattern": "layer"}, ["layers_pattern"]),
        ({"name": "lora", "rr": 4}, ["Unknown key 'tuning.rr'", "'r'"]),
        ({"name": "ffa_lora", "use_dora": True}, ["Unknown key 'tuning.use_dora'"]),
        ({"name": "pissa", "init_lora_weights": "gaussian"}, ["tuning.init_lora_weights"]),
        ({"name": "select"}, ["tuning.select"]),
        ({"name": "select", "select": [""]}, ["empty pattern"]),
        ({"name": "adapter", "bottleneck": 0}, ["tuning.bottleneck = 0"]),
    ],
)
def test_refused_without_model_or_data(tuning, parts):
    text = refusal(**tuning)
    assert all(part in text for part in parts), text


def test_prompts_may_start_from_a_text_or_an_enum():
    for tuning in (
        {"name": "prompt_tuning", "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Sort these"},
        {"name": "prompt_tuning", "prompt_tuning_init": "SAMPLE_VOCAB", "num_virtual_tokens": 4},
        {"name": "p_tuning", "encoder_reparameterization_type": "LSTM"},
    ):
        check(parsed(**tuning).tuning, "causal_lm")


def test_a_run_and_validate_ask_before_any_data_is_read(tmp_path):
    config = parse_config(
        {
            "model": {"name": str(tmp_path)},
            "data": {"path": "absent.csv"},
            "tuning": {"name": "ia3", "feedforward": []},
        },
        where="test",
    )
    with pytest.raises(ConfigError, match="Did you mean 'feedforward_modules'"):
        check_before_data(config)


def test_the_command_validate_asks_peft_too(tmp_path):
    path = tmp_path / "run.toml"
    for text, code in (('name = "vera"\nr = 16', 0), ('name = "vera"\nrr = 16', 2), ('name = "head"', 0)):
        path.write_text(f"[tuning]\n{text}\n")
        found = CliRunner().invoke(main, ["config", "validate", str(path)])
        assert found.exit_code == code, found.output
    path.write_text('[tuning]\nname = "vera"\nrr = 16\n')
    assert "Unknown key 'tuning.rr'" in CliRunner().invoke(main, ["config", "validate", str(path)]).stderr


def test_every_option_of_lora_is_offered_or_has_a_reason():
    own = {field.name for field in dataclasses.fields(PeftLoraConfig)} - {
        field.name for field in dataclasses.fields(PeftConfig)
    }
    assert set(LoraOptions.model_fields) | {"use_dora"} | set(NOT_OFFERED) == own
    assert not set(LoraOptions.model_fields) & set(NOT_OFFERED)
    assert set(TUNINGS.get("lora").config.model_fields) == set(LoraOptions.model_fields) | {"name", "use_dora"}


def test_defaults_of_every_table_pass_their_own_check():
    for name in TUNINGS.names():
        plugin = TUNINGS.get(name)
        if name in ("select", "trainable_tokens", "xlora"):
            continue
        check(plugin.config(), sorted(plugin.tasks)[0])
