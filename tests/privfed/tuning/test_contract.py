"""One contract for every registered tuning on a text classifier, two language models and an image classifier."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_bases import BASES, LABELS, OPTIONS, base, frozen_digest, inputs, load, logits, shake, tuned

from privfed.errors import ConfigError, ModelError
from privfed.export import merged_model
from privfed.tuning import TUNINGS
from privfed.tuning.adapters import quiet
from privfed.tuning.layout import layout_of, read_flat, trained, write_flat

FAMILIES = ("bert", "gpt2", "llama", "vit")
TEXT_ONLY = (
    "cartridge", "multitask_prompt_tuning", "p_tuning", "poly", "prefix_tuning", "prompt_tuning", "trainable_tokens"
)  # fmt: skip
# peft 0.21 takes torch's Linear only, and every linear layer of GPT-2 is a Conv1D
NO_CONV1D = (
    "adamss", "beft", "boft", "c3a", "delora", "glora", "hra", "lily", "loha", "lokr", "miss", "oft", "peanut", "poly",
    "psoft", "road", "shira", "supertuning",
)  # fmt: skip
# (tuning, family): what the refusal says
REFUSED: dict[tuple[str, str], str] = {
    **{(name, "gpt2"): "onv1D" for name in NO_CONV1D},
    **{(name, "vit"): "image_classification" for name in TEXT_ONLY},
    **{(name, family): "does not work with" for name in ("adaption_prompt", "cpt") for family in ("bert", "vit")},
    **{("xlora", family): "trained before" for family in BASES},
    **{("head", family): "this task has none" for family in ("gpt2", "llama")},
    ("bitfit", "llama"): "this model has none",
    ("osf", "gpt2"): "train nothing",
    ("shadow", "bert"): "decoder layers",
    ("shadow", "vit"): "image_classification",
}
BUILT = [(name, family) for name in TUNINGS.names() for family in FAMILIES if (name, family) not in REFUSED]
# what is in front of the input, or drawn at random from the start, is there before it is trained
NOT_AT_REST = {
    "c3a", "cartridge", "cpt", "fourierft", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "prompt_tuning",
    "unilora", "vblora",
}  # fmt: skip
# trained numbers that only a base bias, or nothing in this batch, moves
STILL = {"glora": ".glora_D."}
WITH_TASK_IDS = ("multitask_prompt_tuning", "poly")
PROMPTS = ("cartridge", "cpt", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "prompt_tuning")
UNMERGEABLE = {"adapter", "adaption_prompt", "lily", "poly", "shadow", *PROMPTS}
NOT_FOR_PEFT = {"adapter", "full"}


@functools.cache
def base_logits(family):
    return logits(base(family), family)


def reloaded(name, family, folder):
    """Return the logits of what was saved, loaded by plain peft, or by the tuning's own loader where peft cannot."""
    model = base(family)
    if name in NOT_FOR_PEFT:
        model = TUNINGS.get(name).load(model, folder)
    else:
        with quiet():
            model = PeftModel.from_pretrained(model, str(folder))
    more = {"task_ids": torch.zeros(3, dtype=torch.long)} if name in WITH_TASK_IDS else {}
    return logits(model, family, **more)


@pytest.mark.parametrize(("name", "family"), BUILT)
def test_contract(name, family, tmp_path):
    loaded = load(family)
    found = tuned(name, loaded)
    layout = layout_of(found.model)
    assert all(p.dtype == torch.float32 for _, p in trained(found.model))
    if family in ("gpt2", "llama"):
        assert found.head is None
    else:
        assert any(n.startswith(f"{found.head}.") for n in layout.names), "the head is trained by every tuning"
        head = found.model.get_submodule(found.head)
        assert sum(p.numel() for p in head.parameters() if p.requires_grad) == LABELS * 33

    start = logits(found.model, family)
    assert start.shape == base_logits(family).shape
    assert torch.allclose(start, base_logits(family), atol=1e-5) or name in NOT_AT_REST

    # one plain step moves what is trained and nothing else
    before_D = shake(found.model)
    frozen = frozen_digest(found.model)
    found.model.train()
    found.model(**inputs(family)).logits.square().sum().backward()
    still = [n for n, p in trained(found.model) if p.grad is None or not p.grad.any()]
    assert all(STILL.get(name, "nothing") in n for n in still), still
    torch.optim.SGD([p for _, p in trained(found.model)], lr=0.01).step()
    assert frozen_digest(found.model) == frozen
    assert not np.array_equal(read_flat(found.model), before_D)

    # saved and loaded again: the same function, and no word of this machine
    wanted = logits(found.model, family)
    assert not torch.allclose(wanted, start, atol=1e-4)
    found.save(tmp_path)
    got = reloaded(name, family, tmp_path)
    assert torch.allclose(got[:, -wanted.shape[1] :], wanted, atol=1e-5)
    assert not [*tmp_path.glob("*.bin"), *tmp_path.glob("*.pt"), *tmp_path.glob("README.md")]
    assert "/somewhere" not in "".join(p.read_text() for p in tmp_path.glob("*.json"))


