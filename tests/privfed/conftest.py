"""What tests of the whole package share: models with a few thousand weights, a small data set, a small run.

The models are real transformers models with a real tokenizer, made at random in a second or so; nothing here
touches a network, and no test should.
"""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TOPICS = {
    "animals": ["cat", "dog", "horse", "cow", "sheep", "goat", "fox", "wolf", "bear", "mouse"],
    "music": ["piano", "violin", "drum", "flute", "song", "melody", "rhythm", "chord", "choir", "guitar"],
    "weather": ["rain", "snow", "wind", "storm", "cloud", "thunder", "frost", "fog", "hail", "sun"],
}
STARTS = ["ba", "be", "bi", "bo", "bu", "da", "de", "di", "do", "du", "ka", "ke", "ki", "ko", "ku"]
FILLER = [start + end for start in STARTS for end in ("lan", "mor", "net", "pil", "rus", "sto")]
CLIENTS = 6
WORDS = [*FILLER, *(word for words in TOPICS.values() for word in words)]
SHAPE = {"vocab": 5 + len(WORDS), "hidden": 32, "layers": 2, "heads": 2, "wide": 64, "positions": 64}


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random BERT (two layers, hidden 32) and its WordPiece tokenizer."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=SHAPE["vocab"],
        hidden_size=SHAPE["hidden"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        intermediate_size=SHAPE["wide"],
        max_position_embeddings=SHAPE["positions"],
        pad_token_id=0,
    )
    return _saved(tmp_path_factory, "bert", BertModel, config, _encoder_tokenizer())


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random RoBERTa, whose head is two layers deep."""
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=SHAPE["vocab"],
        hidden_size=SHAPE["hidden"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        intermediate_size=SHAPE["wide"],
        max_position_embeddings=SHAPE["positions"] + 2,
        type_vocab_size=1,
        pad_token_id=0,
    )
    return _saved(tmp_path_factory, "roberta", RobertaModel, config, _encoder_tokenizer())


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random GPT-2; its tokenizer has an end token and, as usual, no padding token."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        vocab_size=SHAPE["vocab"],
        n_embd=SHAPE["hidden"],
        n_layer=SHAPE["layers"],
        n_head=SHAPE["heads"],
        n_positions=SHAPE["positions"],
        bos_token_id=4,
        eos_token_id=4,
    )
    return _saved(tmp_path_factory, "gpt2", GPT2Model, config, _decoder_tokenizer())


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random Llama: no biases anywhere, no padding token."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=SHAPE["vocab"],
        hidden_size=SHAPE["hidden"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["heads"],
        intermediate_size=SHAPE["wide"],
        max_position_embeddings=SHAPE["positions"],
        bos_token_id=4,
        eos_token_id=4,
    )
    return _saved(tmp_path_factory, "llama", LlamaModel, config, _decoder_tokenizer())


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random ViT for grey 8 x 8 images (two layers, hidden 16) and its image processor."""
    import torch
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        initializer_range=0.2,
    )
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.4], image_std=[0.3])
    folder = tmp_path_factory.mktemp("tiny_vit")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a safetensors file of 480 learnable grey images (6 x 7): 2 named classes, 4 named clients."""
    import json

    import numpy as np
    from safetensors.numpy import save_file

    draw = np.random.default_rng(0)
    labels = np.arange(480) % 2
    images = draw.integers(0, 120, (480, 6, 7))
    images[labels == 0, :3] += 120  # bright above
    images[labels == 1, 3:] += 120  # bright below
    metadata = {"label_names": json.dumps(["above", "below"]), "client_names": json.dumps(list("abcd"))}
    path = tmp_path_factory.mktemp("images") / "pictures.safetensors"
    owners = (np.arange(480) // 2 % 4).astype(np.int64)
    save_file({"images": images.astype(np.uint8), "labels": labels, "client": owners}, path, metadata=metadata)
    return path


@pytest.fixture(scope="session")
def tiny_model(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Return a function from ``bert``, ``roberta``, ``gpt2`` or ``llama`` to the folder of that tiny model."""
    return lambda family: request.getfixturevalue(f"tiny_{family}")


@pytest.fixture(scope="session")
def text_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a csv of 240 learnable rows (text, label, client): 3 classes, 6 clients, no near-duplicates."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.csv", 240)


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Write ``count`` rows of made-up sentences; four words of each tell its topic."""
    draw = random.Random(seed)
    topics = list(TOPICS)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "client"])
        for number in range(count):
            topic = topics[number % len(topics)]
            words = [*draw.sample(FILLER, draw.randint(4, 12)), *draw.sample(TOPICS[topic], 4)]
            draw.shuffle(words)
            rows.writerow([" ".join(words), topic, f"owner{number // len(topics) % CLIENTS}"])
    return path


@pytest.fixture
def tiny_config(tiny_bert: Path, text_csv: Path) -> Callable[..., Any]:
    """Return ``tiny_config(reproducible_noise=True, **tables)``: a run of seconds on ``tiny_bert`` and ``text_csv``.

    A table's keys replace the defaults below one by one; None leaves a key out; another ``name`` drops the
    table's other keys. Example: ``tiny_config(server={"rounds": 4}, privacy={"unit": "none"})``.
    """

    def build(*, reproducible_noise: bool = True, **tables: Any) -> Any:
        from privfed.config import parse_config

        raw: dict[str, Any] = {
            "seed": 3,
            "model": {"name": str(tiny_bert), "max_length": 24},
            "data": {"path": str(text_csv), "client": "client"},
            "partition": {"name": "iid", "clients": 4},
            "tuning": {"name": "ffa_lora", "r": 2},
            "client": {
                "optimizer": "sgd",
                "learning_rate": 0.5,
                "sampling_probability": 0.2,
                "local_steps": 2,
                "physical_batch_size": 8,
            },
            "server": {"rounds": 2, "cohort_size": 3, "evaluate_every": 2},
            "privacy": {"target_epsilon": 8.0, "target_delta": 1e-4, "l2_clip_norm": 0.5},
        }
        for name, table in tables.items():
            raw[name] = _overridden(raw.get(name, {}), table) if isinstance(table, Mapping) else table
        raw["privacy"]["reproducible_noise"] = reproducible_noise
        return parse_config(raw, where="tiny_config")

    return build


def _overridden(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    fresh = "name" in changes and "name" in table and changes["name"] != table["name"]
    merged = {**({} if fresh else table), **changes}
    return {key: value for key, value in merged.items() if value is not None}


def _saved(factory: pytest.TempPathFactory, name: str, kind: Any, config: Any, tokenizer: Any) -> Path:
    import torch

    torch.set_num_threads(1)  # for models of this size threads only cost time
    folder = factory.mktemp(f"tiny_{name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = kind(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _encoder_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {token: number for number, token in enumerate([*special, *WORDS])}
    rust = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    rust.normalizer = normalizers.Lowercase()
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _decoder_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<a>", "<b>", "<c>", "<end>"]
    vocab = {token: number for number, token in enumerate([*special, *WORDS])}
    rust = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    rust.normalizer = normalizers.Lowercase()
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=rust, unk_token="<unk>", bos_token="<end>", eos_token="<end>")
