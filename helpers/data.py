"""Datasets, splits and the loader.

One call, `load_dataset`, gives disjoint train, validation and test splits for every dataset: real
ones that torchvision downloads, scikit-learn's digits, drawn shapes, or any folder of images. All
images are RGB, uint8, and of one size, so that every network and every map fits every dataset.

`ResidentLoader` keeps a split on the device as one uint8 tensor and augments with indexing alone.
`StreamingLoader` does the same work for splits that don't fit there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from helpers import shapes
from helpers.config import ROOT, as_float, check, dataset_slug, is_path, is_whole

VALIDATION_SHARE = 0.1  # of the training images, for datasets without a validation split
TEST_SHARE = 0.2  # of all images, for folders without test/
SPLIT_SEED = 20_161  # splits are the same in every study
SPLITS = ("train", "validation", "test")

# How published names are to be read in tables; folders not listed are called by their own name.
FOLDER_TITLES = {"cifar10-jpeg": "CIFAR-10 (JPEG q75)"}


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
        if count is None:
            return self
        parts = (self.images, self.labels, self.masks, self.mark_masks)
        return Split(*(None if part is None else part[:count] for part in parts))


@dataclass(frozen=True)
class Dataset:
    """Three disjoint splits, the class names, and a fingerprint of the pixels and labels.

    `mirror` says whether an image flipped left to right keeps its class. The fingerprint is that
    of the whole dataset: it doesn't depend on the sizes asked for.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    fingerprint: str
    mirror: bool = True

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
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = torch.zeros(256, dtype=torch.float64)
        for part in images[:, channel].split(4096):
            counts += torch.bincount(part.flatten(), minlength=256)
        mean = (counts * values).sum() / counts.sum()
        means.append(mean)
        deviations.append(((counts * (values - mean) ** 2).sum() / counts.sum()).sqrt())
    # A constant channel has nothing to scale; 1 keeps the division defined.
    deviation = torch.stack(deviations).float()
    return torch.stack(means).float(), torch.where(deviation > 0, deviation, 1.0)


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


def _cut(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split indices into a stratified `share` (at least one image a class) and the rest."""
    generator = np.random.default_rng(seed)
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


@dataclass(frozen=True)
class _Pool:
    """All images of a real dataset before splitting: N x H x W x 3 uint8 and labels."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]

    @functools.cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.train_images, self.train_labels, self.test_images, self.test_labels)


def _split_pool(name: str, title: str, pool: _Pool, mirror: bool) -> Dataset:
    """Cut a stratified validation split from the training images; order each split."""
    held_out, kept = _cut(pool.train_labels, VALIDATION_SHARE, SPLIT_SEED)

    def split(images: np.ndarray, labels: np.ndarray, indices: np.ndarray, seed: int) -> Split:
        indices = indices[stratified_order(labels[indices], seed)]
        pixels = torch.from_numpy(np.ascontiguousarray(images[indices].transpose(0, 3, 1, 2)))
        return Split(pixels, torch.from_numpy(labels[indices].astype(np.int64)))

    everything = np.arange(len(pool.test_labels))
    return Dataset(
        name,
        title,
        pool.classes,
        split(pool.train_images, pool.train_labels, kept, SPLIT_SEED + 1),
        split(pool.train_images, pool.train_labels, held_out, SPLIT_SEED + 2),
        split(pool.test_images, pool.test_labels, everything, SPLIT_SEED + 3),
        pool.fingerprint,
        mirror,
    )


