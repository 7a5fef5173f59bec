"""Datasets: orders, splits, sizes, fingerprints, what is kept on disk, and errors."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import struct
import tarfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from helpers import data, folders, shapes
from helpers.config import Study
from helpers.data import (
    DATASETS,
    SPLITS,
    TITLES,
    Dataset,
    Split,
    cached,
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
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)


def parts(dataset: Dataset) -> list[Split]:
    return [getattr(dataset, name) for name in SPLITS]


def pairs(split: Split) -> Counter:
    """The split's images as H x W x 3 bytes, each with its label, in no order."""
    pixels = split.images.permute(0, 2, 3, 1).contiguous().numpy()
    return counted(pixels, split.labels.tolist())


def counted(images: np.ndarray, labels: list[int]) -> Counter:
    return Counter((image.tobytes(), k) for image, k in zip(images, labels, strict=True))


def same(small: Split, large: Split) -> bool:
    """Whether the small split is the beginning of the large one."""
    both = zip(vars(small).values(), vars(large.first(len(small))).values(), strict=True)
    return all(a is b or torch.equal(a, b) for a, b in both)


def agree(small: Dataset, large: Dataset) -> bool:
    """Whether two datasets are one, of which the first may have fewer images."""
    splits = zip(parts(small), parts(large), strict=True)
    return small.fingerprint == large.fingerprint and all(same(a, b) for a, b in splits)


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
    chosen = data.cut(labels, 0.1)
    assert np.bincount(labels[chosen]).tolist() == [10, 2, 1]  # at least one image a class
    np.testing.assert_array_equal(chosen, data.cut(labels, 0.1))


def test_fingerprint_sees_pixels_shapes_and_types() -> None:
    array = np.arange(12, dtype=np.uint8)
    variants = [(array,), (array[::-1],), (array.reshape(3, 4),), (array.astype(np.uint16),)]
    variants += [(array, array), (array[:6], array[6:])]
    assert len({data.fingerprint(*arrays) for arrays in variants}) == len(variants)


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
    everything = sum(map(pairs, parts(dataset)), Counter())
    twins = 4 if dataset.name == "digits" else 0  # scikit-learn's digits hold a few
    assert everything.total() - len(everything) <= twins


def test_digits_are_scikit_learns(load: Callable[..., Dataset]) -> None:
    dataset, bunch = load("digits", image_size=8), load_digits()
    assert (dataset.title, dataset.flippable, dataset.classes[3]) == ("Digits", False, "3")
    sizes = [len(split) for split in parts(dataset)]
    assert sizes[2] / 1797 == pytest.approx(0.2, abs=0.01)
    assert sizes[1] / (1797 - sizes[2]) == pytest.approx(0.1, abs=0.01)
    gray = np.round(bunch.images * 255 / 16).astype(np.uint8)
    original = counted(gray[..., None].repeat(3, axis=3), bunch.target.tolist())
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


@pytest.mark.parametrize("name", ["digits", "shapes", "shapes-marked"])
def test_sizes_keep_nested_subsets_and_the_fingerprint(
    name: str, load: Callable[..., Dataset]
) -> None:
    small = load(name, **SIZES)
    large = load(name, train_size=250, validation_size=40, test_size=60)
    assert [len(split) for split in parts(small)] == [60, 20, 30]
    assert [len(split) for split in parts(large)] == [250, 40, 60]
    assert agree(small, large) and small.image_size == 32
    assert np.ptp(np.bincount(small.train.labels, minlength=10)) <= 1
    other = load(name, image_size=24, **SIZES)
    assert other.image_size == 24 and other.fingerprint != small.fingerprint
    assert torch.equal(other.train.labels, small.train.labels)


def test_a_study_gets_its_profiles_sizes_capped_by_what_exists(
    study: Study, image_folder: Callable[..., Path]
) -> None:
    shaped = study_data(study)
    assert [len(split) for split in parts(shaped)] == [120, 40, 60] and shaped.image_size == 16
    digits = study_data(study, "digits", train_size=70, image_size=8)
    assert digits.train.images.shape == (70, 3, 8, 8)
    folder = replace(study, dataset=str(image_folder()))
    assert [len(split) for split in parts(study_data(folder))] == [18, 2, 4]
    assert len(study_data(folder, test_size=None).test) == 4
    with pytest.raises(ValueError, match="train_size is -5"):
        study_data(folder, train_size=-5)


