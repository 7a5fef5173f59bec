"""Folders of images: what lies in them, and reading any image file as RGB.

A folder is laid out as train/<class>/* and optionally test/<class>/*.
"""

from __future__ import annotations

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

NO_IMAGES = ("thumbs.db", "desktop.ini")  # what Windows leaves among pictures


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize H x W x 3 to size x size: area averaging down, cubic interpolation up."""
    method = cv2.INTER_AREA if max(image.shape[:2]) > size else cv2.INTER_CUBIC
    return cv2.resize(image, (size, size), interpolation=method)


def read_image(path: Path | str) -> np.ndarray:
    """Read an image file as H x W x 3 uint8 RGB: whatever Pillow reads, upright.

    16-bit images are scaled to 8 bits, transparent ones laid on white; of an animation the first
    frame counts. Raises FileNotFoundError for no file, ValueError if it is damaged or holds
    floating-point values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file; expected an image")
    try:
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("it has floating-point values, of which no range is known")
            if image.mode.startswith("I"):
                gray = np.clip(np.asarray(image, dtype=np.float64) / 257, 0, 255).round()
                image = Image.fromarray(gray.astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise nearly anything when a file is damaged
        raise ValueError(
            f"{path} can't be read as an image ({error}). Replace the file, or remove it."
        ) from error


@dataclass(frozen=True)
class ImageFolder:
    """A folder's classes, and its files: each with its label and whether it lies in test/."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[tuple[Path, int, bool], ...]
    state: str  # changes with the path, the size or a time of any file


def list_folder(name: str) -> ImageFolder:
    """List a folder of images, but for hidden files and those that Windows leaves among pictures.

    `name` is its path; ~ may stand for one's own folder. Raises FileNotFoundError or ValueError if
    it isn't laid out as expected.
    """
    root = Path(os.path.expanduser(name)).resolve()
    if not (root / "train").is_dir():
        raise FileNotFoundError(
            f"{root} has no folder train; expected train/<class>/* and optionally test/<class>/*"
        )
    _listed(root, lambda path: path.name in ("train", "test") or not path.is_dir())
    parts = [part for part in ("train", "test") if (root / part).is_dir()]
    folders = [folder for part in parts for folder in _listed(root / part, Path.is_dir)]
    classes = tuple(sorted({folder.name for folder in folders}))
    if len(classes) < 2:
        raise ValueError(f"{root}/train holds {len(classes)} class folders; expected at least 2")
    files: list[tuple[Path, int, bool]] = []
    for part in parts:
        # A validation split takes one training image of each class, a test split another.
        needed = 1 if part == "test" else 4 - len(parts)
        for label, name in enumerate(classes):
            images = _listed(root / part / name, Path.is_file)
            if len(images) < needed:
                raise ValueError(
                    f"{root / part / name} has {len(images)} images; expected at least {needed} to "
                    "cut the splits. Add images, or remove the class, or all of test/."
                )
            files += [(path, label, part == "test") for path in images]
    stats = [path.stat() for path, *_ in files]
    state = repr((files, [(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats])).encode()
    return ImageFolder(root, classes, tuple(files), hashlib.sha256(state).hexdigest()[:16])


def _listed(folder: Path, expected: Callable[[Path], bool]) -> list[Path]:
    """Return what lies in a folder and counts, by name; raise ValueError for the unexpected."""
    there = sorted(folder.iterdir()) if folder.exists() else []
    found = [p for p in there if p.name[0] != "." and p.name.lower() not in NO_IMAGES]
    for path in found:
        if not expected(path):
            raise ValueError(
                f"{path} would be left out; expected images as train/<class>/* and test/<class>/* "
                "alone. Move it to such a place, or remove it."
            )
    return found


def decode(folder: ImageFolder, image_size: int | None) -> np.ndarray:
    """Read all images, N x H x W x 3, resized to squares of `image_size` if that is given."""

    def read(file: tuple[Path, int, bool]) -> np.ndarray:
        image = read_image(file[0])
        return image if image_size is None else resize(image, image_size)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        images = list(pool.map(read, folder.files))
    (height, width), _ = Counter(image.shape[:2] for image in images).most_common(1)[0]
    for (path, *_), image in zip(folder.files, images, strict=True):
        if image.shape[:2] != (height, width) or height != width:
            raise ValueError(
                f"{path} is {image.shape[1]}x{image.shape[0]}, most images are {width}x{height}; "
                "expected squares of one size. Set image_size to have all resized."
            )
    return np.stack(images)
