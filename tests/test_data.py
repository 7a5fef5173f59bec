"""Datasets: splits, fingerprints, folders of images, their cache and errors; then the loaders."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import struct
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, features

from helpers import data
from helpers.data import (
    NO_AUGMENTATION,
    Augmentation,
    Dataset,
    ResidentLoader,
    Split,
    StreamingLoader,
    channel_statistics,
    epoch_choices,
    load_dataset,
    make_loader,
    read_image,
    stratified_order,
)


@pytest.fixture(autouse=True)
def nothing_remembered_and_no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    for function in (data._real_dataset, data._folder_dataset):
        function.cache_clear()
    yield
    for function in (data._real_dataset, data._folder_dataset):
        function.cache_clear()


def noise(seed: int, height: int = 12, width: int | None = None) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width or height, 3), dtype=np.uint8)


def write_folder(
    root: Path,
    train: int = 10,
    test: int = 2,
    classes: tuple[str, ...] = ("cat", "dog"),
    size: int = 12,
) -> Path:
    """Write train/<class>/*.png and, unless `test` is 0, test/<class>/*.png, each unlike all."""
    seed = 0
    for part, count in (("train", train), ("test", test)):
        for name in classes if count else ():
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                seed += 1
                Image.fromarray(noise(seed, size)).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pets")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Dataset]:
    """load_dataset with a data folder of this test's own."""

    def call(name: Path | str, **options: object) -> Dataset:
        return load_dataset(str(name), data_dir=tmp_path / "data", **options)

    return call


def hashes(split: Split) -> list[bytes]:
    return [hashlib.sha256(image.numpy().tobytes()).digest() for image in split.images]


def parts(dataset: Dataset) -> tuple[Split, Split, Split]:
    return dataset.train, dataset.validation, dataset.test


# --- Orders and fingerprints -------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(40, 40, 40), (100, 30, 5), (300, 1, 1), (7,)])
def test_every_prefix_of_a_stratified_order_holds_the_classes_in_proportion(
    counts: tuple[int, ...],
) -> None:
    labels = np.repeat(np.arange(len(counts)) * 3, counts)
    np.random.default_rng(0).shuffle(labels)
    order = stratified_order(labels, seed=1)
    assert sorted(order.tolist()) == list(range(len(labels)))
    seen = np.stack([np.cumsum(labels[order] == 3 * k) for k in range(len(counts))], axis=1)
    share = seen / counts
    half = 0.5 / np.array(counts)
    for a in range(len(counts)):
        for b in range(len(counts)):
            assert (np.abs(share[:, a] - share[:, b]) <= half[a] + half[b] + 1e-9).all()


def test_stratified_order_is_seeded_and_shuffles() -> None:
    labels = np.repeat(np.arange(4), 50)
    first, again, other = (stratified_order(labels, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.9
    assert (first != np.arange(200)).mean() > 0.9
    # Nor do the classes come in a fixed sequence.
    assert len({tuple(labels[first][i : i + 4]) for i in range(0, 200, 4)}) > 10


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


# --- Splits of every dataset -------------------------------------------------------------------


@pytest.fixture(params=["digits", "shapes", "shapes-marked", "folder", "folder without test"])
def dataset(
    request: pytest.FixtureRequest, tmp_path: Path, load: Callable[..., Dataset]
) -> Dataset:
    if "folder" in request.param:
        test = 0 if "without" in request.param else 4
        return load(write_folder(tmp_path / "pets", train=20, test=test))
    if "shapes" in request.param:
        return load(request.param, train_size=300, validation_size=40, test_size=60)
    return load(request.param)


def test_splits_are_rgb_uint8_labelled_and_disjoint(dataset: Dataset) -> None:
    everything = [h for split in parts(dataset) for h in hashes(split)]
    size = dataset.image_size
    for split in parts(dataset):
        assert split.images.shape == (len(split), 3, size, size)
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        assert split.images.is_contiguous()
        assert set(split.labels.tolist()) == set(range(len(dataset.classes)))
        if split.masks is not None:
            assert split.masks.shape == (len(split), size, size)
            assert split.masks.dtype == torch.bool
    if dataset.name == "digits":  # scikit-learn's digits hold a few twins
        assert len(everything) == 1797
        assert len(everything) - len(set(everything)) < 5
    else:
        assert len(set(everything)) == len(everything)


def test_splits_are_stratified_and_so_are_their_prefixes(dataset: Dataset) -> None:
    for split in parts(dataset):
        counts = np.bincount(split.labels)
        assert counts.max() - counts.min() <= (3 if dataset.name != "digits" else 20)
        half = np.bincount(split.labels[: len(split) // 2], minlength=len(counts))
        assert (np.abs(half - counts / 2) <= 1).all()


def test_digits_sizes_and_pixels(load: Callable[..., Dataset]) -> None:
    from sklearn.datasets import load_digits

    dataset = load("digits", image_size=8)
    bunch = load_digits()
    assert (dataset.title, dataset.mirror, dataset.classes[3]) == ("Digits", False, "3")
    sizes = [len(split) for split in parts(dataset)]
    assert sum(sizes) == 1797
    assert sizes[2] / 1797 == pytest.approx(0.2, abs=0.01)
    assert sizes[1] / (1797 - sizes[2]) == pytest.approx(0.1, abs=0.01)
    original = np.round(bunch.images * 255 / 16).astype(np.uint8)
    known = {(image.tobytes(), label) for image, label in zip(original, bunch.target, strict=True)}
    found = {
        (image[0].numpy().tobytes(), int(label))
        for split in parts(dataset)
        for image, label in zip(split.images, split.labels, strict=True)
    }
    assert found == known
    assert load("digits").image_size == 32


def test_shapes_come_with_masks_and_marks(load: Callable[..., Dataset]) -> None:
    sizes = {"train_size": 60, "validation_size": 20, "test_size": 30}
    plain, marked = (load(name, **sizes) for name in ("shapes", "shapes-marked"))
    assert plain.test.masks.flatten(1).any(1).all()
    assert plain.test.mark_masks is None
    assert marked.test.mark_masks.flatten(1).any(1).all()
    assert plain.fingerprint != marked.fingerprint
    outside = ~marked.test.mark_masks[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(plain.test.images[outside], marked.test.images[outside])
    assert not torch.equal(plain.test.images, marked.test.images)


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_image_size_resizes_and_changes_the_fingerprint(
    name: str, load: Callable[..., Dataset]
) -> None:
    sizes = {"train_size": 60, "validation_size": 20, "test_size": 20}
    small, large = (load(name, image_size=size, **sizes) for size in (16, 24))
    assert (small.image_size, large.image_size) == (16, 24)
    assert small.fingerprint != large.fingerprint
    assert torch.equal(small.train.labels, large.train.labels)


# --- Sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_sizes_keep_nested_subsets_and_the_fingerprint(
    name: str, load: Callable[..., Dataset]
) -> None:
    small = load(name, train_size=50, validation_size=20, test_size=30)
    large = load(name, train_size=250, validation_size=40, test_size=60)
    assert [len(s) for s in parts(small)] == [50, 20, 30]
    assert [len(s) for s in parts(large)] == [250, 40, 60]
    assert small.fingerprint == large.fingerprint
    for a, b in zip(parts(small), parts(large), strict=True):
        assert torch.equal(a.images, b.images[: len(a)])
        assert torch.equal(a.labels, b.labels[: len(a)])
    counts = np.bincount(small.train.labels, minlength=10)
    assert counts.max() - counts.min() <= 1


def test_sizes_of_a_folder(folder: Path, load: Callable[..., Dataset]) -> None:
    whole = load(folder)
    assert [len(split) for split in parts(whole)] == [18, 2, 4]
    subset = load(folder, train_size=6, validation_size=1, test_size=2)
    assert subset.fingerprint == whole.fingerprint
    assert hashes(subset.train) == hashes(whole.train)[:6]
    assert Counter(subset.train.labels.tolist()) == {0: 3, 1: 3}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("name", ["digits", "shapes", "folder"])
def test_sizes_below_one_are_refused(
    split: str, name: str, folder: Path, load: Callable[..., Dataset]
) -> None:
    for size in (0, -5):
        with pytest.raises(ValueError, match=f"{split}_size is {size}; expected a positive"):
            load(folder if name == "folder" else name, **{f"{split}_size": size})


@pytest.mark.parametrize(("split", "there"), [("train", 18), ("validation", 2), ("test", 4)])
def test_more_than_there_is_is_refused(
    split: str, there: int, folder: Path, load: Callable[..., Dataset]
) -> None:
    with pytest.raises(ValueError) as caught:
        load(folder, **{f"{split}_size": there + 1})
    assert f"{split}_size is {there + 1}" in str(caught.value)
    assert f"pets has {there} {split} images" in str(caught.value)


def test_too_few_training_images_for_the_classes_are_refused(load: Callable[..., Dataset]) -> None:
    with pytest.raises(ValueError, match="9 training images don't cover the 10 classes of Digits"):
        load("digits", train_size=9)


@pytest.mark.parametrize("size", [7, 4097, -1])
def test_image_size_out_of_range_is_refused(size: int, load: Callable[..., Dataset]) -> None:
    with pytest.raises(ValueError, match=f"image_size is {size}; expected 8 to 4096"):
        load("digits", image_size=size)


def test_an_unknown_name_is_refused_with_the_known_ones(load: Callable[..., Dataset]) -> None:
    with pytest.raises(ValueError) as caught:
        load("cifar")
    message = str(caught.value)
    assert all(f" {name}" in message for name in data.DATASETS)
    assert "'cifar'" in message and "./cifar" in message


# --- Reading images ----------------------------------------------------------------------------


def picture(height: int = 20, width: int = 30) -> np.ndarray:
    """A smooth colour picture, which lossy formats keep nearly."""
    rows, columns = np.mgrid[0 : 1 : complex(0, height), 0 : 1 : complex(0, width)]
    channels = [rows, columns, (1 - rows) * (1 - columns)]
    return (40 + 170 * np.stack(channels, axis=2)).astype(np.uint8)


def gray_picture() -> np.ndarray:
    return picture()[..., 1]


@pytest.mark.parametrize(
    ("suffix", "options", "tolerance"),
    [
        ("png", {}, 0),
        ("bmp", {}, 0),
        ("tiff", {}, 0),
        ("tif", {"compression": "tiff_lzw"}, 0),
        ("ppm", {}, 0),
        ("webp", {"lossless": True}, 0),
        ("webp", {"quality": 95}, 12),
        ("jpg", {"quality": 95, "subsampling": 0}, 6),
        ("JPEG", {"quality": 95, "progressive": True, "subsampling": 0}, 6),
    ],
)
def test_colour_formats(
    tmp_path: Path, suffix: str, options: dict[str, object], tolerance: int
) -> None:
    if suffix == "webp" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(picture()).save(path, **options)
    found = read_image(path)
    assert found.shape == (20, 30, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - picture()).max() <= tolerance


@pytest.mark.parametrize(("suffix", "tolerance"), [("hdr", 2), ("pam", 0)])
def test_formats_that_only_opencv_reads(tmp_path: Path, suffix: str, tolerance: int) -> None:
    path = tmp_path / f"ä image.{suffix}"
    pixels = picture()[..., ::-1]
    encoded = (pixels / np.float32(255)).astype(np.float32) if suffix == "hdr" else pixels
    path.write_bytes(cv2.imencode(f".{suffix}", encoded)[1].tobytes())
    assert np.abs(read_image(path).astype(int) - picture()).max() <= tolerance
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="can't be read as an image"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "jpg", "gif"])
def test_gray_becomes_three_equal_channels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"gray.{suffix}"
    Image.fromarray(gray_picture()).save(path)
    found = read_image(path)
    assert np.abs(found.astype(int) - gray_picture()[..., None]).max() <= (suffix == "jpg") * 4


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, suffix: str) -> None:
    gray = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    path = tmp_path / f"gray.{suffix}"
    Image.fromarray(gray).save(path)
    np.testing.assert_array_equal(read_image(path), np.round(gray / 257)[..., None].repeat(3, 2))
    colour = np.stack([gray, gray[::-1], gray[:, ::-1]], axis=2)
    path.write_bytes(cv2.imencode(f".{suffix}", colour[..., ::-1])[1].tobytes())
    assert np.abs(read_image(path) - colour / 257).max() <= 1


@pytest.mark.parametrize("largest", [1, 255, 65535])
def test_float_tiff_is_scaled_by_its_range(tmp_path: Path, largest: int) -> None:
    values = np.linspace(0, largest, 600, dtype=np.float32).reshape(20, 30)
    path = tmp_path / "float.tiff"
    Image.fromarray(values).save(path)
    found = read_image(path)
    expected = np.round(values.astype(np.float64) * 255 / largest)
    assert np.abs(found - expected[..., None]).max() <= 1
    assert (found.min(), found.max()) == (0, 255)


def test_float_tiff_with_a_value_that_is_no_number_is_refused(tmp_path: Path) -> None:
    values = np.ones((4, 4), dtype=np.float32)
    values[1, 2] = np.nan
    Image.fromarray(values).save(tmp_path / "hole.tiff")
    with pytest.raises(ValueError, match="hole.tiff.*finite"):
        read_image(tmp_path / "hole.tiff")


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = np.dstack([picture(), np.full((20, 30), 255, np.uint8)])
    rgba[:5, :, 3] = 0
    rgba[5:10, :, 3] = 51
    Image.fromarray(rgba).save(tmp_path / "a.png")
    expected = picture().astype(float)
    expected[:5] = 255
    expected[5:10] = 0.2 * picture()[5:10] + 0.8 * 255
    assert np.abs(read_image(tmp_path / "a.png") - expected).max() <= 1
    gray = np.dstack([gray_picture(), rgba[..., 3]])
    Image.fromarray(gray).save(tmp_path / "la.png")
    assert (read_image(tmp_path / "la.png")[:5] == 255).all()
    assert (read_image(tmp_path / "la.png")[10:] == gray_picture()[10:, :, None]).all()


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palettes_with_and_without_transparency(tmp_path: Path, suffix: str) -> None:
    indices = (np.arange(600).reshape(20, 30) // 100).astype(np.uint8)
    colours = noise(0, 6, 1)[:, 0]
    image = Image.fromarray(indices, mode="L")
    image = image.convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(colours.ravel().tolist())
    image.save(tmp_path / f"p.{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"p.{suffix}"), colours[indices])
    image.save(tmp_path / f"t.{suffix}", transparency=2)
    colours[2] = 255
    np.testing.assert_array_equal(read_image(tmp_path / f"t.{suffix}"), colours[indices])


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
def test_cmyk_becomes_rgb(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cmyk.{suffix}"
    image = Image.fromarray(picture()).convert("CMYK")
    image.save(path, **({"quality": 95} if suffix == "jpg" else {}))
    with Image.open(path) as stored:
        assert stored.mode == "CMYK"
    assert np.abs(read_image(path).astype(int) - picture()).max() <= 8


def test_one_bit_images(tmp_path: Path) -> None:
    Image.fromarray(gray_picture() > 120).save(tmp_path / "bits.png")
    expected = np.where(gray_picture() > 120, 255, 0)
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png")[..., 2], expected)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_the_first_frame_of_an_animation_counts(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    with Image.open(path) as image:
        assert image.n_frames == 2
    np.testing.assert_array_equal(read_image(path), np.asarray(frames[0]))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str, orientation: int) -> None:
    upright = picture()
    # What a camera held so stores, by the EXIF standard's table of row 0 and column 0.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    options = {"quality": 95, "subsampling": 0} if suffix == "jpg" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif, **options)
    found = read_image(path)
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= 6


# --- Damaged images ----------------------------------------------------------------------------


def encoded(suffix: str) -> bytes:
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
    Image.fromarray(noise(0, 24)).save(buffer, format=kind)
    return buffer.getvalue()


FORMATS = ["jpg", "png", "gif", "bmp", "tiff", "ppm"] + ["webp"] * features.check("webp")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.6, 0.9])
def test_a_truncated_image_is_named(tmp_path: Path, suffix: str, kept: float) -> None:
    whole = encoded(suffix)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "Replace the file, or remove it" in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", FORMATS + ["avif"] * features.check("avif"))
def test_a_damaged_image_raises_nothing_but_value_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # damaged sizes would take long
    whole = encoded(suffix)
    generator = np.random.default_rng(0)
    path = tmp_path / f"damaged.{suffix}"
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[generator.integers(min(len(whole), 300))] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            read_image(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused or suffix in ("bmp", "ppm")


def test_a_huge_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(noise(0, 12)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 71)
    with pytest.raises(ValueError, match="huge.png.*exceeds limit"):
        read_image(tmp_path / "huge.png")


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path} is not a file"):
            read_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_loading_a_folder_names_the_truncated_image(
    folder: Path, load: Callable[..., Dataset], suffix: str
) -> None:
    path = folder / "train" / "dog" / f"broken.{suffix}"
    path.write_bytes(encoded(suffix)[:-400])
    with pytest.raises(ValueError, match="truncated|broken") as caught:
        load(folder, image_size=12)
    assert str(path) in str(caught.value)


def test_loading_a_folder_names_what_is_no_image(
    folder: Path, load: Callable[..., Dataset]
) -> None:
    path = folder / "test" / "cat" / "notes.txt"
    path.write_text("no pixels here")
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert f"{path} can't be read as an image" in str(caught.value)


# --- Folders -----------------------------------------------------------------------------------


def test_a_folder_gives_its_images_under_their_labels(
    folder: Path, load: Callable[..., Dataset]
) -> None:
    dataset = load(folder)
    assert dataset.classes == ("cat", "dog")
    assert (dataset.title, dataset.mirror, dataset.image_size) == ("pets", True, 12)
    expected = {
        part: Counter(
            (np.asarray(Image.open(path)).tobytes(), label)
            for label, name in enumerate(dataset.classes)
            for path in (folder / part / name).iterdir()
        )
        for part in ("train", "test")
    }

    def found(split: Split) -> Counter:
        pixels = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        pairs = zip(pixels, split.labels.tolist(), strict=True)
        return Counter((image.tobytes(), label) for image, label in pairs)

    assert found(dataset.test) == expected["test"]
    assert found(dataset.train) + found(dataset.validation) == expected["train"]


def test_a_folder_may_mix_every_format(tmp_path: Path, load: Callable[..., Dataset]) -> None:
    root = tmp_path / "mixed"
    for name in ("a", "b"):
        for i, suffix in enumerate(FORMATS):
            (root / "train" / name).mkdir(parents=True, exist_ok=True)
            path = root / "train" / name / f"{i}.{suffix}"
            Image.fromarray(picture(10 + i, 14 + i)).save(path)
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = Image.fromarray(picture(9, 17))
        turned.save(root / "train" / name / "turned.jpg", exif=exif)
        turned.convert("L").save(root / "train" / name / "gray.png")
    dataset = load(root, image_size=16)
    assert sum(len(split) for split in parts(dataset)) == 2 * (len(FORMATS) + 2)
    assert dataset.image_size == 16
    # Colours survive the resizing.
    assert abs(dataset.train.images.float().mean() - picture().mean()) < 12


def test_strange_names(tmp_path: Path, load: Callable[..., Dataset]) -> None:
    classes = ("-rf", "Café au lait", "写真", "a'b\"c;$(x)")
    root = write_folder(tmp_path / "--my photos ü", train=3, test=1, classes=classes)
    for part, name in (("train", "-rf"), ("test", "写真")):
        extra = root / part / name / "-- strange ñame 画.png"
        Image.fromarray(noise(99)).save(extra)
    dataset = load(root)
    assert dataset.classes == tuple(sorted(classes))
    assert sum(len(split) for split in parts(dataset)) == 18


def test_a_name_that_is_not_utf8(tmp_path: Path, load: Callable[..., Dataset]) -> None:
    root = write_folder(tmp_path / "pets")
    name = os.fsencode(root / "train" / "cat") + b"/\xff\xfe.png"
    try:
        with open(name, "wb") as file:
            Image.fromarray(noise(99)).save(file, format="PNG")
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    assert len(load(root).train) == 19


def test_hidden_files_and_nested_folders_do_not_count(
    folder: Path, load: Callable[..., Dataset]
) -> None:
    before = load(folder).fingerprint
    (folder / "train" / "cat" / ".DS_Store").write_text("x")
    (folder / "train" / "cat" / "Thumbs.db").write_text("x")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "cat" / "nested").mkdir()
    (folder / "train" / "readme.txt").write_text("x")
    (folder / "notes.txt").write_text("x")
    assert load(folder).fingerprint == before


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(ValueError, match=r"empty.png can't be read as an image \(it is empty\)"):
        data.read_image(path)


def test_only_bytes_are_normalised() -> None:
    with pytest.raises(TypeError, match=r"torch.float32; expected uint8"):
        data.normalise(torch.rand(2, 3, 4, 4), torch.zeros(3), torch.ones(3))


def test_images_are_resized_to_squares(tmp_path: Path, load: Callable[..., Dataset]) -> None:
    root = write_folder(tmp_path / "pets", train=3, test=1)
    wide = np.zeros((30, 60, 3), np.uint8)
    wide[:, :30:3] = 240  # stripes that sampling without averaging would lose
    wide[:, 30:] = 255
    Image.fromarray(wide).save(root / "test" / "cat" / "00.png")
    test = load(root, image_size=10).test
    image = test.images[test.labels == 0][0]
    assert torch.equal(image[:, :, :5], torch.full((3, 10, 5), 80, dtype=torch.uint8))
    assert torch.equal(image[:, :, 5:], torch.full((3, 10, 5), 255, dtype=torch.uint8))
    square = np.zeros((30, 30, 3), np.uint8)
    square[:, ::3] = 240
    np.testing.assert_array_equal(data._resize(square, 10), np.full((10, 10, 3), 80))


def test_without_a_test_folder_a_fifth_is_cut(tmp_path: Path, load: Callable[..., Dataset]) -> None:
    dataset = load(write_folder(tmp_path / "pets", train=20, test=0))
    sizes = [len(split) for split in parts(dataset)]
    assert sizes == [28, 4, 8]
    for split in parts(dataset):
        assert len(set(np.bincount(split.labels))) == 1


def test_the_smallest_folder_that_can_be_split(
    tmp_path: Path, load: Callable[..., Dataset]
) -> None:
    dataset = load(write_folder(tmp_path / "tiny", train=3, test=0))
    assert [sorted(split.labels.tolist()) for split in parts(dataset)] == [[0, 1]] * 3


def test_published_folders_have_a_title(tmp_path: Path, load: Callable[..., Dataset]) -> None:
    assert load(write_folder(tmp_path / "cifar10-jpeg")).title == "CIFAR-10 (JPEG q75)"


# --- Bad folders -------------------------------------------------------------------------------


def remove(path: Path) -> None:
    shutil.rmtree(path)


def resized(path: Path, height: int, width: int) -> None:
    Image.fromarray(noise(0, height, width)).save(path)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda f: remove(f), FileNotFoundError, ["pets is not a folder", "train/<class>/*"]),
        (
            lambda f: (remove(f), f.write_text("")),
            FileNotFoundError,
            ["pets is not a folder", "train/<class>/*"],
        ),
        (
            lambda f: (remove(f), f.mkdir()),
            FileNotFoundError,
            ["pets holds nothing", "train/<class>/*"],
        ),
        (
            lambda f: (f / "train").rename(f / "Training"),
            FileNotFoundError,
            ["pets holds Training, test", "train/<class>/*"],
        ),
        (
            lambda f: (remove(f / "train"), (f / "train").mkdir()),
            ValueError,
            ["train holds no class folders", "at least two folders"],
        ),
        (
            lambda f: remove(f / "train" / "dog"),
            ValueError,
            ["train holds one class (cat)", "at least two folders"],
        ),
        (
            lambda f: remove(f / "test" / "dog"),
            ValueError,
            ["test lacks the classes ['dog']", "Add them, or remove test/"],
        ),
        (
            lambda f: (f / "test" / "cow").mkdir(),
            ValueError,
            ["unknown classes ['cow']", "the same class folders"],
        ),
        (
            lambda f: (remove(f / "train" / "cat"), (f / "train" / "cat").mkdir()),
            ValueError,
            ["cat is empty", "at least one image of class 'cat'"],
        ),
        (
            lambda f: resized(f / "train" / "dog" / "03.png", 9, 13),
            ValueError,
            ["2 different sizes", "dog/03.png is 13x9", "most are 12x12", "Set image_size"],
        ),
        (
            lambda f: [resized(path, 9, 13) for path in f.rglob("*.png")],
            ValueError,
            ["are 13x9", "expected squares", "Set image_size"],
        ),
        (
            lambda f: [(f / "train" / "dog" / f"{i:02d}.png").unlink() for i in range(9)],
            ValueError,
            ["class 'dog'", "has 1 image", "at least 2", "Add images"],
        ),
        (
            lambda f: (
                remove(f / "test"),
                [(f / "train" / "dog" / f"{i:02d}.png").unlink() for i in range(8)],
            ),
            ValueError,
            ["class 'dog'", "has 2 images", "at least 3", "Add images"],
        ),
    ],
)
def test_a_bad_folder_is_explained(
    folder: Path,
    load: Callable[..., Dataset],
    damage: Callable[[Path], object],
    error: type[Exception],
    words: list[str],
) -> None:
    damage(folder)
    with pytest.raises(error) as caught:
        load(folder)
    for word in words:
        assert word in str(caught.value)
    assert not (folder.parent / "data" / "decoded").exists()


@pytest.mark.parametrize("shape", [(9, 13), (30, 12)])
def test_image_size_makes_mixed_sizes_one(
    folder: Path, load: Callable[..., Dataset], shape: tuple[int, int]
) -> None:
    resized(folder / "train" / "dog" / "03.png", *shape)
    assert load(folder, image_size=12).image_size == 12


# --- Fingerprint and cache of folders ----------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that read_image was called with."""
    names: list[str] = []
    real = data.read_image

    def counted(path: Path) -> np.ndarray:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(data, "read_image", counted)
    return names


def forget() -> None:
    """Do what a new process does: start without datasets in memory."""
    data._folder_dataset.cache_clear()


def test_a_folder_is_decoded_once(
    folder: Path, load: Callable[..., Dataset], decoded: list[str]
) -> None:
    first = load(folder)
    assert len(decoded) == 24
    for _ in range(2):
        again = load(folder, train_size=6)
        assert len(decoded) == 24
        assert again.fingerprint == first.fingerprint
        for a, b in zip(parts(again), parts(first), strict=True):
            assert torch.equal(a.images, b.images[: len(a)])
            assert torch.equal(a.labels, b.labels[: len(a)])
        assert again.classes == first.classes
        forget()


def test_image_sizes_are_cached_apart(
    folder: Path, load: Callable[..., Dataset], decoded: list[str]
) -> None:
    prints = [load(folder, image_size=size).fingerprint for size in (None, 8, 16)]
    assert len(set(prints)) == 3 and len(decoded) == 72
    forget()
    assert [load(folder, image_size=size).image_size for size in (None, 8, 16)] == [12, 8, 16]
    assert len(decoded) == 72


@pytest.mark.parametrize("new_process", [True, False])
@pytest.mark.parametrize("change", ["pixel", "label", "added", "removed", "test"])
def test_a_changed_folder_is_decoded_again_and_has_another_fingerprint(
    folder: Path, load: Callable[..., Dataset], decoded: list[str], change: str, new_process: bool
) -> None:
    before = load(folder)
    count = len(decoded)
    path = folder / "train" / "cat" / "04.png"
    pixels = np.array(Image.open(path))
    if change == "pixel":
        pixels[3, 5, 1] ^= 1
        Image.fromarray(pixels).save(path)
    elif change == "label":
        path.rename(folder / "train" / "dog" / "10.png")
    elif change == "added":
        Image.fromarray(noise(77)).save(folder / "train" / "cat" / "99.png")
    elif change == "removed":
        path.unlink()
    else:
        other = folder / "test" / "dog" / "00.png"
        Image.fromarray(255 - np.array(Image.open(other))).save(other)
    if new_process:
        forget()
    after = load(folder)
    assert after.fingerprint != before.fingerprint
    assert len(decoded) > count


def test_a_changed_file_of_equal_size_is_noticed_by_its_time(
    folder: Path, load: Callable[..., Dataset]
) -> None:
    path = folder / "train" / "cat" / "04.bmp"
    Image.fromarray(noise(50)).save(path)
    before, stat = load(folder), path.stat()
    Image.fromarray(noise(51)).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    assert path.stat().st_size == stat.st_size
    assert load(folder).fingerprint != before.fingerprint


def test_the_fingerprint_is_of_pixels_and_labels_not_of_names_or_places(
    folder: Path, tmp_path: Path, load: Callable[..., Dataset]
) -> None:
    before = load(folder)
    copy = tmp_path / "elsewhere" / "animals"
    shutil.copytree(folder, copy)
    for path in sorted(copy.rglob("*.png")):
        Image.open(path).save(path.with_suffix(".tiff"))
        path.unlink()
    after = load(copy)
    assert after.fingerprint == before.fingerprint
    assert after.title == "animals"
    assert hashes(after.train) == hashes(before.train)


def test_folders_of_the_same_name_have_caches_of_their_own(
    tmp_path: Path, load: Callable[..., Dataset]
) -> None:
    first, second = (tmp_path / place / "pets" for place in "ab")
    write_folder(first)
    shutil.copytree(first, second)
    path = second / "train" / "cat" / "00.png"
    stat = path.stat()
    Image.fromarray(noise(1234)).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load(first).fingerprint != load(second).fingerprint


def test_a_relative_folder_follows_the_working_directory(
    tmp_path: Path, load: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, place in enumerate("ab"):
        write_folder(tmp_path / place / "pets", train=4 + i)
    sizes = []
    for place in "ab":
        monkeypatch.chdir(tmp_path / place)
        sizes.append(len(load("./pets").train))
    assert sizes == [6, 8]


CACHE_FILES = ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy")


def cache_of(folder: Path) -> Path:
    (cache,) = (folder.parent / "data" / "decoded").iterdir()
    return cache


@pytest.mark.parametrize("name", [*CACHE_FILES, "fingerprint.json"])
@pytest.mark.parametrize("damage", ["byte flipped", "header", "truncated", "emptied", "deleted"])
def test_a_corrupted_cache_is_an_error_that_says_what_to_do(
    folder: Path, load: Callable[..., Dataset], name: str, damage: str
) -> None:
    whole = load(folder)
    cache = cache_of(folder)
    assert sorted(p.name for p in cache.iterdir()) == sorted([*CACHE_FILES, "fingerprint.json"])
    path = cache / name
    content = bytearray(path.read_bytes())
    if damage == "deleted":
        path.unlink()
    else:
        if damage == "byte flipped":
            content[-5] ^= 4
        elif damage == "header":
            content[3] ^= 1
        else:
            content = content[: -3 if damage == "truncated" else 0]
        path.write_bytes(content)
    forget()
    with pytest.raises(ValueError, match="cache of decoded images") as caught:
        load(folder)
    assert f"Delete the folder {cache}" in str(caught.value)
    # What the message advises works.
    shutil.rmtree(cache)
    assert load(folder).fingerprint == whole.fingerprint


def test_no_flipped_bit_in_a_cache_goes_unnoticed(
    folder: Path, load: Callable[..., Dataset]
) -> None:
    load(folder)
    path = cache_of(folder) / "test_images.npy"
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    # Every byte that numpy's header uses, and some of the pixels.
    positions = [*range(content.index(b"}") + 1), *generator.integers(128, len(content), 30)]
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        forget()
        try:
            found = load(folder)
        except ValueError as error:
            assert "cache of decoded images" in str(error)
        else:  # a header that says the same in other words
            assert position < 128
            assert found.test.images.dtype == torch.uint8
            assert load(folder).fingerprint == found.fingerprint


class Planted:
    """What a pickle would run: it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_pickle_in_a_cache_is_executed(
    folder: Path, load: Callable[..., Dataset], tmp_path: Path
) -> None:
    load(folder)
    path, trace = cache_of(folder) / "test_labels.npy", tmp_path / "executed"
    np.save(path, np.array([Planted(trace)], dtype=object), allow_pickle=True)
    forget()
    with pytest.raises(ValueError, match="cache of decoded images is damaged"):
        load(folder)
    assert not trace.exists()
    np.load(path, allow_pickle=True)
    assert trace.exists()  # it would have been


def test_no_pickle_among_the_drawn_images_is_executed(tmp_path: Path) -> None:
    sizes = {"train_size": 20, "validation_size": 10, "test_size": 10}
    first = load_dataset("shapes", data_dir=tmp_path, **sizes)
    trace = tmp_path / "executed"
    for path in (tmp_path / "drawn").iterdir():
        np.savez(path, images=np.array([Planted(trace)], dtype=object))
    data._draw_split.cache_clear()
    again = load_dataset("shapes", data_dir=tmp_path, **sizes)
    assert torch.equal(again.train.images, first.train.images)
    assert not trace.exists()


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_share_every_batch(
    folder: Path, load: Callable[..., Dataset], ranks: int
) -> None:
    dataset = load(folder)
    settings = {
        "batch_size": 8,
        "augmentation": NO_AUGMENTATION,
        "seed": 0,
        "device": torch.device("cpu"),
    }
    whole = make_loader(dataset, **settings)
    parts = [make_loader(dataset, **settings, rank=rank, ranks=ranks) for rank in range(ranks)]
    for (images, _), *shares in zip(*(part.batches(0) for part in (whole, *parts)), strict=True):
        assert all(len(share) == 8 // ranks for share, _ in shares)
        found = torch.cat([share for share, _ in shares])
        assert sorted(found.flatten(1).tolist()) == sorted(images.flatten(1).tolist())


@pytest.mark.parametrize("moment", range(5))
def test_an_interrupted_write_leaves_no_cache(
    folder: Path, load: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    save, saved = np.save, []

    def killed(*args: object, **options: object) -> None:
        saved.append(0)
        if len(saved) > moment:
            raise KeyboardInterrupt
        save(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", killed)
        patch.setattr(Path, "rename", killed)
        load(folder)
    assert load(folder).fingerprint
    assert cache_of_finished(folder).is_dir()


def cache_of_finished(folder: Path) -> Path:
    caches = (folder.parent / "data" / "decoded").iterdir()
    (cache,) = (path for path in caches if path.suffix != ".tmp")
    return cache


def test_two_processes_may_write_the_same_cache(folder: Path, load: Callable[..., Dataset]) -> None:
    first = load(folder)
    cache = cache_of(folder)
    pool = data._read_cache(cache, first.classes)
    data._write_cache(cache, pool)
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    assert data._read_cache(cache, first.classes).fingerprint == first.fingerprint


# --- torchvision's datasets --------------------------------------------------------------------


class FakeSet:
    """Stands for torchvision's dataset classes; `there` says whether its files lie on disk."""

    there = True
    calls: list[dict[str, object]] = []

    def __init__(
        self, root: Path, *, download: bool, train: bool = True, split: str | None = None
    ) -> None:
        self.calls.append({"root": root, "download": download, "split": split, "train": train})
        if not self.there and not download:
            raise RuntimeError("Dataset not found or corrupted.")
        training = train if split is None else split == "train"
        count = 200 if training else 50
        generator = np.random.default_rng(training)
        self.labels = np.arange(count) % 10
        self.data = generator.integers(0, 256, (count, *self.shape), dtype=np.uint8)

    @property
    def targets(self) -> list[int]:
        return self.labels.tolist()


class FakeCIFAR(FakeSet):
    shape = (32, 32, 3)
    classes = [f"class {i}" for i in range(10)]


class FakeFashion(FakeSet):
    shape = (28, 28)
    classes = [f"garment {i}" for i in range(10)]

    def __init__(self, root: Path, **options: object) -> None:
        super().__init__(root, **options)
        self.data = torch.from_numpy(self.data)

    @property
    def targets(self) -> torch.Tensor:
        return torch.from_numpy(self.labels)


class FakeSVHN(FakeSet):
    shape = (3, 32, 32)
    targets = None


FAKES = {
    "cifar10": ("CIFAR10", FakeCIFAR),
    "cifar100": ("CIFAR100", FakeCIFAR),
    "fashion-mnist": ("FashionMNIST", FakeFashion),
    "svhn": ("SVHN", FakeSVHN),
}


@pytest.fixture(params=FAKES)
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, type]:
    class_name, kind = FAKES[request.param]
    monkeypatch.setattr(torchvision.datasets, class_name, kind)
    monkeypatch.setattr(FakeSet, "calls", [])
    return request.param, kind


def test_torchvisions_datasets(fake: tuple[str, type], load: Callable[..., Dataset]) -> None:
    name, kind = fake
    dataset = load(name)
    assert [len(split) for split in parts(dataset)] == [180, 20, 50]
    assert dataset.title == data.TORCHVISION_SETS[name][0]
    assert dataset.mirror == (name != "svhn")
    if name == "svhn":
        assert dataset.classes == tuple("0123456789")
    else:
        assert dataset.classes == tuple(kind.classes)
    original = kind(Path(), download=True, train=False)
    pixels = np.asarray(original.data)
    if name == "fashion-mnist":
        pixels = np.stack([pixels] * 3, axis=1)
    elif name != "svhn":
        pixels = pixels.transpose(0, 3, 1, 2)
    known = {(p.tobytes(), int(t)) for p, t in zip(pixels, original.labels, strict=True)}
    test = zip(dataset.test.images.numpy(), dataset.test.labels.tolist(), strict=True)
    assert {(image.tobytes(), label) for image, label in test} == known
    assert load(name, image_size=16).image_size == 16


@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_fetched_that_is_there(
    fake: tuple[str, type],
    load: Callable[..., Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    there: bool,
) -> None:
    name, kind = fake
    monkeypatch.setattr(kind, "there", there)
    load(name)
    assert {call["root"] for call in kind.calls} == {tmp_path / "data"}
    downloads = [call["download"] for call in kind.calls]
    assert downloads == ([False, False] if there else [False, True] * 2)
    if name == "svhn":
        assert {call["split"] for call in kind.calls} == {"train", "test"}
    else:
        assert {call["train"] for call in kind.calls} == {True, False}


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


def test_torchvisions_own_files_are_read_without_a_network(
    tmp_path: Path, load: Callable[..., Dataset]
) -> None:
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(raw / f"{part}-images-idx3-ubyte", images)
        write_idx(raw / f"{part}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    dataset = load("fashion-mnist")
    assert [len(split) for split in parts(dataset)] == [30, 10, 20]
    assert dataset.classes[9] == "Ankle boot"
    assert torch.equal(dataset.test.images[:, 0], dataset.test.images[:, 2])


@pytest.fixture
def local_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a CIFAR-10 of 40 images in torchvision's own format, with its checksums."""
    base = tmp_path / "data" / "cifar-10-batches-py"
    base.mkdir(parents=True)
    kind = torchvision.datasets.CIFAR10
    sums = {}
    names = [f"c{i}" for i in range(10)]
    for name, seed in (("data_batch_1", 0), ("test_batch", 1), ("batches.meta", None)):
        content = {"label_names": names}
        if seed is not None:
            pixels = np.random.default_rng(seed).integers(0, 256, (20, 3072), dtype=np.uint8)
            content = {"data": pixels, "labels": [i % 10 for i in range(20)]}
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    meta = kind.meta | {"md5": sums["batches.meta"]}
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(kind, "meta", meta)
    return base


def test_cifar_files_are_verified_by_their_checksums(
    local_cifar: Path, load: Callable[..., Dataset]
) -> None:
    dataset = load("cifar10")
    assert [len(split) for split in parts(dataset)] == [10, 10, 20]
    assert dataset.classes[7] == "c7"
    content = bytearray((local_cifar / "test_batch").read_bytes())
    content[-2000] ^= 1
    (local_cifar / "test_batch").write_bytes(content)
    data._real_dataset.cache_clear()
    with pytest.raises(FileNotFoundError, match="CIFAR-10 isn't in .* no network in tests"):
        load("cifar10")


@pytest.mark.parametrize("name", FAKES)
def test_a_failed_download_offers_what_needs_none(
    name: str, tmp_path: Path, load: Callable[..., Dataset]
) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load(name)
    message = str(caught.value)
    words = [data.TORCHVISION_SETS[name][0], str(tmp_path / "data"), data.TORCHVISION_SETS[name][1]]
    words += ["DATASET=shapes", "digits", "train/<class>/*"]
    for word in words:
        assert word in message


# --- Channel statistics ------------------------------------------------------------------------


def test_channel_statistics_are_numpys_in_float64() -> None:
    # More images than are counted at once, with unlike channels.
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5000, 3, 9, 7)))
    images = torch.stack([images[:, 0], images[:, 1] // 3, 200 + images[:, 2] // 20], 1).byte()
    pixels = images.numpy().astype(np.float64) / 255
    mean, deviation = channel_statistics(images)
    assert mean.dtype == deviation.dtype == torch.float32 and mean.shape == deviation.shape == (3,)
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(deviation, pixels.std((0, 2, 3)), rtol=1e-7)


def test_channel_statistics_are_those_of_the_training_images_kept(
    folder: Path, load: Callable[..., Dataset]
) -> None:
    whole, subset = load(folder), load(folder, train_size=4)
    expected = subset.train.images.double().div(255).mean((0, 2, 3))
    torch.testing.assert_close(subset.channel_statistics[0].double(), expected)
    assert not torch.equal(whole.channel_statistics[0], subset.channel_statistics[0])


def test_a_constant_channel_is_divided_by_one() -> None:
    images = torch.zeros(4, 3, 5, 5, dtype=torch.uint8)
    images[:, 1] = 255
    images[:, 2, 0] = 10
    mean, deviation = channel_statistics(images)
    assert mean.tolist()[:2] == [0, 1] and deviation.tolist()[:2] == [1, 1]
    assert 0 < deviation[2] < 1


def test_normalised_training_images_have_mean_zero_and_deviation_one() -> None:
    images = torch.from_numpy(np.stack([noise(i) for i in range(30)]).transpose(0, 3, 1, 2))
    out = data.normalise(images, *channel_statistics(images))
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


# --- Choices of an epoch -----------------------------------------------------------------------

ALL = Augmentation(flip=True, crop_padding=4, cutout=8)


def test_choices_repeat_and_differ_between_epochs_and_seeds() -> None:
    def choices(seed: int, epoch: int) -> data.EpochChoices:
        return epoch_choices(200, ALL, 32, True, seed, epoch)

    first, again = choices(0, 1), choices(0, 1)
    for name in ("order", "flips", "shifts", "holes"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        for other in (choices(0, 2), choices(1, 1), choices(1, 0)):
            assert not torch.equal(getattr(first, name), getattr(other, name))


def test_choices_neither_use_nor_move_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = epoch_choices(50, ALL, 32, True, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(epoch_choices(50, ALL, 32, True, 0, 0).order, first.order)


def test_choices_cover_their_ranges_evenly() -> None:
    choices = epoch_choices(20_000, Augmentation(crop_padding=2), 32, True, 0, 0)
    assert sorted(choices.order.tolist()) == list(range(20_000))
    assert choices.flips.float().mean() == pytest.approx(0.5, abs=0.02)
    for axis in (0, 1):
        shares = torch.bincount(choices.shifts[:, axis]) / 20_000
        torch.testing.assert_close(shares, torch.full((5,), 0.2), atol=0.015, rtol=0)
        assert (choices.holes[:, axis].min(), choices.holes[:, axis].max()) == (0, 31)
    together = torch.corrcoef(choices.shifts.T.float())[0, 1]
    assert abs(together) < 0.03


def test_flips_alternate_by_epoch() -> None:
    flips = [epoch_choices(64, ALL, 32, True, 3, epoch).flips for epoch in range(6)]
    for earlier, later in zip(flips, flips[1:], strict=False):
        assert torch.equal(earlier, ~later)
    assert 0 < flips[0].sum() < 64


@pytest.mark.parametrize(("flip", "mirror"), [(False, True), (True, False)])
def test_nothing_is_flipped_that_must_not_be(flip: bool, mirror: bool) -> None:
    augmentation = Augmentation(flip=flip)
    assert not any(
        epoch_choices(64, augmentation, 32, mirror, 0, epoch).flips.any() for epoch in range(3)
    )


def test_crops_scale_with_the_image_size() -> None:
    for size, largest in ((16, 4), (32, 8), (64, 16)):
        assert epoch_choices(2000, ALL, size, True, 0, 0).shifts.max() == largest


@pytest.mark.parametrize(
    "options", [{"crop_padding": -1}, {"crop_padding": 17}, {"cutout": -1}, {"cutout": 33}]
)
def test_augmentation_out_of_range_is_refused(options: dict[str, int]) -> None:
    ((name, value),) = options.items()
    largest = 16 if name == "crop_padding" else 32
    with pytest.raises(ValueError, match=f"{name} is {value}; expected 0 to {largest} "):
        Augmentation(**options)


# --- Loaders -----------------------------------------------------------------------------------

LOADERS = [ResidentLoader, StreamingLoader]
AUGMENTATIONS = {
    "none": NO_AUGMENTATION,
    "flip": Augmentation(flip=True, crop_padding=0),
    "crop": Augmentation(flip=False, crop_padding=4),
    "large crop": Augmentation(flip=False, crop_padding=16),
    "cutout": Augmentation(flip=False, crop_padding=0, cutout=7),
    "even cutout": Augmentation(flip=False, crop_padding=0, cutout=12),
    "all": Augmentation(flip=True, crop_padding=4, cutout=12),
}
MEAN, DEVIATION = torch.tensor([0.3, 0.5, 0.7]), torch.tensor([0.2, 0.3, 0.1])


def split_of(count: int = 23, size: int = 32) -> Split:
    images = np.stack([noise(i, size) for i in range(count)]).transpose(0, 3, 1, 2)
    return Split(torch.from_numpy(np.ascontiguousarray(images)), torch.arange(count))


def loader_of(
    kind: type[ResidentLoader] = ResidentLoader,
    augmentation: Augmentation = ALL,
    size: int = 32,
    batch_size: int = 5,
    **options: object,
) -> ResidentLoader:
    return kind(split_of(size=size), MEAN, DEVIATION, batch_size, augmentation, **options)


def reference(loader: ResidentLoader, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Do an epoch slowly, image by image in numpy and float64."""
    size, augmentation = loader.image_size, loader.augmentation
    choices = epoch_choices(
        len(loader.split), augmentation, size, loader.mirror, loader.seed, epoch
    )
    padding = round(augmentation.crop_padding * size / 32)
    side = round(augmentation.cutout * size / 32)
    images, labels = [], []
    for index in choices.order.tolist()[: len(loader) * loader.batch_size]:
        image = loader.split.images[index].numpy()
        image = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
        top, left = choices.shifts[index].tolist()
        image = image[:, top : top + size, left : left + size]
        if choices.flips[index]:
            image = image[:, :, ::-1]
        pixels = image / 255
        pixels = (pixels - MEAN.numpy()[:, None, None]) / DEVIATION.numpy()[:, None, None]
        row, column = (n - side // 2 for n in choices.holes[index].tolist())
        rows = slice(max(row, 0), max(row + side, 0))
        pixels[:, rows, max(column, 0) : max(column + side, 0)] = 0
        images.append(pixels)
        labels.append(index)
    return np.stack(images), np.array(labels)


def gathered(loader: ResidentLoader, epoch: int, start: int = 0) -> tuple[torch.Tensor, ...]:
    images, labels = zip(*loader.batches(epoch, start), strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS.keys())
@pytest.mark.parametrize("size", [16, 32, 33])
def test_batches_equal_the_slow_reference(
    kind: type[ResidentLoader], augmentation: Augmentation, size: int
) -> None:
    loader = loader_of(kind, augmentation, size)
    for epoch in (0, 3):
        images, labels = gathered(loader, epoch)
        expected, expected_labels = reference(loader, epoch)
        np.testing.assert_array_equal(labels, expected_labels)
        np.testing.assert_allclose(images, expected, atol=2e-5)


@pytest.mark.parametrize("kind", LOADERS)
def test_batches_have_a_shape_a_type_and_a_memory_format(kind: type[ResidentLoader]) -> None:
    loader = loader_of(kind)
    batches = list(loader.batches(0))
    assert len(batches) == len(loader) == 4
    for images, labels in batches:
        assert images.shape == (5, 3, 32, 32) and images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.shape == (5,) and labels.dtype == torch.int64


@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS.keys())
def test_streaming_and_resident_batches_are_the_same(augmentation: Augmentation) -> None:
    resident, streaming = (loader_of(kind, augmentation, seed=4) for kind in LOADERS)
    for epoch in range(2):
        a, b = (gathered(loader, epoch) for loader in (resident, streaming))
        assert torch.equal(a[1], b[1])
        torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", LOADERS)
def test_an_epoch_can_be_entered_at_any_batch(kind: type[ResidentLoader]) -> None:
    loader = loader_of(kind)
    images, labels = gathered(loader, 2)
    for start in range(len(loader)):
        entered = gathered(loader_of(kind), 2, start)
        assert torch.equal(entered[0], images[5 * start :])
        assert torch.equal(entered[1], labels[5 * start :])
    assert list(loader.batches(2, len(loader))) == []


@pytest.mark.parametrize("kind", LOADERS)
def test_epochs_differ_and_repeat_whatever_came_before(kind: type[ResidentLoader]) -> None:
    loader = loader_of(kind)
    epochs = [gathered(loader, epoch)[0] for epoch in (0, 1, 0)]
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], gathered(loader_of(kind, seed=1), 0)[0])


@pytest.mark.parametrize("kind", LOADERS)
def test_each_image_comes_at_most_once_an_epoch_and_all_in_time(
    kind: type[ResidentLoader],
) -> None:
    loader = loader_of(kind)
    seen: set[int] = set()
    for epoch in range(6):
        labels = gathered(loader, epoch)[1].tolist()
        assert len(set(labels)) == len(labels) == 20
        seen |= set(labels)
    assert seen == set(range(23))


@pytest.mark.parametrize("kind", LOADERS)
def test_loaders_leave_the_split_and_the_global_generator_alone(
    kind: type[ResidentLoader],
) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    loader = loader_of(kind)
    before = loader.split.images.clone()
    for images, _ in loader.batches(0):
        images.zero_()
    assert torch.equal(loader.split.images, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_and_its_flip_come_in_turn() -> None:
    loader = loader_of(augmentation=AUGMENTATIONS["flip"], batch_size=23)
    images, labels = gathered(loader, 0)
    later, later_labels = gathered(loader, 1)
    first, second = images[labels.argsort()], later[later_labels.argsort()]
    assert torch.equal(first, second.flip(-1))


def test_the_windows_are_views() -> None:
    loader = loader_of()
    stored = loader._windows.untyped_storage().nbytes()
    assert stored == 23 * 3 * 40 * 40


def test_reflect_pad_is_numpys() -> None:
    images = split_of(3, 9).images
    expected = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    padded = data.reflect_pad(images, 4)
    assert padded.dtype == torch.uint8
    np.testing.assert_array_equal(padded.numpy(), expected)


# --- Colours, operations and mixtures ----------------------------------------------------------

STRONGER = {
    "colour jitter": Augmentation(colour_jitter=0.4),
    "TrivialAugment": Augmentation(trivial_augment=True),
    "mixup": Augmentation(mixup=0.4),
}


def smooth_split(count: int, size: int) -> Split:
    """Images with soft gradients, as photographs have, so that colours aren't all clipped."""
    ramp = torch.linspace(40, 200, size)
    image = torch.stack(
        [ramp.expand(size, -1), ramp[:, None].expand(-1, size), ramp.flip(0).expand(size, -1)]
    )
    offsets = torch.arange(count).view(-1, 1, 1, 1)
    return Split((image[None] + offsets).to(torch.uint8), torch.arange(count) % 4)


def smooth_loader(kind: type[ResidentLoader], augmentation: Augmentation, seed: int = 0):
    mean, deviation = torch.full((3,), 0.5), torch.full((3,), 0.25)
    return kind(smooth_split(22, 32), mean, deviation, 5, augmentation, True, seed)


@pytest.mark.parametrize("augmentation", STRONGER.values(), ids=STRONGER.keys())
def test_stronger_augmentations_are_the_same_in_both_loaders_and_at_any_batch(
    augmentation: Augmentation,
) -> None:
    resident, streaming = (smooth_loader(kind, augmentation, seed=4) for kind in LOADERS)
    for epoch in range(2):
        images, labels = gathered(resident, epoch)
        for loader, start in ((streaming, 0), (streaming, 2), (resident, 2)):
            others, other_labels = gathered(loader, epoch, start)
            torch.testing.assert_close(others, images[5 * start :], atol=1e-5, rtol=0)
            torch.testing.assert_close(other_labels, labels[5 * start :])
    assert not torch.equal(gathered(resident, 0)[0], gathered(resident, 1)[0])
    plain = smooth_loader(ResidentLoader, Augmentation(), seed=4)
    assert not torch.equal(gathered(resident, 0)[0], gathered(plain, 0)[0])


def test_jitter_is_torchvisions_brightness_then_contrast_then_saturation() -> None:
    from torchvision.transforms.v2 import functional as transforms

    images = smooth_split(6, 16).images
    changes = torch.tensor(
        [[0.0, 0, 0], [0.3, 0, 0], [0, -0.4, 0], [0, 0, 0.5], [-0.2, 0.3, -0.6], [0.9, 0.9, 0.9]]
    )
    changed = data.jitter(images, changes)
    assert changed.dtype == torch.uint8 and torch.equal(changed[0], images[0])
    for image, found, change in zip(images, changed, (1 + changes).tolist(), strict=True):
        expected = transforms.adjust_brightness(image.float() / 255, change[0])
        expected = transforms.adjust_contrast(expected, change[1])
        expected = transforms.adjust_saturation(expected, change[2])
        torch.testing.assert_close(found.float(), 255 * expected, atol=1.0, rtol=0)


def test_trivial_augment_is_decided_by_each_images_seed() -> None:
    images = smooth_split(12, 16).images
    seeds = torch.arange(12)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    changed = data.trivial_augment(images, seeds)
    assert torch.equal(torch.get_rng_state(), state)
    assert changed.dtype == torch.uint8 and changed.shape == images.shape
    assert torch.equal(data.trivial_augment(images[3:7], seeds[3:7]), changed[3:7])
    assert not torch.equal(data.trivial_augment(images, seeds + 100), changed)
    same = [torch.equal(a, b) for a, b in zip(images, changed, strict=True)]
    assert sum(same) < 8  # one of its operations leaves the image as it is


def test_mixup_blends_images_and_labels_in_the_same_shares() -> None:
    mixed = smooth_loader(ResidentLoader, Augmentation(mixup=0.4), seed=2)
    plain = smooth_loader(ResidentLoader, Augmentation(), seed=2)
    choices = epoch_choices(22, mixed.augmentation, 32, True, 2, 1)
    shares = choices.shares[: len(mixed)]
    assert ((shares >= 0) & (shares <= 1)).all() and shares.std() > 0
    for share, (image, label), (before, classes) in zip(
        shares, mixed.batches(1), plain.batches(1), strict=True
    ):
        torch.testing.assert_close(image, share * before + (1 - share) * before.flip(0))
        torch.testing.assert_close(label.sum(1), torch.ones(5))
        hot = torch.nn.functional.one_hot(classes, 4).float()
        torch.testing.assert_close(label, share * hot + (1 - share) * hot.flip(0))


def test_shares_of_a_mixture_follow_the_beta_distribution() -> None:
    shares = epoch_choices(20_000, Augmentation(mixup=0.4), 32, True, 0, 0).shares.double()
    assert abs(shares.mean() - 0.5) < 0.01
    assert abs(shares.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.005  # variance of Beta(a, a)


@pytest.mark.parametrize(
    "options", [{"colour_jitter": 1.0}, {"colour_jitter": -0.1}, {"mixup": -1}, {"mixup": 11}]
)
def test_stronger_augmentation_out_of_range_is_refused(options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    expected = "0 to 10" if name == "mixup" else "0 to below 1"
    with pytest.raises(ValueError, match=f"{name} is {float(value)}; expected {expected}"):
        Augmentation(**options)


# --- Choosing the loader -----------------------------------------------------------------------


@pytest.fixture
def tiny(folder: Path, load: Callable[..., Dataset]) -> Dataset:
    return load(folder)


def make(dataset: Dataset, device: str = "cpu") -> ResidentLoader:
    return make_loader(dataset, batch_size=4, augmentation=ALL, seed=7, device=torch.device(device))


def test_make_loader_hands_everything_on(tiny: Dataset) -> None:
    loader = make(tiny)
    assert type(loader) is ResidentLoader
    assert loader.split is tiny.train
    assert (loader.batch_size, loader.augmentation, loader.seed) == (4, ALL, 7)
    assert loader.mirror == tiny.mirror and loader.device == torch.device("cpu")
    assert torch.equal(loader.mean, tiny.channel_statistics[0])
    assert torch.equal(loader.deviation, tiny.channel_statistics[1])


@pytest.mark.skipif(sys.platform == "win32", reason="sysconf is POSIX's")
def test_make_loader_streams_what_does_not_fit(
    tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    padding = round(4 * 12 / 32)
    needed = len(tiny.train) * 3 * (12 + 2 * padding) ** 2
    for memory, kind in ((2 * needed + 8, ResidentLoader), (2 * needed - 8, StreamingLoader)):
        sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": memory}
        monkeypatch.setattr(data.os, "sysconf", sizes.__getitem__)
        loader = make(tiny)
        assert type(loader) is kind
        assert gathered(loader, 0)[0].shape == (16, 3, 12, 12)


def test_make_loader_asks_a_gpu_for_its_free_memory(
    tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, kind in ((10**9, ResidentLoader), (100, StreamingLoader)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, f=free: (f, 10**9))
        assert type(make(tiny, "cuda")) is kind


# --- Split -------------------------------------------------------------------------------------


def test_first_keeps_everything_together() -> None:
    masks = torch.rand(23, 32, 32) > 0.5
    split = Split(split_of().images, torch.arange(23), masks, ~masks)
    for count, expected in ((3, [0, 1, 2]), (None, list(range(23)))):
        part = split.first(count)
        assert part.labels.tolist() == expected and len(part) == len(expected)
        assert torch.equal(part.images, split.images[expected])
        assert torch.equal(part.masks, masks[expected])
        assert torch.equal(part.mark_masks, ~masks[expected])
    assert split_of().first(1).masks is None


def test_drawn_splits_are_kept_and_a_damaged_file_is_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn() -> Dataset:
        data._draw_split.cache_clear()
        return load_dataset("shapes", image_size=16, data_dir=tmp_path, **sizes)

    sizes = {"train_size": 20, "validation_size": 10, "test_size": 10}
    first = drawn()
    with monkeypatch.context() as patch:
        patch.setattr(data.shapes, "draw", None)  # calling it would raise
        second = drawn()
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.masks, second.test.masks)
    assert first.fingerprint == second.fingerprint
    for path in (tmp_path / "drawn").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    third = drawn()
    assert torch.equal(first.train.images, third.train.images)
    assert third.fingerprint == first.fingerprint


def test_another_opencv_draws_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"train_size": 20, "validation_size": 10, "test_size": 10}
    load_dataset("shapes", image_size=16, data_dir=tmp_path, **sizes)
    data._draw_split.cache_clear()
    drawn = []
    draw = data.shapes.draw
    monkeypatch.setattr(data.cv2, "__version__", "0.0")
    monkeypatch.setattr(data.shapes, "draw", lambda *a, **k: drawn.append(1) or draw(*a, **k))
    load_dataset("shapes", image_size=16, data_dir=tmp_path, **sizes)
    assert len(drawn) == 3
    data._draw_split.cache_clear()