# --- Datasets ----------------------------------------------------------------------------------


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize H x W x 3 to size x size: area averaging down, cubic interpolation up."""
    if image.shape[:2] == (size, size):
        return image
    shrinking = image.shape[0] > size or image.shape[1] > size
    method = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    return cv2.resize(image, (size, size), interpolation=method)


def _rgb(images: np.ndarray, size: int | None) -> np.ndarray:
    """Return N x H x W x 3 uint8 from N x H x W (grayscale) or N x H x W x 3, resized."""
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    if size is None or images.shape[1] == size:
        return np.ascontiguousarray(images)
    return np.stack([_resize(image, size) for image in images])


TORCHVISION_SETS = {
    "cifar10": ("CIFAR-10", "CIFAR10", True),
    "cifar100": ("CIFAR-100", "CIFAR100", True),
    "fashion-mnist": ("Fashion-MNIST", "FashionMNIST", True),
    "svhn": ("SVHN", "SVHN", False),
}
DATASETS = ("shapes", "shapes-marked", "digits", *TORCHVISION_SETS)


def _torchvision_pool(name: str, data_dir: Path, image_size: int | None) -> _Pool:
    """Load a torchvision dataset, downloading it (checksum-verified) only where it's missing."""
    import torchvision.datasets as sets

    title, class_name, _ = TORCHVISION_SETS[name]
    constructor = getattr(sets, class_name)
    parts = []
    for train in (True, False):
        which = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
        try:
            try:
                part = constructor(data_dir, download=False, **which)
            except RuntimeError:  # not there, or not whole
                part = constructor(data_dir, download=True, **which)
        except Exception as error:
            raise FileNotFoundError(
                f"{title} isn't in {data_dir} and downloading it failed ({error}). Without a "
                f"network, put torchvision's files for {class_name} there, set DATASET to a folder "
                "of images laid out as train/<class>/*, or use DATASET=shapes or digits, which "
                "need no download."
            ) from error
        images = part.data
        if name == "svhn":
            images, labels, classes = images.transpose(0, 2, 3, 1), part.labels, range(10)
        else:
            labels, classes = part.targets, part.classes
        parts.append((_rgb(np.asarray(images), image_size), np.asarray(labels, dtype=np.int64)))
    (train_images, train_labels), (test_images, test_labels) = parts
    names = tuple(str(c) for c in classes)
    return _Pool(train_images, train_labels, test_images, test_labels, names)


def _digits_pool(image_size: int | None) -> _Pool:
    """Load scikit-learn's 1,797 digits of 8 x 8 pixels, enlarged, a fifth of them for the test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    images = _rgb(images, image_size or 32)
    labels = bunch.target.astype(np.int64)
    test, train = _cut(labels, TEST_SHARE, SPLIT_SEED)
    classes = tuple(str(digit) for digit in range(10))
    return _Pool(images[train], labels[train], images[test], labels[test], classes)


# Sizes of the drawn dataset when none are asked for: CIFAR-10's, with its tenth for validation.
SHAPES_SIZES = (45_000, 5_000, 10_000)
SHAPES_PROBE = 200  # images of each split that the fingerprint covers: the rest follow


@functools.lru_cache(maxsize=8)
def _draw_split(name: str, split: str, count: int, size: int, data_dir: Path) -> tuple[Split, str]:
    """Draw a split, or read it from data_dir/drawn/ if the same program drew it before."""
    labels = np.arange(max(count, SHAPES_PROBE)) % len(shapes.CLASSES)
    # Another OpenCV or NumPy may draw other pixels: both are part of the program.
    source = Path(shapes.__file__).read_bytes() + f"{cv2.__version__} {np.__version__}".encode()
    program = hashlib.sha256(source).hexdigest()[:12]
    path = data_dir / "drawn" / f"{name}-{split}-{len(labels)}-{size}px-{program}.npz"
    try:
        drawn = dict(np.load(path, allow_pickle=False))
    except Exception:  # missing or damaged: drawing it again gives the same
        seed = SPLITS.index(split)
        drawing = shapes.draw(labels, image_size=size, seed=seed, mark=name == "shapes-marked")
        drawn = {"images": np.ascontiguousarray(drawing.images.transpose(0, 3, 1, 2))}
        drawn |= {"masks": drawing.masks, "mark_masks": drawing.mark_masks}
        temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
        with contextlib.suppress(OSError):  # a full or read-only disk costs time, nothing else
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(temporary, **drawn)
            temporary.replace(path)
    result = Split(
        torch.from_numpy(drawn["images"]),
        torch.from_numpy(labels),
        torch.from_numpy(drawn["masks"]),
        torch.from_numpy(drawn["mark_masks"]) if name == "shapes-marked" else None,
    )
    return result.first(count), fingerprint(drawn["images"][:SHAPES_PROBE], labels[:SHAPES_PROBE])


def _shapes_dataset(
    name: str,
    image_size: int | None,
    sizes: tuple[int | None, int | None, int | None],
    data_dir: Path,
) -> Dataset:
    """Draw the three splits. A longer split begins with the shorter one, so subsets are nested."""
    splits, prints = [], []
    for split, size, default in zip(SPLITS, sizes, SHAPES_SIZES, strict=True):
        count = default if size is None else size
        drawn, probe = _draw_split(name, split, count, image_size or 32, data_dir)
        splits.append(drawn)
        prints.append(probe)
    title = "Shapes" if name == "shapes" else "Shapes with a corner mark"
    total = hashlib.sha256("".join(prints).encode()).hexdigest()[:16]
    return Dataset(name, title, shapes.CLASSES, *splits, total)


# --- Folders of images -------------------------------------------------------------------------


def read_image(path: Path | str) -> np.ndarray:
    """Read an image file as H x W x 3 uint8 RGB: whatever Pillow or OpenCV reads, upright.

    Grayscale, palette and CMYK images are converted, 16-bit ones scaled to 8 bits, transparent
    ones laid on white; of an animation the first frame counts. Floating-point values count as
    0 to 1, 0 to 255 or 0 to 65535, whichever is the least range that holds them. Nothing in the
    file is executed.

    Raises FileNotFoundError if there is no such file, ValueError (naming it) if it's damaged,
    truncated or no image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected an image")
    try:
        return _decode_file(path)
    except Exception as error:  # decoders raise nearly anything when a file is damaged
        raise ValueError(
            f"{path} can't be read as an image ({error}). Replace the file, or remove it."
        ) from error


