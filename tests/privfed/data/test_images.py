"""Images: files, duplicates, the fixed split, the digest, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from privfed.data import DataConfig, load_dataset, partition
from privfed.data.images import ImageDataset, image_hash
from privfed.data.partitioners.by_column import ByColumnPartition
from privfed.data.partitioners.dirichlet import DirichletPartition
from privfed.data.partitioners.iid import IidPartition
from privfed.data.partitioners.quantity import QuantityPartition
from privfed.errors import ConfigError, DataError

COUNT = 120


def pixels(count: int = COUNT, shape: tuple[int, ...] = (6, 5), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write(path: Path, *, metadata: Any = None, **tensors: np.ndarray) -> Path:
    save_file(tensors, path, metadata=metadata)
    return path


def load(path: Path, *, seed: int = 1, **options: Any) -> ImageDataset:
    config = DataConfig(path=str(path), **options)
    found = load_dataset(config, seed=seed, task="image_classification")
    assert isinstance(found, ImageDataset)
    return found


def labels(count: int = COUNT, classes: int = 3) -> np.ndarray:
    return (np.arange(count) % classes).astype(np.int64)


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    return write(tmp_path / "grey.safetensors", images=pixels(), labels=labels())


def all_hashes(found: ImageDataset) -> set[str]:
    return {image_hash(image) for image in (*found.train.images, *found.test.images)}


def test_a_file_of_grey_images_keeps_every_pixel_and_its_label(grey: Path) -> None:
    found = load(grey)
    by_hash = {image_hash(image[..., None]): label for image, label in zip(pixels(), labels(), strict=True)}
    assert found.kind == "image"
    assert found.label_names == ("0", "1", "2")
    assert len(found.train) + len(found.test) == COUNT
    for split in (found.train, found.test):
        assert all(image.shape == (6, 5, 1) for image in split.images)
        assert [by_hash[image_hash(image)] for image in split.images] == split.labels.tolist()


def test_colour_images_have_their_channels_last(tmp_path: Path) -> None:
    path = write(tmp_path / "colour.safetensors", images=pixels(shape=(4, 4, 3)), labels=labels().astype(np.uint8))
    assert load(path).train.images[0].shape == (4, 4, 3)


def test_the_metadata_name_classes_and_clients(tmp_path: Path) -> None:
    metadata = {"label_names": json.dumps(["cat", "dog", "fox"]), "client_names": json.dumps({"7": "north"})}
    owners = np.where(np.arange(COUNT) < 60, 7, 9).astype(np.int32)
    path = write(tmp_path / "x.safetensors", images=pixels(), labels=labels(), client=owners, metadata=metadata)
    found = load(path)
    assert found.label_names == ("cat", "dog", "fox")
    assert found.train.clients is not None
    assert set(found.train.clients) == {"north", "9"}


def test_another_tensor_may_hold_the_clients(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", images=pixels(), labels=labels(), writer=labels(classes=4))
    assert load(path).train.clients is None
    assert set(load(path, client="writer").train.clients or ()) == {"0", "1", "2", "3"}
    with pytest.raises(DataError, match=r"no tensor 'writr'.*Did you mean 'writer'"):
        load(path, client="writr")


def test_exact_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    images = pixels()
    images[100:110] = images[0:10]  # 100 % 3 is 1, 0 % 3 is 0: every copy is labelled otherwise
    found = load(write(tmp_path / "x.safetensors", images=images, labels=labels()))
    assert len(found.train) + len(found.test) == COUNT - 10
    assert found.notes[0].startswith("10 duplicate images dropped, 10 of them labelled otherwise")


def test_images_of_other_shape_with_the_same_bytes_are_no_duplicates() -> None:
    image = pixels(1)[0]
    assert image_hash(image.reshape(6, 5, 1)) != image_hash(image.reshape(5, 6, 1))


def test_the_digest_names_the_images_whatever_a_run_chooses(tmp_path: Path, grey: Path) -> None:
    base = load(grey)
    order = np.random.default_rng(5).permutation(COUNT)
    shuffled = write(tmp_path / "s.safetensors", images=pixels()[order], labels=labels(classes=2)[order])
    assert load(shuffled).digest == base.digest
    for options in ({"limit": 20}, {"classes": [0, 1]}, {"test_fraction": 0.5}):
        assert load(grey, **options).digest == base.digest
    other = pixels()
    other[0, 0, 0] ^= 1
    assert load(write(tmp_path / "o.safetensors", images=other, labels=labels())).digest != base.digest


def test_the_split_depends_on_the_images_alone(tmp_path: Path, grey: Path) -> None:
    held = {image_hash(image) for image in load(grey, seed=1).test.images}
    order = np.random.default_rng(5).permutation(COUNT)
    shuffled = write(tmp_path / "s.safetensors", images=pixels()[order], labels=labels()[order])
    assert {image_hash(image) for image in load(shuffled, seed=2).test.images} == held
    assert 0.08 < len(held) / COUNT < 0.35
    few = load(grey, limit=30)
    assert len(few.train) == 30
    assert {image_hash(image) for image in few.test.images} == held


def test_a_class_with_few_images_stays_in_training(tmp_path: Path) -> None:
    marks = labels(classes=2)
    marks[:1] = 9
    found = load(write(tmp_path / "x.safetensors", images=pixels(), labels=marks), test_fraction=0.9)
    assert "9" in found.label_names
    assert (found.train.labels == found.label_names.index("9")).sum() == 1


def test_a_test_file_is_left_as_it_is_and_never_trained_on(tmp_path: Path, grey: Path) -> None:
    test = write(tmp_path / "t.safetensors", images=pixels()[:30], labels=labels()[:30])
    found = load(grey, test_path=str(test))
    assert len(found.test) == 30
    assert len(found.train) == COUNT - 30
    assert not {image_hash(i) for i in found.train.images} & {image_hash(i) for i in found.test.images}
    assert "30 training images dropped for repeating a test image" in found.notes


def test_classes_keep_the_images_of_their_labels(tmp_path: Path) -> None:
    metadata = {"label_names": json.dumps(["cat", "dog", "fox"])}
    path = write(tmp_path / "x.safetensors", images=pixels(), labels=labels(), metadata=metadata)
    for classes in ([0, 2], ["cat", "fox"], ["2", 0]):
        found = load(path, classes=classes)
        assert found.label_names == ("cat", "fox")
        assert len(found.train) + len(found.test) == 80
    with pytest.raises(DataError, match=r"classes has 'doge', but no row .* Did you mean 'dog'"):
        load(path, classes=["cat", "doge"])


def test_digits_are_built_in() -> None:
    config = DataConfig(name="digits", classes=[5, 6, 7, 8, 9])
    found = load_dataset(config, seed=0, task="image_classification")
    assert isinstance(found, ImageDataset)
    assert found.label_names == ("5", "6", "7", "8", "9")
    assert len(found.train) + len(found.test) == 896
    assert found.train.images[0].shape == (8, 8, 1)
    assert max(int(image.max()) for image in found.train.images) == 255
    whole = load_dataset(DataConfig(name="digits"), seed=0, task="image_classification")
    assert whole.digest == found.digest
    assert len(whole.train) + len(whole.test) == 1797


@pytest.mark.parametrize(
    "spec",
    [
        IidPartition(clients=4),
        DirichletPartition(clients=4, alpha=0.5),
        QuantityPartition(clients=4),
        ByColumnPartition(),
    ],
    ids=lambda spec: spec.name,
)
def test_every_partitioner_divides_images(tmp_path: Path, spec: Any) -> None:
    path = write(tmp_path / "x.safetensors", images=pixels(), labels=labels(), client=labels(classes=4))
    train = load(path).train
    shards = partition(train, spec, seed=3)
    rows = np.concatenate([shard.indices for shard in shards])
    assert len(shards) == 4
    assert sorted(rows.tolist()) == list(range(len(train)))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"images": pixels().astype(np.float32), "labels": labels()}, r"'images' of type F32, expected U8"),
        ({"images": np.full((9, 4, 4), np.nan, np.float32), "labels": labels(9)}, r"'images' of type F32"),
        ({"images": pixels(), "labels": labels().astype(np.float32)}, r"'labels' of type F32, expected integers"),
        ({"images": pixels(), "labels": labels(7)}, r"'labels' of shape \[7\], expected \[120\], one for each image"),
        ({"images": pixels(), "labels": labels()[:, None]}, r"'labels' of shape \[120, 1\], expected \[120\]"),
        ({"images": pixels(), "labels": labels(), "client": labels(3)}, r"'client' of shape \[3\]"),
        ({"images": pixels()}, r"no tensor 'labels', only 'images'"),
        ({"image": pixels(), "labels": labels()}, r"no tensor 'images', only .*Did you mean 'image'"),
        ({"images": pixels(shape=()), "labels": labels()}, r"'images' of shape \[120\], expected \[N, H, W\]"),
        ({"images": pixels(shape=(3, 6, 6)), "labels": labels()}, r"6 channels, expected 1 to 4"),
        ({"images": pixels(0), "labels": labels(0)}, r"'images' of shape \[0, 6, 5\]"),
        ({"images": pixels(), "labels": labels(classes=1)}, r"label 0, expected two classes or more"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    path = write(tmp_path / "bad.safetensors", **tensors)
    with pytest.raises(DataError, match=message):
        load(path)


@pytest.mark.parametrize("names", ["cat,dog", '["a", "a", "b"]', '["a", 3]', "7", '{"one": "cat"}'])
def test_names_that_are_no_json_are_refused(tmp_path: Path, names: str) -> None:
    path = write(tmp_path / "x.safetensors", images=pixels(), labels=labels(), metadata={"label_names": names})
    with pytest.raises(DataError, match="metadata label_names"):
        load(path)


def test_a_label_unseen_in_training_is_refused(tmp_path: Path, grey: Path) -> None:
    test = write(tmp_path / "t.safetensors", images=pixels(9, seed=4), labels=np.full(9, 8))
    with pytest.raises(DataError, match=r"test label 8 in 9 rows of .*t\.safetensors is not among the training"):
        load(grey, test_path=str(test))


def test_what_is_no_file_of_images_is_refused(tmp_path: Path, grey: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x93NUMPY" + bytes(100))
    with pytest.raises(DataError, match="not a whole safetensors file"):
        load(broken)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(grey.read_bytes()[:-50])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        load(cut)
    with pytest.raises(DataError, match=r"'.*gray\.safetensors' is not there.*Did you mean 'grey\.safetensors'"):
        load(tmp_path / "gray.safetensors")
    with pytest.raises(ConfigError, match=r"rows\.csv' and model\.task is \"image_classification\""):
        load(tmp_path / "rows.csv")
    with pytest.raises(ConfigError, match=r"expected images \(\.safetensors\) in both"):
        load(grey, test_path="rows.csv")


def test_texts_and_images_are_told_apart(grey: Path) -> None:
    with pytest.raises(ConfigError, match=r"grey\.safetensors', a file of images, and model\.task is \"sequence"):
        load_dataset(DataConfig(path=str(grey)), seed=0)
    with pytest.raises(ConfigError, match=r"'digits' holds images .* set model\.task = \"image_classification\""):
        load_dataset(DataConfig(name="digits"), seed=0)
    with pytest.raises(ConfigError, match="'pydoc' holds no images"):
        load_dataset(DataConfig(name="pydoc"), seed=0, task="image_classification")
    with pytest.raises(ConfigError, match="'digits' has no natural clients"):
        load_dataset(DataConfig(name="digits", client="writer"), seed=0, task="image_classification")


def test_a_hub_data_set_with_a_column_of_images(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "site": datasets.Value("string"),
        }
    )
    rows = {"image": list(pixels(40, (5, 7, 3))), "label": [0, 1] * 20, "site": ["a", "b", "b", "c"] * 10}
    folder = tmp_path / "pictures"
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    config = DataConfig(name=str(folder), client="site")
    found = load_dataset(config, seed=0, task="image_classification")
    assert isinstance(found, ImageDataset)
    assert found.label_names == ("cat", "dog")
    assert set(found.train.clients or ()) == {"a", "b", "c"}
    assert all_hashes(found) == {image_hash(image) for image in pixels(40, (5, 7, 3))}
    with pytest.raises(DataError, match=r"no column 'picture', only 'image'"):
        load_dataset(DataConfig(name=str(folder), image="picture"), seed=0, task="image_classification")
    with pytest.raises(DataError, match=r"no images in its column 'site'"):
        load_dataset(DataConfig(name=str(folder), image="site"), seed=0, task="image_classification")


def test_classes_of_texts(text_csv: Path) -> None:
    whole = load_dataset(DataConfig(path=str(text_csv)), seed=0)
    found = load_dataset(DataConfig(path=str(text_csv), classes=["animals", "music"]), seed=0)
    assert found.label_names == ("animals", "music")
    assert len(found.train) + len(found.test) == 160
    assert found.digest == whole.digest
    with pytest.raises(ConfigError, match=r"classes .* which model\.task = \"causal_lm\" does not read"):
        load_dataset(DataConfig(path=str(text_csv), classes=["animals", "music"]), seed=0, task="causal_lm")
