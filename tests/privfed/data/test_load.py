"""What load_dataset adds: the limit, a given test split, the digest, the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from privfed.data import DataConfig, Split, load_dataset
from privfed.errors import DataError


def write(path: Path, pairs: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs))
    return str(path)


def pairs(count: int, word: str) -> list[tuple[str, str]]:
    return [(f"{word} {i} {word}", "ab"[i % 2]) for i in range(count)]


def test_limit_is_drawn_by_the_seed_and_leaves_the_test_side_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(200, "x"))
    whole = load_dataset(DataConfig(path=path), seed=1)
    config = DataConfig(path=path, limit=30)
    first, again, other = (load_dataset(config, seed=seed) for seed in (1, 1, 2))
    assert len(first.train) == 30
    assert first.train.texts == again.train.texts != other.train.texts
    assert first.test.texts == other.test.texts == whole.test.texts
    assert set(first.train.texts) < set(whole.train.texts)
    assert f"30 of {len(whole.train)} training rows used (limit)" in first.notes
    assert load_dataset(DataConfig(path=path), seed=2).digest == whole.digest == first.digest


def test_a_limit_that_leaves_one_class_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs(50, "x"))
    with pytest.raises(DataError, match="expected two classes or more"):
        load_dataset(DataConfig(path=path, limit=1), seed=1)


def test_a_given_test_split_stays_and_training_rows_that_repeat_it_go(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [*pairs(20, "x"), ("Y 0  y", "a"), ("X 1 x", "b")])
    test = write(tmp_path / "b.jsonl", pairs(10, "y"))
    data = load_dataset(DataConfig(path=train, test_path=test), seed=1)
    assert data.test.texts == tuple(text for text, _ in pairs(10, "y"))
    assert data.train.texts == tuple(text for text, _ in pairs(20, "x"))
    assert data.notes == ("1 duplicate row dropped", "1 training row dropped for repeating a test row")
    with pytest.raises(DataError, match="Every training row of"):
        load_dataset(DataConfig(path=test, test_path=test), seed=1)


def test_the_digest_is_of_the_texts_and_of_nothing_that_a_run_chooses(tmp_path: Path) -> None:
    def digest(rows: list[tuple[str, str]], **keys: object) -> str:
        path = write(tmp_path / "a.jsonl", rows)
        return load_dataset(DataConfig(path=path, **keys), seed=1).digest

    rows = pairs(40, "x")
    test = write(tmp_path / "b.jsonl", [*pairs(10, "y"), rows[3]])
    # A known answer: the digest must be the same on every machine and in every release.
    known = digest(rows)
    assert known == "7ca3ed7e43cd00668a37f5e1e930e1c16610e97087c9107e335d812c385d4488"
    # a budget belongs to the texts: no other order, label, split or limit opens a fresh account for them
    assert digest(rows[::-1]) == known
    assert digest([(text, "b" if label == "a" else "a") for text, label in rows]) == known
    assert digest(rows, test_fraction=0.5) == digest(rows, limit=10) == digest(rows, test_path=test) == known
    assert digest([("another text", rows[0][1]), *rows[1:]]) != known


def test_a_split_is_frozen() -> None:
    split = Split(texts=("a",), labels=np.array([0]), clients=None)
    with pytest.raises(ValueError, match="read-only"):
        split.labels[0] = 1
    with pytest.raises(ValueError, match="one length"):
        Split(texts=("a",), labels=np.array([0, 1]), clients=None)


HUB_SCRIPT = """
import json, sys
from privfed.data import DataConfig, load_dataset
from privfed.errors import DataError

def attempt(**keys):
    try:
        data = load_dataset(DataConfig(**keys), seed=0)
    except DataError as error:
        return str(error)
    return [len(data.train), list(data.test.texts), list(data.label_names), list(data.notes), data.source]

folder = sys.argv[1]
print(json.dumps({
    "whole": attempt(name=folder + "/whole"),
    "unlabelled": attempt(name=folder + "/unlabelled"),
    "no_test": attempt(name=folder + "/no_test"),
    "no_train": attempt(name=folder + "/no_train"),
    "column": attempt(name=folder + "/whole", text="body"),
    "offline": attempt(name="someone/some-data"),
    "typo": attempt(name="pydocs"),
}))
"""


def write_hub_folder(folder: Path, splits: dict[str, list[tuple[str, int]]]) -> None:
    """Write a data set as the hub keeps it: parquet files whose schema names the classes."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    folder.mkdir()
    for split, rows in splits.items():
        columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


@pytest.mark.slow
def test_the_hub_through_the_real_library_without_a_network(tmp_path: Path) -> None:
    train = [(f"x {i} x", i % 2) for i in range(40)]
    held = [(f"y {i} y", i % 2) for i in range(4)]
    hidden = [(f"z {i} z", -1) for i in range(4)]
    write_hub_folder(tmp_path / "whole", {"train": train, "test": held})
    write_hub_folder(tmp_path / "unlabelled", {"train": train, "validation": held, "test": hidden})
    write_hub_folder(tmp_path / "no_test", {"train": train})
    write_hub_folder(tmp_path / "no_train", {"test": held})
    script = subprocess.run(
        [sys.executable, "-W", "error", "-c", HUB_SCRIPT, str(tmp_path)],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert script.returncode == 0, script.stderr
    results = json.loads(script.stdout.splitlines()[-1])
    for name, split in (("whole", "test"), ("unlabelled", "validation")):
        count, texts, names, notes, source = results[name]
        assert (count, texts, names) == (40, [text for text, _ in held], ["no", "yes"])
        assert notes == [f"tested on the split {split!r}"]
        assert source.startswith("The hub data set ")
    assert results["no_test"][0] + len(results["no_test"][1]) == 40
    assert "has the splits 'test', expected 'train'" in results["no_train"]
    assert "has no column 'body', only 'text', 'label'" in results["column"]
    offline = results["offline"]
    assert "'someone/some-data' is not built in and could not be had from the Hugging Face hub" in offline
    assert "OfflineModeIsEnabled" in offline
    assert "Set [data] path to a csv" in offline
    assert "run once online" in offline
    assert "Did you mean 'pydoc'?" in results["typo"]


def test_importing_the_package_and_its_plug_ins_loads_nothing_heavy() -> None:
    code = (
        "import sys; from privfed.data import PARTITIONERS, SOURCES; PARTITIONERS.names(); SOURCES.names();"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'pandas', 'datasketch'} & set(sys.modules);"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