def _decode_file(path: Path) -> np.ndarray:
    if not path.stat().st_size:
        raise ValueError("it is empty")
    try:
        image = Image.open(path)
    except UnidentifiedImageError:
        # Some formats (Radiance HDR, PAM) are known to OpenCV alone.
        pixels = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_COLOR)
        if pixels is None:
            raise
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    with image:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):
            return _gray_to_rgb(np.asarray(image, dtype=np.float64), image.mode == "F")
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return np.asarray(image.convert("RGB"))


def _gray_to_rgb(values: np.ndarray, floating: bool) -> np.ndarray:
    """Scale H x W gray values (16 bits, or floating point) to H x W x 3 uint8."""
    if not np.isfinite(values).all():
        raise ValueError("it has values that aren't finite")
    largest = 65535
    if floating:
        largest = next((n for n in (1, 255) if values.max() <= n), 65535)
    gray = np.clip(values * (255 / largest), 0, 255).round().astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def _class_folders(folder: Path) -> dict[str, Path]:
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }


# What Windows leaves in folders of pictures.
NO_IMAGES = ("thumbs.db", "desktop.ini")


def _image_files(folder: Path) -> list[Path]:
    """Return a class's files, sorted by name; hidden ones and folders don't count."""

    def counts(entry: os.DirEntry) -> bool:
        hidden = entry.name.startswith(".") or entry.name.lower() in NO_IMAGES
        try:
            return not hidden and entry.is_file()
        except OSError:  # a symbolic link to itself
            return False

    with os.scandir(folder) as entries:  # asks the disk once a folder, not once a file
        names = [entry.name for entry in entries if counts(entry)]
    return [folder / name for name in sorted(names)]


def _list_folder(root: Path) -> tuple[tuple[str, ...], dict[str, list[tuple[Path, int]]]]:
    """Return the classes and, for train and test, every file with its label; check the layout."""
    layout = "expected train/<class>/* and optionally test/<class>/*"
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; {layout} in it")
    if not (root / "train").is_dir():
        found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"{root} holds {found}; {layout}")
    folders = {"train": _class_folders(root / "train")}
    if (root / "test").is_dir():
        folders["test"] = _class_folders(root / "test")
    classes = tuple(folders["train"])
    if len(classes) < 2:
        found = f"one class ({classes[0]})" if classes else "no class folders"
        raise ValueError(
            f"{root / 'train'} holds {found}; expected at least two folders of images, one a class"
        )
    if "test" in folders and set(folders["test"]) != set(classes):
        missing = sorted(set(classes) - set(folders["test"]))
        extra = sorted(set(folders["test"]) - set(classes))
        raise ValueError(
            f"{root / 'test'} lacks the classes {missing} and has the unknown classes {extra}; "
            "expected the same class folders as in train/. Add them, or remove test/ to have a "
            "test split cut from train/."
        )
    files: dict[str, list[tuple[Path, int]]] = {}
    for part, by_class in folders.items():
        files[part] = []
        for label, name in enumerate(classes):
            images = _image_files(by_class[name])
            if not images:
                raise ValueError(
                    f"{by_class[name]} is empty; expected at least one image of class {name!r}"
                )
            files[part] += [(path, label) for path in images]
    return classes, files


