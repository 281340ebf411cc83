"""Files: every format gives the same rows, and every bad input one sentence that says what to do."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from privfed.data import DataConfig, TextDataset, load_dataset
from privfed.errors import ConfigError, DataError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def rows(count: int = 60, labels: tuple[Any, ...] = ("spam", "ham")) -> list[dict[str, Any]]:
    """Return rows of which no two are near-duplicates."""
    return [
        {
            "text": f"{WORDS[i % 10]} {WORDS[i // 10]}, row “{i}” said",
            "label": labels[i % len(labels)],
            "owner": f"c{i % 7}",
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def write_delimited(path: Path, records: list[dict[str, Any]], delimiter: str) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(records[0])
        writer.writerows(record.values() for record in records)
    return path


def write_parquet(path: Path, records: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def load(path: Path, **keys: Any) -> TextDataset:
    return load_dataset(DataConfig(path=str(path), **keys), seed=0)


def refused(path: Path, **keys: Any) -> str:
    """Return the sentence with which ``path`` is refused."""
    with pytest.raises(DataError) as caught:
        load(path, **keys)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize("labels", [("spam", "ham"), (0, 1), (2, 10)])
def test_all_formats_give_the_same_data_set(tmp_path: Path, labels: tuple[Any, ...]) -> None:
    records = rows(labels=labels)
    plain = write_delimited(tmp_path / "a.csv", records, ",")
    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    loaded = [
        load(path, client="owner")
        for path in (
            plain,
            packed,
            write_delimited(tmp_path / "c.tsv", records, "\t"),
            write_jsonl(tmp_path / "d.jsonl", records),
            write_jsonl(tmp_path / "e.jsonl.gz", records),
            write_parquet(tmp_path / "f.parquet", records),
        )
    ]
    assert len({data.digest for data in loaded}) == 1
    first = loaded[0]
    assert first.label_names == tuple(map(str, sorted(labels)))
    assert len(first.train) + len(first.test) == len(records)
    assert first.train.clients is not None
    assert set(first.train.clients) <= {f"c{i}" for i in range(7)}
    by_text = {record["text"]: record for record in records}
    for text, label, client in zip(first.train.texts, first.train.labels, first.train.clients, strict=True):
        assert str(by_text[text]["label"]) == first.label_names[label]
        assert by_text[text]["owner"] == client


def test_columns_can_be_named(tmp_path: Path) -> None:
    records = [{"body": row["text"], "kind": row["label"]} for row in rows()]
    data = load(write_jsonl(tmp_path / "a.jsonl", records), text="body", label="kind")
    assert data.label_names == ("ham", "spam")
    assert data.train.clients is None


def test_integer_labels_take_their_names_from_the_label_name_column(tmp_path: Path) -> None:
    records = [{**row, "label_name": ["no", "yes"][row["label"]]} for row in rows(labels=(0, 1))]
    assert load(write_jsonl(tmp_path / "a.jsonl", records)).label_names == ("no", "yes")
    records[5]["label_name"] = "no"
    assert "names label 1 'no', earlier rows 'yes'" in refused(write_jsonl(tmp_path / "a.jsonl", records))


def test_a_text_may_hold_quotes_line_separators_and_more_than_128_kib(tmp_path: Path) -> None:
    records = rows()
    records[0]["text"] = 'he said "no",\nand \u2028 left ' + "on " * 70_000
    paths = [
        write_delimited(tmp_path / "a.csv", records, ","),
        write_jsonl(tmp_path / "a.jsonl", records),
    ]
    limit = csv.field_size_limit()
    assert len({load(path).digest for path in paths}) == 1
    assert csv.field_size_limit() == limit


def test_a_quote_in_tsv_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    body = "".join(f'"{row["text"]}\t{row["label"]}\n' for row in rows())
    path.write_text("text\tlabel\n" + body, encoding="utf-8")
    assert all(text.startswith('"') for text in load(path).train.texts)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = write_delimited(tmp_path / "a.csv", rows(), ",")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load(path).train) > 0


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows())
    message = refused(tmp_path / "trian.jsonl")
    assert "trian.jsonl' is not there, expected a file. Did you mean 'train.jsonl'?" in message


def test_missing_test_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", rows())
    assert "is not there" in refused(path, test_path=str(tmp_path / "no" / "test.jsonl"))


def test_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").mkdir()
    assert "is a folder, expected a file" in refused(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("name", "extension"), [("a.xlsx", ".xlsx"), ("a", ""), ("a.txt.gz", ".txt.gz"), ("b.parquet.gz", "")]
)
def test_unknown_extension(tmp_path: Path, name: str, extension: str) -> None:
    (tmp_path / name).write_text("text,label\n")
    message = refused(tmp_path / name)
    assert f"has the extension '{extension}" in message
    assert "expected .csv, .tsv, .jsonl (each also with .gz) or .parquet" in message


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\n", "\ufeff"])
def test_empty_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert "is empty, expected labelled texts" in refused(tmp_path / name)


def test_header_without_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n")
    assert "has no rows, expected labelled texts" in refused(tmp_path / "a.csv")


def test_missing_column_names_what_there_is_and_the_nearest(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"texts": r["text"], "label": r["label"]} for r in rows()])
    message = refused(path)
    assert "has no column 'text', only 'texts', 'label'. Did you mean 'texts'? Set [data] text" in message
    assert "has no column 'who'" in refused(path, text="texts", client="who")


def test_not_utf8_names_the_byte_and_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\ngood day to you,a\ncafé au lait,b\n".encode("latin1"))
    assert "has byte 0xe9 at offset 32 (line 3), expected UTF-8" in refused(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert "has byte 0xe9 at offset 35 (line 3)" in refused(path)


def test_damaged_gzip(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl.gz", rows())
    whole = path.read_bytes()
    for raw in (whole[:-20], b"not gzip at all", whole[:40] + b"\x00" * 20 + whole[60:]):
        path.write_bytes(raw)
        assert "is not a whole gzip file" in refused(path)


def test_malformed_json_names_the_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(3))
    path.write_text(path.read_text(encoding="utf-8") + "\n{'text': 'b'}\n", encoding="utf-8")
    assert "is not JSON in line 5" in refused(path)
    path.write_text('{"text": "a b c", "label": 1}\n[1, 2]\n')
    assert "has a JSON list in line 2, expected an object" in refused(path)


def test_ragged_and_badly_quoted_csv_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na b c,x\nd, e, f,y\n")
    assert "has 4 fields in line 3, expected the 2 of the header" in refused(path)
    path.write_text('text,label\n"never closed,x\n')
    assert "is not well-formed near line 2" in refused(path)
    path.write_text("text,text\na,b\n")
    assert "names a column twice" in refused(path)


def test_damaged_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no such thing")
    assert "is not a parquet file" in refused(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("text", None, "null as its text"),
        ("text", 7, "7 (int) as its text"),
        ("text", float("nan"), "NaN as its text"),
        ("label", None, "null as its label"),
        ("label", float("nan"), "NaN as its label"),
        ("label", 1.5, "1.5 (float) as its label"),
        ("label", True, "True (bool) as its label"),
        ("label", "", "empty as its label"),
        ("owner", None, "null as its client"),
        ("owner", ["a"], "['a'] (list) as its client"),
    ],
)
def test_bad_value_names_the_row(tmp_path: Path, key: str, value: object, found: str) -> None:
    records = rows()
    records[4][key] = value
    message = refused(write_jsonl(tmp_path / "a.jsonl", records), client="owner")
    assert f"data row 5 has {found}, expected " in message


def test_a_missing_key_is_null(tmp_path: Path) -> None:
    records = rows()
    del records[2]["label"]
    assert "data row 3 has null as its label" in refused(write_jsonl(tmp_path / "a.jsonl", records))


def test_rows_without_text_are_dropped_and_counted(tmp_path: Path) -> None:
    records = rows()
    for i in (3, 4):
        records[i]["text"] = " \t" * i
    data = load(write_jsonl(tmp_path / "a.jsonl", records))
    assert len(data.train) + len(data.test) == len(records) - 2
    assert data.notes[0] == "2 rows without text dropped"
    empty = write_jsonl(tmp_path / "b.jsonl", [{"text": "", "label": "x"}] * 3)
    assert "All 3 texts of" in refused(empty)


def test_mixed_labels(tmp_path: Path) -> None:
    message = refused(write_jsonl(tmp_path / "a.jsonl", rows(labels=("spam", 1))))
    assert "mixes kinds of labels (str in data row 1 and int in data row 2)" in message


def test_single_class(tmp_path: Path) -> None:
    message = refused(write_jsonl(tmp_path / "a.jsonl", rows(labels=("spam",))))
    assert "have the label 'spam', expected two classes or more" in message


def test_unseen_test_label_names_the_label_and_its_rows(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", rows(40))
    test = write_jsonl(tmp_path / "b.jsonl", [*rows(60)[40:], {"text": "x y z", "label": "eggs"}])
    message = refused(train, test_path=str(test))
    assert "test label 'eggs' in 1 row of" in message
    assert "is not among the training labels" in message


def test_a_test_file_whose_string_labels_all_look_like_integers(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", rows(40, labels=("1", "one")))
    test = write_jsonl(tmp_path / "b.jsonl", rows(60, labels=("1",))[40:])
    data = load(train, test_path=str(test))
    assert data.label_names == ("1", "one")
    assert set(data.test.labels.tolist()) == {0}


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({}, "neither name nor path"),
        ({"name": "pydoc", "path": "a.csv"}, "both name = 'pydoc' and path = 'a.csv'"),
        ({"name": "pydoc", "test_path": "a.csv"}, "test_path = 'a.csv' with name"),
        ({"path": "a.csv", "subset": "x"}, "subset = 'x' with path"),
        ({"path": "a.csv", "text": "a", "label": "a"}, "expected different columns"),
    ],
)
def test_contradictions_are_config_errors(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match="expected") as caught:
        DataConfig(**keys)
    assert sentence in str(caught.value)


def test_a_built_in_has_no_subset_and_fixed_columns() -> None:
    with pytest.raises(ConfigError, match="has none"):
        load_dataset(DataConfig(name="pydoc", subset="x"), seed=0)
    with pytest.raises(ConfigError, match="has the columns text, label, client_id"):
        load_dataset(DataConfig(name="pydoc", label="topic"), seed=0)