@pytest.mark.parametrize("name", ["digits", "shapes", "folder"])
def test_sizes_out_of_range_are_refused(
    name: str, image_folder: Callable[..., Path], load: Callable[..., Dataset]
) -> None:
    there = {"train": 18, "validation": 2, "test": 4}
    name = str(image_folder()) if name == "folder" else name
    for split, count in there.items():
        for size in (0, -5, count + 1 if "pets" in name else 2_000_000):
            with pytest.raises(ValueError, match=f"{split}_size is {size}; expected 1 to "):
                load(name, **{f"{split}_size": size})
    for size in (7, 4097, -1):
        with pytest.raises(ValueError, match=f"image_size is {size}; expected 8 to 4096"):
            load(name, image_size=size)


def test_what_cant_be_loaded_is_explained(load: Callable[..., Dataset], tmp_path: Path) -> None:
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
    (tmp_path / "train").mkdir()
    with pytest.MonkeyPatch.context() as patch:  # a mode wouldn't keep root out
        patch.setattr(Path, "iterdir", Mock(side_effect=PermissionError(13, "denied", "cats")))
        with pytest.raises(ValueError, match="^cats may not be read: change its permissions"):
            check_dataset(str(tmp_path))


def test_a_folder_gives_its_images_under_their_labels(
    image_folder: Callable[..., Path], load: Callable[..., Dataset]
) -> None:
    folder = image_folder()
    dataset = load(folder)
    assert (dataset.classes, dataset.title) == (("cat", "dog"), "pets")
    assert dataset.flippable and dataset.image_size == 12
    listed = {part: sorted(folder.glob(f"{part}/*/*")) for part in ("train", "test")}
    train, test = (
        counted([np.asarray(Image.open(f)) for f in files], [f.parent.name == "dog" for f in files])
        for files in listed.values()
    )
    assert pairs(dataset.test) == test
    assert pairs(dataset.train) + pairs(dataset.validation) == train
    assert agree(load(folder, train_size=6, validation_size=1, test_size=2), dataset)


@pytest.mark.parametrize(("images", "sizes"), [(20, [14, 2, 4]), (3, [1, 1, 1])])
def test_without_a_test_folder_a_fifth_is_cut(
    image_folder: Callable[..., Path], load: Callable[..., Dataset], images: int, sizes: list[int]
) -> None:
    dataset = load(image_folder(train=images, test=0))
    found = [np.bincount(split.labels).tolist() for split in parts(dataset)]
    assert found == [[size, size] for size in sizes]