def _decode(paths: list[Path], image_size: int | None) -> np.ndarray:
    """Read all images as N x H x W x 3; with `image_size` each is resized to a square of it."""

    def read(path: Path) -> np.ndarray:
        image = read_image(path)
        return image if image_size is None else _resize(image, image_size)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        images = list(pool.map(read, paths))
    sizes = Counter(image.shape[:2] for image in images)
    if len(sizes) > 1:
        (height, width), _ = sizes.most_common(1)[0]
        odd = next(i for i, image in enumerate(images) if image.shape[:2] != (height, width))
        found = "x".join(str(n) for n in images[odd].shape[1::-1])
        raise ValueError(
            f"the images have {len(sizes)} different sizes: {paths[odd]} is {found}, most are "
            f"{width}x{height}; expected one size. Set image_size to have all resized."
        )
    (height, width), _ = sizes.most_common(1)[0]
    if height != width:
        raise ValueError(
            f"the images are {width}x{height}; expected squares. Set image_size to have all "
            "resized to squares."
        )
    return np.stack(images)


def _folder_state(root: Path) -> str:
    """Return 16 hexadecimal digits that change with any file's name, class, size or time."""
    classes, files = _list_folder(root)
    digest = hashlib.sha256(f"{root} {classes}".encode(errors="surrogateescape"))
    for part in files:
        lines = []
        for path, label in files[part]:
            stat = os.stat(path)
            lines.append(f"{part} {path.name} {label} {stat.st_size} {stat.st_mtime_ns}\n")
        digest.update("".join(lines).encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _folder_pool(root: Path, image_size: int | None, data_dir: Path, state: str) -> _Pool:
    """Load a folder of images, decoding it only when it has changed since the last time.

    The decoded arrays lie in data_dir/decoded/<name, size and state>/ with their fingerprint,
    which is checked whenever they are read.
    """
    classes, files = _list_folder(root)
    cache = data_dir / "decoded" / f"{dataset_slug(str(root))}-{image_size or 'own'}-{state}"
    if cache.is_dir():
        return _read_cache(cache, classes)
    images = _decode([p for part in files.values() for p, _ in part], image_size)
    labels = np.array([label for part in files.values() for _, label in part], dtype=np.int64)
    if "test" in files:
        count = len(files["train"])
        train, test = np.arange(count), np.arange(count, len(labels))
    else:
        smallest = min(Counter(labels.tolist()).values())
        if smallest < 3:
            name = classes[int(np.argmin(np.bincount(labels)))]
            raise ValueError(
                f"class {name!r} of {root} has {smallest} images; expected at least 3 a class to "
                "cut validation and test splits. Add images, or remove the class."
            )
        test, train = _cut(labels, TEST_SHARE, SPLIT_SEED)
    smallest = min(Counter(labels[train].tolist()).values())
    if smallest < 2:
        name = classes[int(np.argmin(np.bincount(labels[train])))]
        raise ValueError(
            f"class {name!r} of {root / 'train'} has {smallest} image; expected at least 2 a "
            "class to cut a validation split. Add images, or remove the class."
        )
    pool = _Pool(images[train], labels[train], images[test], labels[test], classes)
    _write_cache(cache, pool)
    return pool


_CACHE_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def _write_cache(cache: Path, pool: _Pool) -> None:
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    for name in _CACHE_ARRAYS:
        np.save(temporary / f"{name}.npy", getattr(pool, name), allow_pickle=False)
    (temporary / "fingerprint.json").write_text(json.dumps(pool.fingerprint))
    try:
        temporary.rename(cache)
    except OSError:  # another process was faster
        shutil.rmtree(temporary)


def _read_cache(cache: Path, classes: tuple[str, ...]) -> _Pool:
    remedy = f"Delete the folder {cache}: the images are then decoded again."
    try:
        arrays = [np.load(cache / f"{name}.npy", allow_pickle=False) for name in _CACHE_ARRAYS]
        expected = json.loads((cache / "fingerprint.json").read_text())
    except Exception as error:  # numpy raises nearly anything when a header is damaged
        raise ValueError(f"the cache of decoded images is damaged ({error}). {remedy}") from error
    pool = _Pool(*arrays, classes)
    if pool.fingerprint != expected:
        raise ValueError(
            f"the cache of decoded images has fingerprint {pool.fingerprint}, expected {expected}: "
            f"its files are corrupted. {remedy}"
        )
    return pool


@functools.lru_cache(maxsize=2)
def _real_dataset(name: str, image_size: int | None, data_dir: Path) -> Dataset:
    if name == "digits":
        return _split_pool(name, "Digits", _digits_pool(image_size), False)
    title, _, mirror = TORCHVISION_SETS[name]
    return _split_pool(name, title, _torchvision_pool(name, data_dir, image_size), mirror)


@functools.lru_cache(maxsize=2)
def _folder_dataset(
    name: str, root: Path, image_size: int | None, data_dir: Path, state: str
) -> Dataset:
    """Load a folder; `state` is among the arguments so that a changed folder is loaded again."""
    pool = _folder_pool(root, image_size, data_dir, state)
    return _split_pool(name, FOLDER_TITLES.get(dataset_slug(name), root.name), pool, True)


def _folder(name: str) -> Path:
    return Path(os.path.expanduser(name)).resolve()


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"dataset {name!r} is unknown; choose one of {', '.join(DATASETS)}, or give the path "
        f"of a folder of images (./{name} if you mean a folder here)"
    )


