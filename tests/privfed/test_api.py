"""The Python API: the same runs as the command line's, and objects where a configuration has a path or a name."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import privfed
from privfed import objects
from privfed.data.config import DataConfig
from privfed.data.objects import hand_over as take_data
from privfed.errors import ConfigError, DataError, ModelError, ResumeError
from privfed.models.objects import hand_over as take_model

datasets = pytest.importorskip("datasets")

NOISE = {"target_epsilon": None, "noise_multiplier": 1.0, "accountant": "rdp"}


@pytest.fixture
def config(tiny_config: Callable[..., Any], tmp_path: Path) -> Any:
    """A run of seconds, with reproducible noise and a ledger of the test's own."""
    return tiny_config(privacy=NOISE, ledger={"path": str(tmp_path / "holder.sqlite")})


@pytest.fixture
def rows(text_csv: Path, tmp_path: Path) -> Any:
    """The rows of ``text_csv`` as a ``datasets.Dataset``."""
    return datasets.Dataset.from_csv(str(text_csv), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def bert(tiny_bert: Path) -> tuple[Any, Any]:
    """The tiny BERT and its tokenizer as objects."""
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(tiny_bert), AutoTokenizer.from_pretrained(tiny_bert)


def weights(run: Any) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(Path(run.adapter).glob("*.safetensors")))


# --- Run ----------------------------------------------------------------------------------------------------------


def test_train_and_load_run_return_the_same_typed_value(config: Any, tmp_path: Path) -> None:
    run = privfed.train(config, out=tmp_path / "run")
    again = privfed.load_run(str(tmp_path / "run"))
    for one in (run, again):
        assert isinstance(one, privfed.Run) and one.finished
        assert Path(one) == tmp_path / "run" and os.fspath(one) == str(tmp_path / "run")
        assert one.config == config
        assert one.receipt == json.loads((tmp_path / "run" / "receipt.json").read_text())
        assert one.ledger == tmp_path / "holder.sqlite"
        kinds = [row["kind"] for row in one.metrics]
        assert kinds[0] == "start" and kinds[-1] == "finish" and kinds.count("round") == config.server.rounds
        assert one.epsilon is None  # its noise can be recomputed: that is no guarantee
    with pytest.raises(AttributeError):
        run.path = tmp_path  # type: ignore[misc]


