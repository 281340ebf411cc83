"""Records of several parts, and records without classes: what is read, dropped, split and named in a ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privfed.config import parse_config
from privfed.data import DataConfig, Dataset, load_dataset
from privfed.data.dataset import digest_of
from privfed.data.duplicates import jaccard, normalise, shingles
from privfed.errors import ConfigError, DataError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def question(i: int) -> str:
    return f"what is {WORDS[i % 10]} {WORDS[i // 10 % 10]} number {i}"


def answer(i: int) -> str:
    return f"it is {WORDS[i * 7 % 10]} and {WORDS[i * 3 % 10]} as row {i} says"


def turns(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": question(i)}, {"role": "assistant", "content": answer(i)}]


def record(i: int) -> dict[str, Any]:
    return {"q": question(i), "a": answer(i), "chat": turns(i), "label": "ab"[i % 2], "who": f"c{i % 3}"}


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


FORMS: dict[str, tuple[str, dict[str, str]]] = {
    "text_pair": ("sequence_classification", {"text": "q", "text_pair": "a"}),
    "prompt_response": ("causal_lm", {"prompt": "q", "response": "a"}),
    "messages": ("causal_lm", {"messages": "chat"}),
    "text": ("causal_lm", {"text": "a"}),
}


def load(path: str, form: str, **keys: Any) -> Any:
    task, columns = FORMS[form]
    return load_dataset(DataConfig(path=path, **columns, **keys), seed=1, task=task)  # type: ignore[call-overload]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_split_and_divided(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "a.jsonl", [record(i) for i in range(90)])
    data: Dataset = load(path, form, client="who")
    assert data.kind == form
    assert len(data.train) + len(data.test) == 90 and len(data.test) > 5
    assert data.train.clients is not None and set(data.train.clients) == {"c0", "c1", "c2"}
    if FORMS[form][0] == "causal_lm":
        assert data.train.labels is None and data.label_names == ()
    else:
        assert data.train.labels is not None and data.label_names == ("a", "b")


def test_parts_stay_together_in_every_order_and_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [record(i) for i in range(60)])
    for form, first, second in (("text_pair", "text", "text_pair"), ("prompt_response", "prompt", "response")):
        data = load(path, form, limit=20)
        for split in (data.train, data.test):
            for text, left, right in zip(split.texts, split.parts[first], split.parts[second], strict=True):
                number = int(left.rsplit(" ", 1)[1])
                assert (left, right) == (question(number), answer(number))
                assert left in text and right in text
    chats = load(path, "messages").test
    for conversation in chats.parts["messages"]:
        (asked, asks), (answered, answers) = conversation
        assert (asked, answered) == ("user", "assistant")
        assert answers == answer(int(asks.rsplit(" ", 1)[1]))


def test_a_pair_is_a_duplicate_only_as_a_whole(tmp_path: Path) -> None:
    rows = [record(i) for i in range(30)]
    same_question = {**record(0), "a": "quite another answer to it"}
    moved = {**record(1), "q": question(1) + " " + answer(1).split()[0], "a": answer(1).split(" ", 1)[1]}
    path = write(tmp_path / "a.jsonl", [*rows, same_question, moved, {**record(2), "q": question(2).upper() + " "}])
    data = load(path, "prompt_response")
    assert len(data.train) + len(data.test) == 32
    assert "1 duplicate row dropped" in data.notes


def test_near_duplicates_of_whole_records_stay_on_one_side(tmp_path: Path) -> None:
    long = [" ".join(f"{WORDS[(i * k + k) % 10]}{i}" for k in range(30)) for i in range(40)]
    rows = [{"q": text, "a": f"same {i}"} for i, text in enumerate(long)]
    rows += [{"q": text + " indeed", "a": f"same {i}"} for i, text in enumerate(long)]
    data = load(write(tmp_path / "a.jsonl", rows), "prompt_response")
    sides = [{shingles(normalise(text)) for text in split.texts} for split in (data.train, data.test)]
    assert len(sides[0]) + len(sides[1]) == 80
    assert max(jaccard(a, b) for a in sides[0] for b in sides[1]) < 0.8


def test_training_records_that_repeat_a_test_record_go(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [record(i) for i in range(20)])
    test = write(tmp_path / "b.jsonl", [record(i) for i in range(15, 25)])
    data = load(train, "messages", test_path=test)
    assert (len(data.train), len(data.test)) == (15, 10)


def test_the_digest_of_a_single_text_is_that_of_the_texts_whatever_the_task(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [record(i) for i in range(40)])
    classified = load_dataset(DataConfig(path=path, text="a"), seed=1)
    assert load(path, "text").digest == classified.digest == digest_of(answer(i) for i in range(40))
    pairs = load(path, "prompt_response")
    assert pairs.digest == load(path, "prompt_response", limit=5, test_fraction=0.4).digest != classified.digest


def test_rows_that_teach_nothing_are_dropped(tmp_path: Path) -> None:
    rows = [record(i) for i in range(30)]
    path = write(tmp_path / "a.jsonl", [*rows, {**record(30), "a": " "}, {**record(31), "chat": turns(31)[:1]}])
    assert "1 row without response dropped" in load(path, "prompt_response").notes
    assert "1 row without message dropped" in load(path, "messages").notes
    blank = write(tmp_path / "b.jsonl", [{**record(i), "a": ""} for i in range(4)])
    with pytest.raises(DataError, match=r"All 4 responses of .* are empty, expected words: check \[data\] response"):
        load(blank, "prompt_response")
    assert len(load(blank, "text_pair", test_fraction=0.5).train) >= 1  # one of the two suffices


@pytest.mark.parametrize(
    "value",
    [
        None,
        "hello",
        [],
        [{"role": "user"}],
        [{"role": "robot", "content": "x"}],
        [{"role": "user", "content": 3}],
        ["x"],
    ],
)
def test_what_is_no_conversation_is_named(tmp_path: Path, value: object) -> None:
    path = write(tmp_path / "a.jsonl", [record(0), {**record(1), "chat": value}])
    with pytest.raises(DataError, match=r"data row 2 has .* as its messages, expected a list of objects with a role"):
        load(path, "messages")


def test_a_missing_column_names_its_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [record(0)])
    config = DataConfig(path=path, prompt="q", response="aa")
    with pytest.raises(DataError, match=r"has no column 'aa', .* Set \[data\] response to the right one"):
        load_dataset(config, seed=1, task="causal_lm")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"prompt": "q"}, "prompt = 'q' without response, expected both"),
        ({"response": "q"}, "response = 'q' without prompt, expected both"),
        ({"prompt": "q", "response": "a", "messages": "m"}, "prompt and messages, which make different kinds"),
        ({"text": "a", "text_pair": "a"}, "text = 'a', text_pair = 'a', label = 'label', expected different columns"),
        ({"prompt": "a", "response": "a"}, "prompt = 'a', response = 'a', expected different columns"),
    ],
)
def test_tables_that_cannot_hold(keys: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DataConfig(path="a.jsonl", **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({"data": {"messages": "m"}}, 'which model.task = "sequence_classification" does not read'),
        ({"model": {"task": "causal_lm"}, "data": {"text_pair": "b"}}, 'or set model.task = "sequence_classification"'),
        (
            {"model": {"task": "causal_lm"}, "partition": {"name": "dirichlet"}},
            'has name = "dirichlet", which divides by class, but the records of a causal language model have none',
        ),
        (
            {"model": {"task": "causal_lm"}, "head_warm_start": {"name": "dp_probe"}},
            'trains a classification head, and model.task = "causal_lm" has none',
        ),
        ({"evaluate": {"generate": 3}}, "which writes no text: set evaluate.generate = 0"),
        ({"model": {"autocast": "bf16"}}, 'model.autocast = "bf16" with privacy.unit = "example": one more example'),
        (
            {"model": {"quantization": "8bit"}},
            'outlier columns over the whole batch, .* set model.quantization = "4bit"',
        ),
    ],
)
def test_tables_that_contradict_each_other(tables: dict[str, dict[str, Any]], sentence: str) -> None:
    raw = {"data": {"path": "rows.jsonl"}}
    merged = {**raw, **{name: {**raw.get(name, {}), **table} for name, table in tables.items()}}
    with pytest.raises(ConfigError, match=sentence):
        parse_config(merged, where="run.toml")


def test_records_without_classes_divide_by_the_other_partitioners(tmp_path: Path) -> None:
    from privfed.data import PARTITIONERS, partition

    path = write(tmp_path / "a.jsonl", [record(i) for i in range(60)])
    train = load(path, "text", client="who").train
    for name in ("iid", "quantity", "by_column"):
        shards = partition(
            train, PARTITIONERS.get(name).config(**({} if name == "by_column" else {"clients": 3})), seed=2
        )
        rows = np.concatenate([shard.indices for shard in shards])
        assert np.array_equal(np.sort(rows), np.arange(len(train)))
    with pytest.raises(ConfigError, match="divides by class"):
        partition(train, PARTITIONERS.get("dirichlet").config(clients=2), seed=2)