def check_dataset(name: str) -> None:
    """Raise what `load_dataset` would for an unknown name or a folder of another layout.

    Nothing is decoded or downloaded.
    """
    if name in DATASETS:
        return
    if not is_path(name):
        raise _unknown(name)
    _list_folder(_folder(name))


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
    name, a bad layout, an unreadable image (named), mixed sizes without `image_size`, a damaged
    cache, or more images asked for than there are.
    """
    whole_name = isinstance(name, str) and name != "" and "\0" not in name
    check("dataset", name, whole_name, f"one of {', '.join(DATASETS)}, or a folder's path")
    allowed = image_size is None or (is_whole(image_size, 8) and image_size <= 4096)
    check("image_size", image_size, allowed, "8 to 4096 pixels, or None")
    sizes = (train_size, validation_size, test_size)
    for split, size in zip(SPLITS, sizes, strict=True):
        allowed = size is None or is_whole(size)
        check(f"{split}_size", size, allowed, "a positive whole number, or None for all")
    if name in ("shapes", "shapes-marked"):
        dataset = _shapes_dataset(name, image_size, sizes, Path(data_dir))
    elif name in DATASETS:
        dataset = _real_dataset(name, image_size, Path(data_dir).resolve())
    elif is_path(name):
        root = _folder(name)
        state = _folder_state(root)
        dataset = _folder_dataset(name, root, image_size, Path(data_dir).resolve(), state)
    else:
        raise _unknown(name)
    kept = {}
    for split, size in zip(SPLITS, sizes, strict=True):
        whole: Split = getattr(dataset, split)
        if size is not None and size > len(whole):
            raise ValueError(
                f"{split}_size is {size}, but {dataset.title} has {len(whole)} {split} images; "
                "ask for at most that many, or None for all"
            )
        kept[split] = whole.first(size)
    if len(torch.unique(kept["train"].labels)) < len(dataset.classes):
        raise ValueError(
            f"{len(kept['train'])} training images don't cover the {len(dataset.classes)} classes "
            f"of {dataset.title}; ask for more with train_size"
        )
    return replace(dataset, **kept)


# --- Loaders -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image: it is mirrored, shifted, partly blanked out, recoloured.

    `crop_padding` and `cutout` are pixels at an image size of 32 and scale with it. A shift is a
    random crop after reflect-padding by `crop_padding`; cutout (DeVries and Taylor, 2017) sets a
    square of side `cutout` to the mean colour. `colour_jitter` is the largest relative change of
    brightness, contrast and saturation. `trivial_augment` applies one random operation of random
    strength (Müller and Hutter, ICCV 2021, wide space). `mixup` is the parameter alpha of the Beta
    distribution from which the share of a second image, and of its label, is drawn (Zhang et al.,
    ICLR 2018); labels are then class probabilities.

    Raises ValueError for a setting outside what is allowed.
    """

    flip: bool = True
    crop_padding: int = 4
    cutout: int = 0
    colour_jitter: float = 0.0
    trivial_augment: bool = False
    mixup: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "trivial_augment"):
            value = getattr(self, name)
            check(name, value, isinstance(value, bool), "True or False")
        for name, largest in (("crop_padding", 16), ("cutout", 32)):
            value = getattr(self, name)
            allowed = is_whole(value, 0) and value <= largest
            check(name, value, allowed, f"0 to {largest} (pixels at image size 32)")
        jitter, mixup = as_float("colour_jitter", self.colour_jitter), as_float("mixup", self.mixup)
        check("colour_jitter", jitter, 0 <= jitter < 1, "0 to below 1")
        check("mixup", mixup, 0 <= mixup <= 10, "0 to 10")