def test_a_private_run_states_its_epsilon(tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    config = tiny_config(privacy=NOISE, ledger={"path": str(tmp_path / "l.sqlite")}, reproducible_noise=False)
    run = privfed.train(config, out=tmp_path / "run")
    assert run.receipt is not None
    assert run.epsilon == run.receipt["views"]["release"]["epsilon"] > 0


def test_the_model_that_was_trained_is_loaded_with_its_tokenizer(config: Any, tmp_path: Path, tiny_bert: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    run = privfed.train(config, out=tmp_path / "run")
    loaded = run.load_model()
    inputs = loaded.tokenizer(["cat dog rain", "piano balan"], return_tensors="pt", padding=True)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    plain = PeftModel.from_pretrained(base, run.adapter).eval()
    with torch.no_grad():
        assert torch.allclose(loaded.model(**inputs).logits, plain(**inputs).logits, atol=1e-6)
    assert not loaded.model.training and loaded.model.config.id2label[0] == "animals"


def test_an_unfinished_run_is_read_and_has_no_model(config: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(config.to_toml())
    run = privfed.load_run(tmp_path / "run")
    assert (run.finished, run.epsilon, run.metrics, run.receipt) == (False, None, (), None)
    with pytest.raises(ConfigError, match="no result yet: finish it"):
        run.load_model()
    with pytest.raises(ConfigError, match="is not a run folder"):
        privfed.load_run(tmp_path / "nowhere")


def test_a_round_that_was_written_twice_counts_once(config: Any, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(config.to_toml())
    lines = [{"kind": "round", "phase": "train", "round": 1, "survivors": n, "cohort": 3} for n in (2, 3)]
    lines.insert(1, {"kind": "eval", "phase": "train", "round": 1})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    assert privfed.load_run(tmp_path).metrics == (lines[2], lines[1])


@pytest.mark.parametrize("given", ["tiny", "mapping", "file"])
def test_every_form_of_a_configuration_is_taken(given: str, tmp_path: Path) -> None:
    from privfed.api import _tables
    from privfed.config import load_config, parse_config

    def parsed(form: Any, settings: tuple[str, ...] = ()) -> Any:
        return parse_config(_tables(form, settings), where="test")

    whole = load_config("tiny")
    (tmp_path / "own.toml").write_text(whole.to_toml())
    form: Any = {"tiny": "tiny", "mapping": whole.to_dict(), "file": tmp_path / "own.toml"}[given]
    assert parsed(form) == parsed(whole) == whole
    assert parsed(form, ("server.rounds=9",)).server.rounds == 9
    assert parsed(whole, ("server.rounds=9",)).server.rounds == 9
    assert load_config("tiny") == whole  # what was given is not changed


def test_what_is_no_configuration_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config is a int, expected a file, the name of a preset"):
        privfed.train(7, out=tmp_path / "run")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pass out='runs/mine'"):
        privfed.train({"seed": 1})


def test_the_package_itself_loads_nothing_and_reading_a_run_loads_no_torch(config: Any, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(config.to_toml())
    code = "import sys, privfed\nbefore = set(sys.modules)\n{}\nprint([m for m in {} if m in sys.modules])"
    heavy = ["torch", "transformers", "peft", "datasets", "opacus"]
    for body, never in (
        ("", [*heavy, "numpy", "pydantic", "click", "privfed.api"]),
        (f"privfed.load_run({str(tmp_path)!r}); assert 'privfed.api' in sys.modules", heavy),
    ):
        done = subprocess.run([sys.executable, "-c", code.format(body, never)], capture_output=True, text=True)
        assert (done.stdout.strip(), done.stderr) == ("[]", "")
    assert set(privfed.__all__) <= set(dir(privfed))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        privfed.trian  # noqa: B018


# --- data as objects ----------------------------------------------------------------------------------------------


def test_rows_as_an_object_train_the_same_model_on_the_same_account_as_their_file(
    config: Any, rows: Any, tmp_path: Path
) -> None:
    by_file = privfed.train(config, out=tmp_path / "file")
    tables = config.to_dict()
    tables["data"] = {"client": "client"}  # the columns, and no name
    by_object = privfed.train(tables, out=tmp_path / "object", data=rows)
    assert tables["data"] == {"client": "client"}
    assert weights(by_object) == weights(by_file)
    assert by_object.receipt is not None and by_file.receipt is not None
    # the ledger's account is of the records, wherever they were read from
    assert by_object.receipt["data"]["digest"] == by_file.receipt["data"]["digest"]
    text = (tmp_path / "object" / "config.toml").read_text()
    assert "rows.csv" not in text and 'name = "object:' in text
    stored = [path for path in (tmp_path / "object").rglob("*") if path.is_file()]
    some = rows[0]["text"].encode()
    assert len(stored) > 5 and not any(some in path.read_bytes() for path in stored)  # no record is kept in the folder


def test_spending_adds_up_over_a_file_and_an_object_of_the_same_rows(
    tiny_config: Callable[..., Any], rows: Any, tmp_path: Path
) -> None:
    from privfed.errors import BudgetExceededError
    from privfed.privacy.ledger import Ledger

    path = tmp_path / "holder.sqlite"
    one = tiny_config(privacy=NOISE, ledger={"path": str(path)}, reproducible_noise=False)
    run = privfed.train(one, out=tmp_path / "file")
    assert run.epsilon is not None
    capped = tiny_config(
        privacy=NOISE, ledger={"path": str(path), "epsilon_cap": run.epsilon}, reproducible_noise=False
    )
    with pytest.raises(BudgetExceededError, match="is spent"):
        privfed.train(capped, out=tmp_path / "object", data=rows.shuffle(seed=1))  # another order is the same people
    with Ledger.open(path, create=False) as ledger:
        assert len({entry.charge.data_digest for entry in ledger.entries()}) == 1


def test_an_object_needs_a_ledger_that_outlives_the_run(
    tiny_config: Callable[..., Any], rows: Any, tmp_path: Path
) -> None:
    config = tiny_config(privacy=NOISE)
    with pytest.raises(ConfigError, match=r"pass ledger='rows\.ledger\.sqlite'"):
        privfed.train(config, out=tmp_path / "run", data=rows)
    assert not (tmp_path / "run").exists()
    run = privfed.train(config, out=tmp_path / "run", data=rows, ledger=tmp_path / "own.sqlite")
    assert run.ledger == tmp_path / "own.sqlite" and run.config.ledger.path == str(tmp_path / "own.sqlite")


def test_a_run_on_objects_resumes_with_the_same_objects_only(config: Any, rows: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    halves = rows.train_test_split(test_size=0.25, seed=0, shuffle=True)
    whole = privfed.train(config, out=tmp_path / "whole", data=halves)

    class StoppedError(Exception):
        pass

    from privfed.federation.progress import Progress

    class Stopper(Progress):
        def round_done(self, phase: str, number: int, rounds: int, epsilon: float | None) -> None:
            raise StoppedError

    with pytest.raises(StoppedError):
        privfed.train(config, out=out, data=halves, progress=Stopper())
    shuffled = datasets.DatasetDict(train=halves["train"].shuffle(seed=3), test=halves["test"])
    for other in (shuffled, rows):
        with pytest.raises(ResumeError, match="hand over the same object"):
            privfed.train(config, out=out, data=other, resume=True)
    with pytest.raises(ResumeError, match="hand over the same object"):
        privfed.train(config, out=out, resume=True)
    apart = copy.deepcopy(halves)
    again = privfed.train(config, out=out, data=apart["train"], test=apart["test"], resume=True)
    assert weights(again) == weights(whole)


def test_an_object_that_nobody_holds_is_asked_for_again(config: Any, rows: Any, tmp_path: Path) -> None:
    from privfed.federation.material import gather

    run = privfed.train(config, out=tmp_path / "run", data=rows)
    assert gather(run.config).dataset.digest  # what an audit does, while the run is held
    stored = run.config
    del run
    gc.collect()
    with pytest.raises(DataError, match=r"pass the same data= \(and test=\) to privfed\.train or privfed\.load_run"):
        gather(stored)
    again = privfed.load_run(tmp_path / "run", data=rows)
    assert gather(again.config).dataset.digest
    with pytest.raises(ResumeError, match="pass the object that it was trained with"):
        privfed.load_run(tmp_path / "run", data=rows.shuffle(seed=1))


def test_splits_and_formats_of_data_objects(rows: Any) -> None:
    table = DataConfig(name="pydoc", client="client")
    plain = take_data(rows, None, table, "sequence_classification")
    assert take_data(rows.with_format("numpy"), None, table, "sequence_classification").name == plain.name
    assert take_data(rows.select_columns(["text", "label", "client"]), None, table, "sequence_classification") is plain
    renamed = rows.map(lambda row: {"label": row["label"].upper()}, load_from_cache_file=False, keep_in_memory=True)
    assert take_data(renamed, None, table, "sequence_classification").name != plain.name
    halves = rows.train_test_split(test_size=0.5, seed=0)
    both = take_data(halves, None, table, "sequence_classification")
    assert set(both.value) == {"train", "test"}
    swapped = datasets.DatasetDict(train=halves["test"], test=halves["train"])
    assert take_data(swapped, None, table, "sequence_classification").name != both.name


@pytest.mark.parametrize(
    ("data", "test", "sentence"),
    [
        (
            lambda r: [{"text": "a"}],
            None,
            r"is a list, expected a datasets\.Dataset: use datasets\.Dataset\.from_list",
        ),
        (lambda r: {"text": ["a"]}, None, r"use datasets\.Dataset\.from_dict"),
        (lambda r: r.to_pandas(), None, r"use datasets\.Dataset\.from_pandas\(frame\)"),
        (lambda r: r.to_iterable_dataset(), None, "a stream has no fixed rows to account for"),
        (lambda r: datasets.DatasetDict(dev=r), None, "has the splits 'dev', expected 'train'"),
        (lambda r: r.train_test_split(0.5), lambda r: r, "has the split 'test' to test on"),
        (lambda r: r, lambda r: "test.csv", r"test= is a str, expected a datasets\.Dataset"),
    ],
)
def test_what_is_no_data_set_is_refused_in_a_sentence(data: Any, test: Any, sentence: str, rows: Any) -> None:
    with pytest.raises(DataError, match=sentence):
        take_data(data(rows), test and test(rows), DataConfig(name="pydoc"), "sequence_classification")


def test_images_as_objects_are_the_images_of_the_file(image_file: Path, tiny_vit: Path, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image
    from safetensors.numpy import load_file

    from privfed.data import load_dataset

    tensors = load_file(image_file)
    held = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(each) for each in tensors["images"]], "label": tensors["labels"].tolist()},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["above", "below"])}),
    )
    table = DataConfig(name="digits")
    handed = take_data(held, None, table, "image_classification")
    found: Any = load_dataset(table.model_copy(update={"name": handed.name}), seed=0, task="image_classification")
    wanted: Any = load_dataset(DataConfig(path=str(image_file)), seed=0, task="image_classification")
    assert found.digest == wanted.digest and found.label_names == wanted.label_names
    assert all(np.array_equal(a, b) for a, b in zip(found.train.images, wanted.train.images, strict=True))
    assert take_data(held.shuffle(seed=1), None, table, "image_classification").name != handed.name


# --- models as objects --------------------------------------------------------------------------------------------


def test_a_model_as_an_object_trains_the_same_adapter_as_its_folder_and_is_not_changed(
    config: Any, bert: tuple[Any, Any], tmp_path: Path
) -> None:
    import torch

    model, tokenizer = bert
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    by_folder = privfed.train(config, out=tmp_path / "folder")
    run = privfed.train(config, out=tmp_path / "object", model=model, tokenizer=tokenizer)
    assert weights(run) == weights(by_folder)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert type(model).__name__ == "BertModel" and not hasattr(model, "peft_config")
    named = json.loads((run.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == Path(model.name_or_path).name  # a folder of this machine would tell more than it helps
    inputs = tokenizer(["cat dog"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(run.load_model().model(**inputs).logits, by_folder.load_model().model(**inputs).logits)


def test_a_resumed_run_and_a_loaded_one_need_the_same_model(config: Any, bert: tuple[Any, Any], tmp_path: Path) -> None:
    import torch

    model, tokenizer = bert
    run = privfed.train(config, out=tmp_path / "run", model=model, tokenizer=tokenizer)
    assert privfed.train(config, out=tmp_path / "run", model=model, tokenizer=tokenizer, resume=True).finished
    folder = Path(objects.find(run.config.model.name).location)
    del run
    gc.collect()
    assert not folder.exists()  # nothing is left behind
    with pytest.raises(ModelError, match=r"pass the same model= and tokenizer="):
        privfed.load_run(tmp_path / "run").load_model()
    again = privfed.load_run(tmp_path / "run", model=model, tokenizer=tokenizer)
    assert again.load_model().num_labels == 3
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1.0
    with pytest.raises(ResumeError, match=r"model\.name = 'object:.*hand over the same object"):
        privfed.train(config, out=tmp_path / "run", model=model, tokenizer=tokenizer, resume=True)


def test_the_name_of_a_model_is_its_content(bert: tuple[Any, Any], tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = bert
    handed = take_model(model, tokenizer, "sequence_classification")
    model.save_pretrained(tmp_path / "moved")
    tokenizer.save_pretrained(tmp_path / "moved")
    moved = AutoModel.from_pretrained(tmp_path / "moved"), AutoTokenizer.from_pretrained(tmp_path / "moved")
    assert take_model(*moved, "sequence_classification") is handed
    other = AutoTokenizer.from_pretrained(tiny_bert, do_lower_case=False, pad_token="[MASK]")
    assert take_model(model, other, "sequence_classification").name != handed.name


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda m, t: ("bert", t), r"model= is a str, expected a transformers PreTrainedModel"),
        (lambda m, t: (m, None), r"model= was given without tokenizer="),
        (lambda m, t: (m.to("meta"), t), "without values"),
    ],
)
def test_what_is_no_model_is_refused_in_a_sentence(make: Any, sentence: str, bert: tuple[Any, Any]) -> None:
    with pytest.raises(ModelError, match=sentence):
        take_model(*make(*bert), "sequence_classification")


def test_an_adapted_model_is_sent_back_to_be_merged(bert: tuple[Any, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = bert
    with pytest.raises(ModelError, match=r"merge the adapter first with model\.merge_and_unload\(\)"):
        take_model(get_peft_model(model, LoraConfig(target_modules=["query"])), tokenizer, "sequence_classification")


def test_halves_of_a_pair_of_objects_are_refused(config: Any, bert: tuple[Any, Any], rows: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given without model="):
        privfed.train(config, out=tmp_path / "run", tokenizer=bert[1])
    with pytest.raises(ConfigError, match="given without data="):
        privfed.train(config, out=tmp_path / "run", test=rows)
