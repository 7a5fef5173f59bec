"""Datasets: orders, splits, sizes, fingerprints, what is kept on disk, and errors."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import struct
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from helpers import data, shapes
from helpers.config import Study
from helpers.data import (
    DATASETS,
    SPLITS,
    Dataset,
    Split,
    channel_statistics,
    check_dataset,
    stratified_order,
    study_data,
)

SIZES = {"train_size": 60, "validation_size": 20, "test_size": 30}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)


def parts(dataset: Dataset) -> list[Split]:
    return [getattr(dataset, name) for name in SPLITS]


def hashes(split: Split) -> list[bytes]:
    return [hashlib.sha256(image.numpy().tobytes()).digest() for image in split.images]


def pairs(split: Split) -> Counter:
    """The split's images as H x W x 3 bytes, each with its label, in no order."""
    pixels = split.images.permute(0, 2, 3, 1).contiguous().numpy()
    return Counter((p.tobytes(), k) for p, k in zip(pixels, split.labels.tolist(), strict=True))


def same(a: Split, b: Split) -> bool:
    """Whether a is the beginning of b."""
    b = b.first(len(a))
    masks = a.masks is None or torch.equal(a.masks, b.masks)
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and masks


# --- Orders, cuts and fingerprints -------------------------------------------------------------


@pytest.mark.parametrize("counts", [(40, 40, 40), (100, 30, 5), (300, 1, 1), (7,)])
def test_every_prefix_of_a_stratified_order_holds_the_classes_in_proportion(
    counts: tuple[int, ...],
) -> None:
    labels = np.repeat(np.arange(len(counts)) * 3, counts)
    np.random.default_rng(0).shuffle(labels)
    order = stratified_order(labels, seed=1)
    assert sorted(order.tolist()) == list(range(len(labels)))
    seen = np.stack([np.cumsum(labels[order] == 3 * k) for k in range(len(counts))], axis=1)
    share, half = seen / counts, 0.5 / np.array(counts)
    differences = np.abs(share[:, :, None] - share[:, None, :])
    assert (differences <= half[:, None] + half + 1e-9).all()


def test_stratified_order_is_seeded_and_shuffles() -> None:
    labels = np.repeat(np.arange(4), 50)
    first, again, other = (stratified_order(labels, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.9 and (first != np.arange(200)).mean() > 0.9
    # Nor do the classes come in a fixed sequence.
    assert len({tuple(labels[first][i : i + 4]) for i in range(0, 200, 4)}) > 10


def test_a_cut_takes_its_share_of_every_class() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), (100, 20, 2)))
    part, rest = data.cut(labels, 0.1)
    assert sorted([*part, *rest]) == list(range(122))
    assert np.bincount(labels[part]).tolist() == [10, 2, 1]  # at least one image a class
    np.testing.assert_array_equal(part, data.cut(labels, 0.1)[0])


def test_fingerprint_sees_pixels_shapes_and_types() -> None:
    array = np.arange(12, dtype=np.uint8)
    changed = array.copy()
    changed[7] ^= 1
    variants = [(array,), (changed,), (array.reshape(3, 4),), (array.astype(np.uint16),)]
    variants += [(array, array), (array[:6], array[6:])]
    prints = {data.fingerprint(*arrays) for arrays in variants}
    assert len(prints) == len(variants)
    assert all(len(p) == 16 and set(p) <= set("0123456789abcdef") for p in prints)
    strided = np.stack([array, array], axis=1)[:, 0]
    assert data.fingerprint(strided) == data.fingerprint(array)


def test_first_keeps_everything_together() -> None:
    images = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8)
    masks = torch.rand(23, 8, 8) > 0.5
    split = Split(images, torch.arange(23), masks, ~masks)
    for count, expected in ((3, 3), (None, 23)):
        part = split.first(count)
        assert len(part) == expected and torch.equal(part.labels, torch.arange(expected))
        assert same(part, split) and torch.equal(part.mark_masks, ~masks[:expected])
    assert Split(images, split.labels).first(1).masks is None


# --- Splits of every dataset -------------------------------------------------------------------