NO_AUGMENTATION = Augmentation(flip=False, crop_padding=0, cutout=0)


@dataclass(frozen=True)
class EpochChoices:
    """Every random choice of one epoch.

    order N, flips N (bool), shifts and holes (centres of cut-outs) N x 2, colours N x 3 (changes
    in -1 to 1), seeds N (of the operations of TrivialAugment), shares (of the image in a mixture,
    one a batch).
    """

    order: Tensor
    flips: Tensor
    shifts: Tensor
    holes: Tensor
    colours: Tensor
    seeds: Tensor
    shares: Tensor


def epoch_choices(
    count: int, augmentation: Augmentation, image_size: int, mirror: bool, seed: int, epoch: int
) -> EpochChoices:
    """Draw an epoch's choices from one CPU generator that (seed, epoch) alone decide.

    An epoch can therefore be entered at any batch, and repeats exactly. Flips alternate: an image
    mirrored in one epoch isn't in the next (Jordan, "94% on CIFAR-10 in 3.29 Seconds", 2024).
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(count, generator=generator)
    padding = round(augmentation.crop_padding * image_size / 32)
    shifts = torch.randint(0, 2 * padding + 1, (count, 2), generator=generator)
    holes = torch.randint(0, image_size, (count, 2), generator=generator)
    if augmentation.flip and mirror:
        first = torch.Generator().manual_seed((seed * 1_000_003 + 999_983) % 2**63)
        flips = (torch.randint(0, 2, (count,), generator=first) + epoch) % 2 == 1
    else:
        flips = torch.zeros(count, dtype=torch.bool)
    colours = 2 * torch.rand((count, 3), generator=generator) - 1
    seeds = torch.randint(0, 2**62, (count,), generator=generator)
    shares = torch.ones(count)
    if augmentation.mixup:  # torch's Beta distribution takes no generator of one's own
        drawn = np.random.default_rng([seed, epoch]).beta(*[augmentation.mixup] * 2, count)
        shares = torch.from_numpy(drawn.astype(np.float32))
    return EpochChoices(order, flips, shifts, holes, colours, seeds, shares)


@dataclass(frozen=True)
class ResidentLoader:
    """Batches of augmented, normalised images from a split that lies on the device.

    The images are one uint8 tensor, reflect-padded once; every crop window is a view of it
    (`unfold`), so shuffling and cropping a batch are one gather. Batches have exactly
    `batch_size` images; an incomplete last one is left out, other images each epoch.

    Of several processes that train one network together, `rank` of `ranks` gets its equal share of
    each batch, from the same choices.
    """

    split: Split
    mean: Tensor
    deviation: Tensor
    batch_size: int
    augmentation: Augmentation = NO_AUGMENTATION
    mirror: bool = True
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    ranks: int = 1

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.split) // self.batch_size

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return int(self.split.images.shape[-1])

    @functools.cached_property
    def _windows(self) -> Tensor:
        """All crops as a view: N x shifts x shifts x 3 x H x W."""
        size = self.image_size
        padding = round(self.augmentation.crop_padding * size / 32)
        images = self.split.images.to(self.device)
        if padding:
            images = reflect_pad(images, padding)
        return images.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5)

    @functools.cached_property
    def _labels(self) -> Tensor:
        return self.split.labels.to(self.device)

    @functools.cached_property
    def _share(self) -> Tensor:
        """This rank's places in a batch: mirrored, so that the pairs of mixup stay together."""
        places = torch.arange(self.batch_size, device=self.device)
        pair = torch.minimum(places, self.batch_size - 1 - places)
        return places[pair % self.ranks == self.rank]

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images B x 3 x H x W float32, labels) from batch `start` of an epoch.

        Labels are classes (B, int64) or, with mixup, their probabilities (B x K, float32).
        """
        choices = epoch_choices(
            len(self.split), self.augmentation, self.image_size, self.mirror, self.seed, epoch
        )
        order, flips, shifts, holes, colours = (
            part.to(self.device)
            for part in (
                choices.order,
                choices.flips,
                choices.shifts,
                choices.holes,
                choices.colours,
            )
        )
        scale, offset = normalisation(self.mean, self.deviation, self.device)
        side = round(self.augmentation.cutout * self.image_size / 32)
        for batch in range(start, len(self)):
            chosen = order[batch * self.batch_size + self._share]
            shift = shifts[chosen]
            images = self._windows[chosen, shift[:, 0], shift[:, 1]]
            if self.augmentation.flip and self.mirror:
                images = torch.where(flips[chosen, None, None, None], images.flip(-1), images)
            if self.augmentation.trivial_augment:
                images = trivial_augment(images, choices.seeds[chosen.cpu()])
            if self.augmentation.colour_jitter:
                images = jitter(images, self.augmentation.colour_jitter * colours[chosen])
            images = images.contiguous(memory_format=torch.channels_last)
            images = torch.addcmul(offset, images.float(), scale)
            if side:
                images = cut_out(images, holes[chosen], side)
            yield self._mixed(images, self._labels[chosen], float(choices.shares[batch]))

    def _mixed(self, images: Tensor, labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Mix each image and label with those of the batch in reverse order, if mixup is on."""
        if not self.augmentation.mixup:
            return images, labels
        classes = int(self.split.labels.max()) + 1
        labels = torch.nn.functional.one_hot(labels, classes).float()
        mixed = share * images + (1 - share) * images.flip(0)
        return mixed, share * labels + (1 - share) * labels.flip(0)


