"""Folders of images: what lies in them, and reading any image file as RGB.

A folder is laid out as train/<class>/* and optionally test/<class>/*.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

# What Windows leaves in folders of pictures.
NO_IMAGES = ("thumbs.db", "desktop.ini")

# --- One image ---------------------------------------------------------------------------------


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize H x W x 3 to size x size: area averaging down, cubic interpolation up."""
    if image.shape[:2] == (size, size):
        return image
    shrinking = image.shape[0] > size or image.shape[1] > size
    method = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    return cv2.resize(image, (size, size), interpolation=method)


def read_image(path: Path | str) -> np.ndarray:
    """Read an image file as H x W x 3 uint8 RGB: whatever Pillow reads, upright.

    Grayscale, palette and CMYK images are converted, 16-bit ones scaled to 8 bits, transparent
    ones laid on white; of an animation the first frame counts. Floating-point values count as
    0 to 1, 0 to 255 or 0 to 65535, whichever is the least range that holds them.

    Raises FileNotFoundError if there is no such file, ValueError, naming it, if it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected an image")
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                return _gray_to_rgb(np.asarray(image, dtype=np.float64), image.mode == "F")
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise nearly anything when a file is damaged
        raise ValueError(
            f"{path} can't be read as an image ({error}). Replace the file, or remove it."
        ) from error


def _gray_to_rgb(values: np.ndarray, floating: bool) -> np.ndarray:
    """Scale H x W gray values (16 bits, or floating point) to H x W x 3 uint8."""
    if not np.isfinite(values).all():
        raise ValueError("it has values that aren't finite")
    ranges = (1, 255, 65535) if floating else (65535,)
    largest = next((n for n in ranges if values.max() <= n), 65535)
    gray = np.clip(values * (255 / largest), 0, 255).round().astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


# --- A folder ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFolder:
    """A folder's classes and, for train and test (where it is), every file with its label."""

    root: Path
    classes: tuple[str, ...]
    files: dict[str, list[tuple[Path, int]]]

    def state(self) -> str:
        """Return 16 hexadecimal digits that change with any file's name, class, size or time."""
        lines = [f"{self.root} {self.classes}"]
        for part, files in self.files.items():
            for path, label in files:
                stat = path.stat()
                lines.append(f"{part} {path.name} {label} {stat.st_size} {stat.st_mtime_ns}")
        text = "\n".join(lines).encode(errors="surrogateescape")
        return hashlib.sha256(text).hexdigest()[:16]


def list_folder(name: str) -> ImageFolder:
    """List a folder of images; `name` is its path, in which ~ may stand for one's own folder.

    Hidden files and those that Windows leaves among pictures don't count. Raises FileNotFoundError
    or ValueError, naming the place, if it isn't laid out as expected.
    """
    root = Path(os.path.expanduser(name)).resolve()
    if not (root / "train").is_dir():
        raise FileNotFoundError(
            f"{root} has no folder train; expected train/<class>/* and optionally test/<class>/*"
        )
    parts = [part for part in ("train", "test") if (root / part).is_dir()]
    folders = {
        part: {p.name: p for p in sorted((root / part).glob("[!.]*")) if p.is_dir()}
        for part in parts
    }
    classes = tuple(folders["train"])
    if len(classes) < 2:
        raise ValueError(
            f"{root / 'train'} holds {len(classes)} class folders; expected at least 2"
        )
    if extra := folders[parts[-1]].keys() ^ set(classes):
        raise ValueError(
            f"{root} has in train/ or in test/ alone: {', '.join(sorted(extra))}; expected the "
            "same classes in both. Add the folders, or remove test/ to have a test split cut from "
            "train/."
        )
    files: dict[str, list[tuple[Path, int]]] = {part: [] for part in parts}
    # A validation split takes one training image of each class, a test split another.
    needed = {"train": 4 - len(parts), "test": 1}
    for part, listed in files.items():
        for label, folder in enumerate(folders[part].values()):
            images = _image_files(folder)
            if len(images) < needed[part]:
                raise ValueError(
                    f"{folder} has {len(images)} images; expected at least {needed[part]} to cut "
                    "the splits. Add images, or remove the class."
                )
            listed += [(path, label) for path in images]
    return ImageFolder(root, classes, files)


def _image_files(folder: Path) -> list[Path]:
    """Return a class's files, sorted by name."""

    def counts(entry: os.DirEntry) -> bool:
        hidden = entry.name.startswith(".") or entry.name.lower() in NO_IMAGES
        try:
            return not hidden and entry.is_file()
        except OSError:  # a symbolic link to itself
            return False

    with os.scandir(folder) as entries:  # asks the disk once a folder, not once a file
        return [folder / name for name in sorted(entry.name for entry in entries if counts(entry))]


def decode(folder: ImageFolder, image_size: int | None) -> dict[str, np.ndarray]:
    """Read all images, resized to squares of `image_size` if that is given.

    Returns "images" N x H x W x 3, "labels" N (int64) and "tested" N, whether each lies in test/.
    Raises ValueError, naming the file, for one that can't be read, or for another size than most.
    """
    entries = [(part, *file) for part, files in folder.files.items() for file in files]

    def read(entry: tuple[str, Path, int]) -> np.ndarray:
        image = read_image(entry[1])
        return image if image_size is None else resize(image, image_size)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        images = list(pool.map(read, entries))
    (height, width), _ = Counter(image.shape[:2] for image in images).most_common(1)[0]
    for (_, path, _), image in zip(entries, images, strict=True):
        if image.shape[:2] != (height, width) or height != width:
            found = "x".join(str(n) for n in image.shape[1::-1])
            raise ValueError(
                f"{path} is {found}, most images are {width}x{height}; expected squares of one "
                "size. Set image_size to have all resized."
            )
    labels = np.array([label for *_, label in entries], dtype=np.int64)
    tested = np.array([part == "test" for part, *_ in entries])
    return {"images": np.stack(images), "labels": labels, "tested": tested}


def cached(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file; if it's missing or damaged, they are made and stored.

    The file appears whole or not at all, and has a checksum for each array. A full or read-only
    disk costs time, nothing else.
    """
    # numpy raises nearly anything when a file is damaged.
    with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as stored:
        return dict(stored)
    arrays = make()
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            np.savez(temporary, **arrays)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return arrays