@pytest.fixture(params=["digits", "shapes", "shapes-marked", "folder", "folder without test"])
def dataset(
    request: pytest.FixtureRequest,
    image_folder: Callable[..., Path],
    load: Callable[..., Dataset],
) -> Dataset:
    if "folder" in request.param:
        return load(image_folder(train=20, test=0 if "without" in request.param else 4))
    if "shapes" in request.param:
        return load(request.param, train_size=300, validation_size=40, test_size=60)
    return load(request.param)


def test_splits_are_rgb_uint8_stratified_and_disjoint(dataset: Dataset) -> None:
    size, classes = dataset.image_size, len(dataset.classes)
    for split in parts(dataset):
        assert split.images.shape == (len(split), 3, size, size) and split.images.is_contiguous()
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        if split.masks is not None:
            assert split.masks.shape == (len(split), size, size)
            assert split.masks.dtype == torch.bool
        counts = np.bincount(split.labels)
        assert len(counts) == classes and counts.min() > 0
        assert counts.max() - counts.min() <= (3 if dataset.name != "digits" else 20)
        half = np.bincount(split.labels[: len(split) // 2], minlength=classes)
        assert (np.abs(half - counts / 2) <= 1).all()
    everything = [h for split in parts(dataset) for h in hashes(split)]
    twins = 4 if dataset.name == "digits" else 0  # scikit-learn's digits hold a few
    assert len(everything) - len(set(everything)) <= twins


def test_digits_are_scikit_learns(load: Callable[..., Dataset]) -> None:
    dataset, bunch = load("digits", image_size=8), load_digits()
    assert (dataset.title, dataset.flippable, dataset.classes[3]) == ("Digits", False, "3")
    sizes = [len(split) for split in parts(dataset)]
    assert sizes[2] / 1797 == pytest.approx(0.2, abs=0.01)
    assert sizes[1] / (1797 - sizes[2]) == pytest.approx(0.1, abs=0.01)
    gray = np.round(bunch.images * 255 / 16).astype(np.uint8)
    rgb = torch.from_numpy(np.repeat(gray[:, None], 3, axis=1))
    original = pairs(Split(rgb, torch.from_numpy(bunch.target)))
    assert sum(map(pairs, parts(dataset)), Counter()) == original
    assert load("digits").image_size == 32


def test_shapes_come_with_masks_and_marks(load: Callable[..., Dataset]) -> None:
    plain, marked = (load(name, **SIZES) for name in ("shapes", "shapes-marked"))
    assert plain.title == "Shapes" and plain.classes == shapes.CLASSES and plain.flippable
    assert plain.test.masks.flatten(1).any(1).all() and plain.test.mark_masks is None
    assert marked.test.mark_masks.flatten(1).any(1).all()
    assert plain.fingerprint != marked.fingerprint
    outside = ~marked.test.mark_masks[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(plain.test.images[outside], marked.test.images[outside])
    assert not torch.equal(plain.test.images, marked.test.images)


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_sizes_keep_nested_subsets_and_the_fingerprint(
    name: str, load: Callable[..., Dataset]
) -> None:
    small = load(name, **SIZES)
    large = load(name, train_size=250, validation_size=40, test_size=60)
    assert [len(split) for split in parts(small)] == [60, 20, 30]
    assert [len(split) for split in parts(large)] == [250, 40, 60]
    assert small.fingerprint == large.fingerprint
    assert all(same(a, b) for a, b in zip(parts(small), parts(large), strict=True))
    assert np.ptp(np.bincount(small.train.labels, minlength=10)) <= 1
    other = load(name, image_size=24, **SIZES)
    assert other.image_size == 24 and other.fingerprint != small.fingerprint
    assert torch.equal(other.train.labels, small.train.labels)


def test_a_study_gets_its_profiles_sizes_capped_by_what_exists(
    study: Study, image_folder: Callable[..., Path]
) -> None:
    shaped = study_data(study)
    assert [len(split) for split in parts(shaped)] == [120, 40, 60] and shaped.image_size == 16
    assert study_data(study, "digits", train_size=70, image_size=8).train.images.shape[::3] == (
        70,
        8,
    )
    folder = replace(study, dataset=str(image_folder()))
    assert [len(split) for split in parts(study_data(folder))] == [18, 2, 4]
    assert len(study_data(folder, test_size=None).test) == 4


# --- Sizes and names that are refused ----------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "shapes", "folder"])
def test_sizes_out_of_range_are_refused(
    name: str, image_folder: Callable[..., Path], load: Callable[..., Dataset]
) -> None:
    there = {"train": 18, "validation": 2, "test": 4}
    name = str(image_folder()) if name == "folder" else name
    for split, count in there.items():
        for size in (0, -5):
            with pytest.raises(ValueError, match=f"{split}_size is {size}; expected a number"):
                load(name, **{f"{split}_size": size})
        if "pets" in name:
            with pytest.raises(ValueError, match=f"{split}_size is .* pets has {count} {split} im"):
                load(name, **{f"{split}_size": count + 1})
    for size in (7, 4097, -1):
        with pytest.raises(ValueError, match=f"image_size is {size}; expected 8 to 4096"):
            load(name, image_size=size)


def test_what_cant_be_loaded_is_explained(load: Callable[..., Dataset]) -> None:
    with pytest.raises(ValueError, match="9 training images don't cover the 10 classes of Digits"):
        load("digits", train_size=9)
    for name in ("cifar", "CIFAR10", "shapes ", "", "a/\0"):
        for ask in (load, check_dataset):
            with pytest.raises(ValueError) as caught:
                ask(name)
            message = str(caught.value)
            assert repr(name) in message and f"./{name}" in message
            assert all(f" {known}" in message for known in DATASETS)
    assert check_dataset("cifar10") is None, "nothing is downloaded"
    with pytest.raises(FileNotFoundError, match="nowhere has no folder train"):
        check_dataset("./nowhere")


# --- Folders -----------------------------------------------------------------------------------


def test_a_folder_gives_its_images_under_their_labels(
    image_folder: Callable[..., Path], load: Callable[..., Dataset]
) -> None:
    folder = image_folder()
    dataset = load(folder)
    assert (dataset.classes, dataset.title) == (("cat", "dog"), "pets")
    assert dataset.flippable and dataset.image_size == 12
    listed = {
        part: Counter(
            (np.asarray(Image.open(path)).tobytes(), label)
            for label, name in enumerate(dataset.classes)
            for path in (folder / part / name).iterdir()
        )
        for part in ("train", "test")
    }
    assert pairs(dataset.test) == listed["test"]
    assert pairs(dataset.train) + pairs(dataset.validation) == listed["train"]
    subset = load(folder, train_size=6, validation_size=1, test_size=2)
    assert subset.fingerprint == dataset.fingerprint
    assert all(same(a, b) for a, b in zip(parts(subset), parts(dataset), strict=True))


@pytest.mark.parametrize(("images", "sizes"), [(20, [14, 2, 4]), (3, [1, 1, 1])])
def test_without_a_test_folder_a_fifth_is_cut(
    image_folder: Callable[..., Path], load: Callable[..., Dataset], images: int, sizes: list[int]
) -> None:
    dataset = load(image_folder(train=images, test=0))
    found = [np.bincount(split.labels).tolist() for split in parts(dataset)]
    assert found == [[size, size] for size in sizes]


def test_a_folder_is_decoded_once(
    image_folder: Callable[..., Path], load: Callable[..., Dataset], tmp_path: Path
) -> None:
    folder = image_folder()
    path = folder / "train" / "cat" / "04.png"
    first, small = load(folder), load(folder, image_size=8)
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))  # as large and as old, but no image
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    # Another data folder stands for another process: it holds nothing in memory.
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    again = load(folder, data_dir=tmp_path / "copy")
    assert again.fingerprint == first.fingerprint and again.classes == first.classes
    assert all(same(a, b) for a, b in zip(parts(again), parts(first), strict=True))
    assert load(folder, image_size=8, data_dir=tmp_path / "copy").fingerprint == small.fingerprint
    with pytest.raises(ValueError, match=f"{path} can't be read as an image"):
        load(folder, data_dir=tmp_path / "empty")


@pytest.mark.parametrize("change", ["pixel", "label", "added", "removed", "test"])
def test_a_changed_folder_has_another_fingerprint(
    image_folder: Callable[..., Path], load: Callable[..., Dataset], change: str
) -> None:
    folder = image_folder()
    before, path = load(folder), folder / "train" / "cat" / "04.png"
    pixels = np.array(Image.open(path))
    pixels[3, 5, 1] ^= 1
    if change == "pixel":
        Image.fromarray(pixels).save(path)
    elif change == "label":
        path.rename(folder / "train" / "dog" / "10.png")
    elif change == "removed":
        path.unlink()
    else:
        place = folder / "train" / "cat" / "99.png"
        Image.fromarray(pixels).save(place if change == "added" else folder / "test/dog/00.png")
    assert load(folder).fingerprint != before.fingerprint


def test_the_fingerprint_is_of_pixels_and_labels_not_of_names_or_places(
    image_folder: Callable[..., Path], load: Callable[..., Dataset], tmp_path: Path
) -> None:
    folder = image_folder()
    before, copy = load(folder), tmp_path / "elsewhere" / "animals"
    shutil.copytree(folder, copy)
    for path in sorted(copy.rglob("*.png")):
        Image.open(path).save(path.with_suffix(".tiff"))
        path.unlink()
    after = load(copy)
    assert (after.fingerprint, after.title) == (before.fingerprint, "animals")
    assert hashes(after.train) == hashes(before.train)


def test_folders_of_one_name_are_told_apart(
    image_folder: Callable[..., Path],
    load: Callable[..., Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image_folder("a/pets")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / "pets" / "train" / "cat" / "00.png"
    stat = path.stat()
    Image.fromarray(255 - np.array(Image.open(path))).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size, "noise can't be compressed"
    prints = []
    for place in "ab":  # a relative path follows the working directory
        monkeypatch.chdir(tmp_path / place)
        prints.append(load("./pets").fingerprint)
    assert len(set(prints)) == 2


class Planted:
    """What a pickle would run: it leaves a folder behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["shapes", "folder"])
@pytest.mark.parametrize("damage", ["byte", "cut", "emptied", "pickle"])
def test_what_is_kept_and_damaged_is_made_again_and_nothing_in_it_executed(
    image_folder: Callable[..., Path],
    load: Callable[..., Dataset],
    tmp_path: Path,
    name: str,
    damage: str,
) -> None:
    name = str(image_folder()) if name == "folder" else name
    sizes = {"train_size": 10, "validation_size": 2, "test_size": 4, "image_size": 16}
    first, trace = load(name, **sizes), tmp_path / "executed"
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    stored = [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    for path in stored:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        if damage == "pickle":
            np.savez(path, images=np.array([Planted(trace)], dtype=object))
        else:
            path.write_bytes(content[: {"byte": None, "cut": -3, "emptied": 0}[damage]])
    again = load(name, data_dir=tmp_path / "copy", **sizes)
    assert stored and again.fingerprint == first.fingerprint
    assert all(same(a, b) for a, b in zip(parts(again), parts(first), strict=True))
    assert not trace.exists()


def test_drawn_splits_are_kept_for_the_program_that_drew_them(
    load: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, drawn, draw = load("shapes", **SIZES), [], shapes.draw
    monkeypatch.setattr(shapes, "draw", lambda *a, **k: drawn.append(1) or draw(*a, **k))
    for copy in ("copy", "other"):
        shutil.copytree(tmp_path / "data", tmp_path / copy)
    again = load("shapes", data_dir=tmp_path / "copy", **SIZES)
    assert not drawn and again.fingerprint == first.fingerprint
    assert all(same(a, b) for a, b in zip(parts(again), parts(first), strict=True))
    monkeypatch.setattr(cv2, "__version__", "0.0")  # another may draw other pixels
    load("shapes", data_dir=tmp_path / "other", **SIZES)
    assert len(drawn) == 3


# --- torchvision's datasets --------------------------------------------------------------------


class FakeSet:
    """Stands for torchvision's dataset classes."""

    shape: tuple[int, ...] = (32, 32, 3)
    classes = [f"class {i}" for i in range(10)]

    def __init__(
        self, root: Path, *, download: bool, train: bool = True, split: str = "train"
    ) -> None:
        assert download and isinstance(root, Path)
        count = 200 if train and split == "train" else 50
        self.labels = np.arange(count) % 10
        generator = np.random.default_rng(count)
        self.data = generator.integers(0, 256, (count, *self.shape), dtype=np.uint8)

    @property
    def targets(self) -> list[int]:
        return self.labels.tolist()


class FakeFashion(FakeSet):
    shape = (28, 28)

    def __init__(self, root: Path, **options: object) -> None:
        super().__init__(root, **options)
        self.data = torch.from_numpy(self.data)

    @property
    def targets(self) -> torch.Tensor:
        return torch.from_numpy(self.labels)


class FakeSVHN(FakeSet):
    shape = (3, 32, 32)
    targets = None


@pytest.mark.parametrize("name", data.TORCHVISION_SETS)
def test_torchvisions_datasets(
    name: str, load: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    title, class_name, flippable = data.TORCHVISION_SETS[name]
    with pytest.raises(FileNotFoundError) as caught:  # the real one, which isn't there
        load(name)
    for word in (title, class_name, "data", "failed", "train/<class>/*", "shapes", "digits"):
        assert word in str(caught.value)
    kind = {"fashion-mnist": FakeFashion, "svhn": FakeSVHN}.get(name, FakeSet)
    monkeypatch.setattr(torchvision.datasets, class_name, kind)
    dataset = load(name)
    assert [len(split) for split in parts(dataset)] == [180, 20, 50]
    assert (dataset.title, dataset.flippable) == (title, name != "svhn") == (title, flippable)
    assert dataset.classes == (tuple("0123456789") if name == "svhn" else tuple(FakeSet.classes))
    original = kind(Path(), download=True, split="test")
    pixels = torch.as_tensor(original.data)
    if name == "fashion-mnist":
        pixels = pixels[:, None].repeat(1, 3, 1, 1)
    elif name != "svhn":
        pixels = pixels.permute(0, 3, 1, 2)
    assert pairs(dataset.test) == pairs(Split(pixels, torch.from_numpy(original.labels)))
    assert load(name, image_size=16).image_size == 16


def test_torchvisions_own_files_are_read_without_a_network(
    tmp_path: Path, load: Callable[..., Dataset]
) -> None:
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            shape = struct.pack(f">{array.ndim}I", *array.shape)
            header = struct.pack(">HBB", 0, 8, array.ndim) + shape
            (raw / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    dataset = load("fashion-mnist")
    assert [len(split) for split in parts(dataset)] == [30, 10, 20]
    assert dataset.classes[9] == "Ankle boot"


def test_cifar_files_are_verified_by_their_checksums(
    tmp_path: Path, load: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, kind, sums = tmp_path / "data" / "cifar-10-batches-py", torchvision.datasets.CIFAR10, {}
    base.mkdir(parents=True)
    for name, seed in (("data_batch_1", 0), ("test_batch", 1), ("batches.meta", None)):
        content: dict[str, Any] = {"label_names": [f"c{i}" for i in range(10)]}
        if seed is not None:
            pixels = np.random.default_rng(seed).integers(0, 256, (20, 3072), dtype=np.uint8)
            content = {"data": pixels, "labels": [i % 10 for i in range(20)]}
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums["batches.meta"]})
    assert load("cifar10").classes[7] == "c7"
    content = bytearray((base / "test_batch").read_bytes())
    content[-2000] ^= 1
    (base / "test_batch").write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 isn't in .* no network in tests"):
        load("cifar10", image_size=16)


# --- Channel statistics ------------------------------------------------------------------------


def test_channel_statistics_are_numpys_in_float64() -> None:
    # More images than are counted at once, with unlike channels.
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5000, 3, 9, 7)))
    images = torch.stack([images[:, 0], images[:, 1] // 3, 200 + images[:, 2] // 20], 1).byte()
    pixels = images.numpy().astype(np.float64) / 255
    mean, std = channel_statistics(images)
    assert mean.dtype == std.dtype == torch.float32 and mean.shape == std.shape == (3,)
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-7)


def test_channel_statistics_are_those_of_the_training_images_kept(
    load: Callable[..., Dataset],
) -> None:
    whole, subset = load("digits"), load("digits", train_size=40)
    expected = subset.train.images.double().div(255).mean((0, 2, 3))
    torch.testing.assert_close(subset.channel_statistics[0].double(), expected)
    assert not torch.equal(whole.channel_statistics[0], subset.channel_statistics[0])


def test_a_constant_channel_is_divided_by_one() -> None:
    images = torch.zeros(4, 3, 5, 5, dtype=torch.uint8)
    images[:, 1] = 255
    images[:, 2, 0] = 10
    mean, std = channel_statistics(images)
    assert mean.tolist()[:2] == [0, 1] and std.tolist()[:2] == [1, 1]
    assert 0 < std[2] < 1