class StreamingLoader(ResidentLoader):
    """The same batches for a split too large for the device, from a worker-fed DataLoader.

    Choices come from the same generator; torchvision's v2 transforms do the work image by image.
    """

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels as ResidentLoader does."""
        choices = epoch_choices(
            len(self.split), self.augmentation, self.image_size, self.mirror, self.seed, epoch
        )
        used = choices.order[start * self.batch_size : len(self) * self.batch_size]
        used = used.view(-1, self.batch_size)[:, self._share.cpu()].flatten()
        loader = torch.utils.data.DataLoader(
            _AugmentedImages(self, choices),
            batch_size=len(self._share),
            sampler=used.tolist(),
            num_workers=0 if self.device.type == "cpu" else 4,
            pin_memory=self.device.type == "cuda",
            # Its own generator: DataLoader would otherwise draw from torch's global one.
            generator=torch.Generator().manual_seed(0),
        )
        for batch, (images, labels) in enumerate(loader, start):
            images = images.to(self.device, non_blocking=True)
            yield self._mixed(
                images.contiguous(memory_format=torch.channels_last),
                labels.to(self.device, non_blocking=True),
                float(choices.shares[batch]),
            )


@dataclass(frozen=True)
class _AugmentedImages(torch.utils.data.Dataset):
    """One augmented image at a time, for StreamingLoader."""

    loader: StreamingLoader
    choices: EpochChoices

    def __len__(self) -> int:
        return len(self.loader.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from torchvision.transforms.v2 import functional as transforms

        loader, size = self.loader, self.loader.image_size
        image = loader.split.images[index]
        padding = round(loader.augmentation.crop_padding * size / 32)
        if padding:
            image = transforms.pad(image, [padding], padding_mode="reflect")
            top, left = (int(n) for n in self.choices.shifts[index])
            image = transforms.crop(image, top, left, size, size)
        if self.choices.flips[index]:
            image = transforms.horizontal_flip(image)
        if loader.augmentation.trivial_augment:
            image = trivial_augment(image[None], self.choices.seeds[index][None])[0]
        if loader.augmentation.colour_jitter:
            change = loader.augmentation.colour_jitter * self.choices.colours[index]
            image = jitter(image[None], change[None])[0]
        image = transforms.to_dtype(image, torch.float32, scale=True)
        image = transforms.normalize(image, loader.mean.tolist(), loader.deviation.tolist())
        side = round(loader.augmentation.cutout * size / 32)
        if side:
            image = cut_out(image[None], self.choices.holes[index][None], side)[0]
        return image, loader.split.labels[index]


def reflect_pad(images: Tensor, padding: int) -> Tensor:
    """Pad N x C x H x W uint8 images by reflection, in parts that keep the copy small."""
    padded = [
        torch.nn.functional.pad(part.float(), (padding,) * 4, mode="reflect").to(torch.uint8)
        for part in images.split(8192)
    ]
    return torch.cat(padded)


def normalisation(mean: Tensor, deviation: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and offset, 1 x 3 x 1 x 1: scale * uint8 + offset = (x/255 - mean) / std."""
    scale = (1 / (255 * deviation)).view(1, -1, 1, 1).to(device)
    return scale, (-mean / deviation).view(1, -1, 1, 1).to(device)