@pytest.mark.parametrize("family", ["gpt2_classifier", "llama_classifier"])
@pytest.mark.parametrize("name", ["prefix_tuning", "lora", "ia3", "adapter", "select", "shadow", "trainable_tokens"])
def test_decoders_that_classify(name, family, tmp_path):
    found = tuned(name, load(family))
    assert found.head is not None and found.head.endswith("score")
    shake(found.model)
    wanted = logits(found.model, family)
    found.save(tmp_path)
    assert torch.allclose(reloaded(name, family, tmp_path), wanted, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2_classifier", "llama_classifier"])
@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning", "multitask_prompt_tuning"])
def test_a_prompt_that_hides_padding_from_a_classifier_is_refused(name, family):
    """transformers finds a decoder's last token by its number, which an embedded prompt hides: a batch would decide."""
    with pytest.raises(ModelError, match="classifies by the padding of a batch"):
        tuned(name, load(family))


@pytest.mark.parametrize(("name", "family"), [(n, f) for n, f in REFUSED if f in FAMILIES])
def test_what_is_refused_says_why_in_one_sentence(name, family):
    with pytest.raises((ModelError, ConfigError), match=REFUSED[name, family]) as caught:
        tuned(name, load(family))
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and ":" in text


def test_every_method_of_peft_is_registered_under_its_own_name():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from privfed.tuning.peft_methods import METHODS

    everything = {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert set(METHODS) == everything - {"lora"}
    assert everything <= set(TUNINGS.names())
    built = {name for name, _ in BUILT}
    assert everything - built == {"xlora"}


@pytest.mark.parametrize("name", [n for n in TUNINGS.names() if n != "xlora"])
def test_the_seed_decides_every_bit(name):
    family = "bert" if (name, "bert") not in REFUSED else "llama"
    first, again = (read_flat(tuned(name, load(family), 7).model) for _ in range(2))
    assert np.array_equal(first, again)


def test_the_seed_draws_the_fresh_parameters():
    for name in ("lora", "adapter", "prompt_tuning", "vblora"):
        one, other = (read_flat(tuned(name, load("bert"), seed).model) for seed in (1, 2))
        assert not np.array_equal(one, other)


SCRIPT = """
import hashlib, sys, tempfile
from pathlib import Path
sys.path.insert(0, {folder!r})
from tiny_bases import load, shake, tuned
for name in {names!r}:
    found = tuned(name, load("bert"), 3)
    shake(found.model)
    with tempfile.TemporaryDirectory() as folder:
        found.save(Path(folder))
        state = hashlib.sha256()
        for path in sorted(Path(folder).iterdir()):
            state.update(path.name.encode() + path.read_bytes())
    print(name, state.hexdigest())
"""
SAMPLE = ("adamss", "frod", "ia3", "lora", "prompt_tuning", "shira", "vera", "fed_sb", "federa", "adapter")


def test_two_processes_write_the_same_bytes():
    """peft keeps targets in sets, whose order changes with the hash seed of a process."""
    script = SCRIPT.format(folder=str(Path(__file__).parent), names=SAMPLE)
    runs = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-W", "ignore", "-c", script]
        runs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [run.communicate()[0].splitlines() for run in runs]
    assert all(run.returncode == 0 for run in runs)
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == len(SAMPLE)


@pytest.mark.parametrize(("name", "family"), BUILT)
def test_merged_is_unmerged_or_refused_in_a_sentence(name, family):
    found = tuned(name, load(family))
    shake(found.model)
    wanted = logits(found.model, family)
    if name in UNMERGEABLE or (name, family) == ("beft", "llama"):
        with pytest.raises(ModelError, match=f"The tuning '{name}' cannot be merged into the base") as caught:
            merged_model(name, found.model)
        assert str(caught.value).endswith("export without --merge.")
        return
    merged = merged_model(name, found.model)
    assert type(merged) is BASES[family][0]
    assert set(merged.state_dict()) == set(base(family).state_dict())
    tolerance = 1e-5 * max(1.0, float(wanted.abs().max()))
    assert torch.allclose(logits(merged, family), wanted, atol=tolerance)


def weights(name, family, model):
    """Return the weights that a tuned model stands for, as one vector."""
    state = merged_model(name, model).state_dict()
    return torch.cat([state[key].double().flatten() for key in sorted(state)])


AFFINE = ("bert", "llama")
BROKEN_BY_AN_OPTION = {"supertuning": {"r": 4, "lora_alpha": 8}}
# options of linear methods under which they could cease to be: none does
STILL_LINEAR = {
    "miss": ({"init_weights": "bat", "r": 8}, {"init_weights": "mini", "r": 8, "mini_r": 4}),
    "shira": ({"r": 2, "random_seed": 3},),
    "waveft": ({"n_frequency": 40, "use_idwt": False}, {"n_frequency": 40, "wavelet_family": "sym3"}),
    "fourierft": ({"n_frequency": 40, "init_weights": True},),
    "ia3": ({"target_modules": ["query", "output.dense"], "feedforward_modules": ["output.dense"]},),
    "tinylora": ({"weight_tying": 1.0, "u": 8},),
    "ffa_lora": ({"use_rslora": True, "lora_bias": True}, {"init_lora_weights": "pissa"}, {"bias": "all"}),
    "frod": ({"sparse_rate": 0.1},),
}


def averages(name, family, **options):
    """Return whether averaged trained values give the averaged weights."""
    ends, flats = [], []
    for seed in (1, 2):
        found = tuned(name, load(family), **options)
        flats.append(shake(found.model, seed, 0.5))
        ends.append(weights(name, family, found.model))
    middle = tuned(name, load(family), **options)
    write_flat(middle.model, ((flats[0].astype(np.float64) + flats[1]) / 2).astype(np.float32))
    gap = (weights(name, family, middle.model) - (ends[0] + ends[1]) / 2).norm()
    return bool(gap < 1e-5 * (ends[0] - ends[1]).norm())


@pytest.mark.parametrize("name", BROKEN_BY_AN_OPTION)
def test_an_option_can_break_linearity(name):
    assert averages(name, "bert") and not averages(name, "bert", **BROKEN_BY_AN_OPTION[name])


@pytest.mark.parametrize("name", STILL_LINEAR)
def test_no_option_breaks_what_is_declared_linear(name):
    assert TUNINGS.get(name).linear
    assert all(averages(name, "bert", **options) for options in STILL_LINEAR[name])


@pytest.mark.parametrize("name", sorted({n for n, f in BUILT if f in AFFINE} - UNMERGEABLE))
def test_linear_says_whether_averaged_factors_are_the_averaged_model(name):
    """Measured on the weights: linear must never be claimed where it is false."""
    affine = averages(name, "bert" if (name, "bert") not in REFUSED else "llama")
    assert affine or not TUNINGS.get(name).linear
    # and where the weights are affine for the default options, an option that breaks it is why it is not claimed
    assert not affine or TUNINGS.get(name).linear or name in BROKEN_BY_AN_OPTION


def test_what_averages_without_weights_to_merge():
    """Prompts have no weights to merge: what is put in front is the average itself."""
    for name, linear in {"prompt_tuning": True, "cartridge": True, "p_tuning": False}.items():
        prompts, flats = [], []
        for seed in (1, 2):
            model = tuned(name, load("llama")).model
            flats.append(shake(model, seed, 0.5))
            prompts.append(model.get_prompt_embedding_to_save("default"))
        model = tuned(name, load("llama")).model
        write_flat(model, (flats[0] + flats[1]) / 2)
        middle = model.get_prompt_embedding_to_save("default")
        assert torch.allclose(middle, (prompts[0] + prompts[1]) / 2, atol=1e-5) is linear
        assert TUNINGS.get(name).linear is linear


def test_a_config_names_no_base_but_its_public_name(tmp_path):
    for name in ("ia3", "prompt_tuning"):
        found = tuned(name, load("bert"))
        found.save(tmp_path / name)
        fields = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert fields["base_model_name_or_path"] == "tiny-bert"
    assert OPTIONS  # the methods that need an option are few