def test_a_folder_is_decoded_once(
    image_folder: Callable[..., Path],
    load: Callable[..., Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = image_folder()
    first, small = load(folder), load(folder, image_size=8)
    # Another data folder stands for another process: it holds nothing in memory.
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    monkeypatch.delattr(folders, "read_image")
    assert agree(load(folder, data_dir=tmp_path / "copy"), first)
    assert agree(load(folder, data_dir=tmp_path / "copy", image_size=8), small)
    with pytest.raises(NameError):
        load(folder, data_dir=tmp_path / "empty")


def test_a_changed_folder_is_read_again(
    image_folder: Callable[..., Path], load: Callable[..., Dataset]
) -> None:
    folder = image_folder()
    path, prints = folder / "train" / "cat" / "04.png", [load(folder).fingerprint]
    pixels = np.array(Image.open(path))
    pixels[3, 5, 1] ^= 1
    Image.fromarray(pixels).save(path)
    prints.append(load(folder).fingerprint)
    path.rename(folder / "train" / "dog" / "10.png")
    prints.append(load(folder).fingerprint)
    assert len(set(prints)) == 3


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
    assert agree(after, before) and after.title == "animals"


def test_arrays_are_cached_checked_and_made_again(tmp_path: Path) -> None:
    arrays = {"a": np.arange(300, dtype=np.uint8).reshape(3, 100), "b": np.array([True, False])}
    path, made = tmp_path / "folder" / "arrays.npz", []

    def find() -> None:
        np.testing.assert_equal(cached(path, lambda: made.append(0) or arrays), arrays)

    find(), find()
    assert len(made) == 1 and list(path.parent.iterdir()) == [path]
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):  # no flipped bit goes unnoticed, nor a cut
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        find()
        path.write_bytes(whole[:position])
        find()
    np.savez(path, a=np.array([{}], dtype=object))  # a pickle, which might execute something
    find()
    left, new = (path.with_name(f".b.npz.{n}.tmp") for n in (1, 2))  # 1: of one killed long ago
    left.touch(), new.touch(), os.utime(left, (0, 0)), find()
    assert new.exists() and not left.exists()
    new.unlink(), path.unlink(), path.parent.rmdir()
    path.parent.write_text("no folder")  # as on a full or read-only disk
    find()


def test_drawn_splits_are_kept_for_the_program_that_drew_them(
    load: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, drawn, draw = load("shapes", **SIZES), [], shapes.draw
    monkeypatch.setattr(shapes, "draw", lambda *a, **k: drawn.append(1) or draw(*a, **k))
    for copy in ("copy", "other"):
        shutil.copytree(tmp_path / "data", tmp_path / copy)
    assert agree(load("shapes", data_dir=tmp_path / "copy", **SIZES), first) and not drawn
    monkeypatch.setattr(cv2, "__version__", "0.0")  # another may draw other pixels
    load("shapes", data_dir=tmp_path / "other", **SIZES)
    assert len(drawn) == 3


def write_as_torchvision(name: str, root: Path, patch: pytest.MonkeyPatch) -> list[Counter]:
    """Write 40 training and 20 test images as torchvision stores them; return both."""
    kind, written, files = getattr(torchvision.datasets, TITLES[name].replace("-", "")), [], []
    elsewhere = "FashionMNIST/raw" if name == "fashion-mnist" else ""
    place = root / getattr(kind, "base_folder", elsewhere)
    place.mkdir(parents=True, exist_ok=True)

    def write(file: str, content: bytes) -> list[str]:
        (place / file).write_bytes(content)
        return [file, hashlib.md5(content).hexdigest()]

    for part, count in (("train", 40), ("t10k", 20)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        labels, content = np.arange(count) % 10, io.BytesIO()
        if name == "svhn":
            digits = np.where(labels == 0, 10, labels)[:, None]
            scipy.io.savemat(content, {"X": pixels.transpose(1, 2, 3, 0), "y": digits})
            files.append(["", *write(part, content.getvalue())])
        elif name == "fashion-mnist":
            pixels[..., 1:] = pixels[..., :1]
            for suffix, array in (("images-idx3", pixels[..., 0]), ("labels-idx1", labels)):
                header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
                write(f"{part}-{suffix}-ubyte", header + array.astype(np.uint8).tobytes())
        else:
            flat = pixels.transpose(0, 3, 1, 2).reshape(count, -1)
            content = {"data": flat, "fine_labels": labels.tolist()}
            files.append(write(part, pickle.dumps(content)))
        written.append(counted(pixels, labels.tolist()))
    if name == "svhn":
        patch.setattr(kind, "split_list", dict(zip(("train", "test"), files, strict=True)))
    elif "cifar" in name:
        meta = pickle.dumps({kind.meta["key"]: [f"class {i}" for i in range(10)]})
        patch.setattr(kind, "meta", kind.meta | {"md5": write(kind.meta["filename"], meta)[1]})
        patch.setattr(kind, "train_list", files[:1])
        patch.setattr(kind, "test_list", files[1:])
    return written


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "svhn"])
def test_torchvisions_files_are_verified_and_read(
    name: str, load: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    train, test = write_as_torchvision(name, root, monkeypatch)
    dataset = load(name)
    assert [len(split) for split in parts(dataset)] == [30, 10, 20]
    assert (dataset.title, dataset.flippable) == (TITLES[name], name != "svhn")
    seventh = {"svhn": "7", "fashion-mnist": "Sneaker"}.get(name, "class 7")
    assert len(dataset.classes) == 10 and dataset.classes[7] == seventh
    assert pairs(dataset.test) == test
    assert pairs(dataset.train) + pairs(dataset.validation) == train
    assert load(name, image_size=16).image_size == 16
    for path in root.rglob("t10k*"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match="can be neither read from .* nor downloaded"):
        load(name, image_size=24)


@pytest.mark.parametrize("name", DATASETS[3:])
def test_a_failed_download_is_explained(
    name: str, load: Callable[..., Dataset], tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load(name)
    for word in (TITLES[name], f"{tmp_path / 'data'} ", "no network", "DATASET", "digits"):
        assert word in str(caught.value)


def test_some_classes_of_a_dataset(load: Callable[..., Dataset]) -> None:
    every, some = load("digits"), load("digits:7,1,4", train_size=90)
    assert some.classes == ("1", "4", "7") and some.title == "Digits: 1, 4, 7"
    assert (len(some.train), some.fingerprint) == (90, every.fingerprint)
    assert some.name == data.of_classes(every, ["4", "1", "7"]).name == "digits:1,4,7"
    for number, name in enumerate(some.classes):
        images = every.test.images[every.test.labels == int(name)]
        assert torch.equal(some.test.images[some.test.labels == number], images)
    for name, told in (
        ("digits:1,x", "no class 'x'; its classes are 0,"),
        ("digits:1,1", "at least two of its classes 0,"),
        ("shapes:", "unknown"),
    ):
        with pytest.raises(ValueError, match=told):
            load(name)


@pytest.mark.parametrize("source", ["folder", "archive", "download"])
def test_cifar10_as_jpeg_files(
    source: str,
    image_folder: Callable[..., Path],
    load: Callable[..., Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, root = image_folder("cifar10-jpeg"), tmp_path / "data" / "cifar10-jpeg"
    expected = load(folder)

    def pack(url: str, file: Path | str, **options: object) -> None:
        assert data.JPEG_COMMIT in url
        kind = "gztar" if str(file).endswith(".tar.gz") else "xztar"
        shutil.make_archive(str(file).removesuffix(".tar.gz"), kind, tmp_path, folder.name)

    if source == "folder":
        folder.rename(root)
    elif source == "archive":
        pack(data.JPEG_FILES, root)
    else:
        monkeypatch.setattr(torch.hub, "download_url_to_file", pack)
    message = f"{root} has fingerprint {expected.fingerprint}; expected 3de406445b9294b9. Delete it"
    with pytest.raises(ValueError, match=message):
        load("cifar10-jpeg")
    monkeypatch.setattr(data, "JPEG_FINGERPRINT", expected.fingerprint)
    dataset = load("cifar10-jpeg")
    assert dataset.title == "CIFAR-10 (JPEG q75)" and dataset.classes == expected.classes
    assert agree(dataset, expected) and load("cifar10-jpeg", image_size=8).image_size == 8
    there = {"cifar10-jpeg", "decoded", *(["cifar10-jpeg.tar.xz"] if source == "archive" else [])}
    assert {path.name for path in root.parent.iterdir()} == there


def test_an_archive_stays_in_its_folder(load: Callable[..., Dataset], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "cifar10-jpeg.tar.xz", "w:xz") as archive:
        archive.add(__file__, "../../outside.py")
    with pytest.raises(FileNotFoundError, match="outside the destination"):
        load("cifar10-jpeg")


def test_channel_statistics_are_numpys_in_float64_of_the_training_images(
    load: Callable[..., Dataset],
) -> None:
    dataset = load("shapes", **SIZES)
    pixels = dataset.train.images.numpy().astype(np.float64) / 255
    mean, std = dataset.channel_statistics
    assert mean.dtype == std.dtype == torch.float32 and mean.shape == std.shape == (3,)
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-7)
    flat = torch.tensor([0, 255, 60], dtype=torch.uint8)[:, None, None].expand(4, 3, 5, 5).clone()
    flat[:, 2, 0] = 10
    mean, std = data.channel_statistics(flat)
    assert mean.tolist()[:2] == [0, 1] and 0 < std[2] < 1
    assert std.tolist()[:2] == [1, 1], "constant channels are divided by one"