def normalise(images: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Turn N x 3 x H x W uint8 images into the float32 input of a network (channels last).

    Raises TypeError for images of another type.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}; expected uint8, 0 to 255")
    scale, offset = normalisation(mean, deviation, images.device)
    images = images.contiguous(memory_format=torch.channels_last)
    return torch.addcmul(offset, images.float(), scale)


def cut_out(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """Set a square of `side` pixels around each centre (N x 2: row, column) to 0, the mean."""
    rows = torch.arange(images.shape[-2], device=images.device)
    columns = torch.arange(images.shape[-1], device=images.device)
    first = centres - side // 2
    in_rows = (rows >= first[:, :1]) & (rows < first[:, :1] + side)
    in_columns = (columns >= first[:, 1:]) & (columns < first[:, 1:] + side)
    hole = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    # masked_fill would return another memory format; the copy keeps channels last.
    return images.clone().masked_fill_(hole, 0.0)


def jitter(images: Tensor, changes: Tensor) -> Tensor:
    """Change brightness, contrast and saturation of N x 3 x H x W uint8 images.

    `changes` is N x 3: relative changes above -1; 0 leaves the image as it is. Contrast spreads the
    values around the image's mean luma, saturation around each pixel's (ITU-R BT.601 weights).
    """
    brightness, contrast, saturation = (1 + changes).view(-1, 3, 1, 1, 1).unbind(1)

    def luma(image: Tensor) -> Tensor:
        return (image * image.new_tensor((0.299, 0.587, 0.114)).view(1, 3, 1, 1)).sum(1, True)

    image = (images.float() * brightness).clamp(0, 255)
    mean = luma(image).mean((2, 3), keepdim=True)
    image = (mean + contrast * (image - mean)).clamp(0, 255)
    gray = luma(image)
    return (gray + saturation * (image - gray)).clamp(0, 255).round().to(torch.uint8)


def trivial_augment(images: Tensor, seeds: Tensor) -> Tensor:
    """Apply TrivialAugment (torchvision's, wide space) to N x 3 x H x W uint8 images, one by one.

    `seeds` (N, int64) decide operation and strength. torch's global generator stays as it was.
    """
    from torchvision.transforms.v2 import TrivialAugmentWide

    operation = TrivialAugmentWide()
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(images, seeds.tolist(), strict=True):
            torch.manual_seed(seed)
            changed.append(operation(image))
    return torch.stack(changed)


def make_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    augmentation: Augmentation,
    seed: int,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
) -> ResidentLoader:
    """Return the loader of a dataset's training split: resident if it fits the device's memory.

    The split has to take less than half of the memory that is free now (CUDA), or than what the
    machine has in all (elsewhere), since the network and its activations need the rest.

    Raises ValueError if several ranks can't share a batch equally, in pairs.
    """
    if ranks > 1 and batch_size % (2 * ranks):
        raise ValueError(
            f"batch_size is {batch_size}; {ranks} processes need a multiple of {2 * ranks} to "
            "share each batch equally"
        )
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if hasattr(os, "sysconf")
            else 2**33
        )
    padding = round(augmentation.crop_padding * dataset.image_size / 32)
    needed = dataset.train.images.numel() * (1 + 2 * padding / dataset.image_size) ** 2
    kind = ResidentLoader if needed < free / 2 else StreamingLoader
    mean, deviation = dataset.channel_statistics
    mirror = dataset.mirror
    return kind(
        dataset.train, mean, deviation, batch_size, augmentation, mirror, seed, device, rank, ranks
    )
