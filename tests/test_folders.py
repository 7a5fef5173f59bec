"""Image files of every kind read as RGB, damaged ones named; folders and what counts in them."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.folders import decode, list_folder, read_image, resize


def picture(height: int = 20, width: int = 30) -> np.ndarray:
    """A smooth colour picture, which lossy formats keep nearly."""
    rows, columns = np.mgrid[0 : 1 : complex(0, height), 0 : 1 : complex(0, width)]
    channels = [rows, columns, (1 - rows) * (1 - columns)]
    return (40 + 170 * np.stack(channels, axis=2)).astype(np.uint8)


def on_white(image: np.ndarray) -> np.ndarray:
    share = ALPHA[..., None] / 255
    return share * image + (1 - share) * 255


def rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


COLOUR = picture()
GRAY = COLOUR[..., 1]
ALPHA = np.repeat(np.array([0] * 5 + [51] * 5 + [255] * 10, np.uint8)[:, None], 30, axis=1)
DEEP = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
KINDS = {
    "colour": (Image.fromarray(COLOUR), COLOUR),
    "gray": (Image.fromarray(GRAY), rgb(GRAY)),
    "bits": (Image.fromarray(GRAY > 120), rgb(np.where(GRAY > 120, 255, 0))),
    "deep": (Image.fromarray(DEEP), rgb(DEEP / 257)),
    "cmyk": (Image.fromarray(COLOUR).convert("CMYK"), COLOUR),
    "light": (Image.fromarray(np.dstack([COLOUR, ALPHA])), on_white(COLOUR)),
    "pale": (Image.fromarray(np.dstack([GRAY, ALPHA])), on_white(rgb(GRAY))),
}
FILES = """colour.png colour.bmp colour.tif colour.ppm colour.webp colour.jpg colour.JPEG gray.png
gray.gif gray.jpg bits.png deep.png deep.tiff cmyk.jpg cmyk.tiff light.png light.webp pale.png"""


@pytest.mark.parametrize("name", FILES.split())
def test_every_format_is_read_as_rgb(tmp_path: Path, name: str) -> None:
    kind, suffix = name.lower().split(".")
    image, expected = KINDS[kind]
    path = tmp_path / f"ä {name}"
    lossless = {"lossless": True} if suffix == "webp" else {}
    image.save(path, **{"quality": 95, "subsampling": 0} if "jp" in suffix else lossless)
    found = read_image(str(path))
    assert found.shape == (20, 30, 3) and found.dtype == np.uint8
    tolerance = 8 if "jp" in suffix else 1 if kind in ("light", "pale") else 0.51
    assert np.abs(found - expected.astype(float)).max() <= tolerance


def test_floating_point_values_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 30), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match=r"float.tiff can't be read .*floating-point values"):
        read_image(tmp_path / "float.tiff")


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palettes_with_and_without_transparency(tmp_path: Path, suffix: str) -> None:
    indices = (np.arange(600).reshape(20, 30) // 100).astype(np.uint8)
    colours = np.random.default_rng(0).integers(0, 256, (6, 3), dtype=np.uint8)
    image = Image.new("P", (30, 20))
    image.putdata(indices.ravel().tolist())
    image.putpalette(colours.ravel().tolist())
    path = tmp_path / f"palette.{suffix}"
    image.save(path)
    np.testing.assert_array_equal(read_image(path), colours[indices])
    image.save(path, transparency=2)
    colours[2] = 255
    np.testing.assert_array_equal(read_image(path), colours[indices])


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_the_first_frame_of_an_animation_counts(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(read_image(path), np.asarray(frames[0]))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    # What a camera held so stores, by the EXIF standard's table of row 0 and column 0.
    image = COLOUR if orientation <= 4 else COLOUR.transpose(1, 0, 2)
    rows = -1 if orientation in (3, 4, 6, 7) else 1
    columns = -1 if orientation in (2, 3, 7, 8) else 1
    stored = Image.fromarray(np.ascontiguousarray(image[::rows, ::columns]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix, tolerance in (("jpg", 20), ("png", 0)):
        stored.save(tmp_path / f"turned.{suffix}", exif=exif, quality=95)
        found = read_image(tmp_path / f"turned.{suffix}").astype(int)
        assert np.abs(found - COLOUR).max() <= tolerance


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["jpeg", "png", "gif", "bmp", "tiff", "ppm", "webp"])
def test_a_truncated_image_is_named(tmp_path: Path, suffix: str) -> None:
    path, buffer = tmp_path / f"cut.{suffix}", io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format=suffix)
    for kept in (0.0, 0.02, 0.3, 0.6, 0.9):
        path.write_bytes(buffer.getvalue()[: int(kept * len(buffer.getvalue()))])
        with pytest.raises(ValueError, match=f"{path} can't be read .* Replace the file, or rem"):
            read_image(path)


def test_missing_and_huge_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path} is not a file"):
            read_image(path)
    Image.fromarray(COLOUR).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    with pytest.raises(ValueError, match=r"huge.png.*exceeds limit"):
        read_image(tmp_path / "huge.png")


def test_shrinking_averages_and_enlarging_interpolates() -> None:
    stripes = np.zeros((30, 60, 3), np.uint8)
    stripes[:, :30:3] = 240  # which sampling without averaging would lose
    stripes[:, 30:] = 255
    expected = np.where(np.arange(10)[None, :, None] < 5, 80, 255) + np.zeros((10, 10, 3))
    np.testing.assert_array_equal(resize(stripes, 10), expected)
    np.testing.assert_array_equal(resize(stripes[:, :30], 10), np.full((10, 10, 3), 80))
    assert len(np.unique(resize(np.eye(2, dtype=np.uint8)[..., None].repeat(3, 2) * 200, 16))) > 20


def keep(path: Path, count: int) -> None:
    for file in sorted(path.iterdir())[count:]:
        file.unlink()


def resized(path: Path) -> None:
    Image.fromarray(picture(9, 13)).save(path)


BAD_FOLDERS = {
    "missing": (lambda f: shutil.rmtree(f), "pets has no folder train; expected train/<class>/*"),
    "one class": (lambda f: [shutil.rmtree(d) for d in f.glob("*/dog")], "holds 1 class folders"),
    "test lacks": (lambda f: shutil.rmtree(f / "test/dog"), "dog has 0 images; .* all of test/"),
    "test has more": (lambda f: (f / "test/cow").mkdir(), "train/cow has 0 images; .* at least 2"),
    "too few": (lambda f: keep(f / "train/dog", 1), "train/dog has 1 images; .* Add images"),
    "no test images": (lambda f: keep(f / "test/dog", 0), "test/dog has 0 images; .* at least 1"),
    "no test": (lambda f: (shutil.rmtree(f / "test"), keep(f / "train/dog", 2)), "at least 3 to"),
    "size": (lambda f: resized(f / "train/dog/03.png"), "dog/03.png is 13x9, most .* are 12x12"),
    "text": (lambda f: (f / "test/cat/notes.txt").write_text("no"), "notes.txt can't be read"),
    "no class": (lambda f: resized(f / "train/a.png"), "train/a.png would be left out; .* Move it"),
    "val": (lambda f: shutil.copytree(f / "test", f / "val"), "pets/val would be left out"),
    "nested": (lambda f: (f / "test/cat/more").mkdir(), "test/cat/more would be left out"),
    "pipe": (lambda f: os.mkfifo(f / "train/cat/pipe.png"), "cat/pipe.png would be left out"),
    "loop": (lambda f: (f / "train/cow").symlink_to("cow"), "train/cow would be left out"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_bad_folder_is_explained(
    image_folder: Callable[..., Path], damage: Callable[[Path], object], message: str
) -> None:
    folder = image_folder()
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{folder.parent}.*{message}"):
        decode(list_folder(str(folder)), None)


def test_every_file_comes_with_its_label(image_folder: Callable[..., Path]) -> None:
    folder = image_folder(train=3, test=1, classes=("a'b\"c;$(x)", "-rf", "写真"))
    extra = folder / "test" / "-rf" / "-- strange ñame 画.gif"  # formats may be mixed
    Image.fromarray(picture(12, 12)[..., 0]).save(extra)
    listed = list_folder(f"{folder}/")
    assert listed.classes == ("-rf", "a'b\"c;$(x)", "写真") and listed.root == folder
    images = decode(listed, None)
    files = [path for part in ("train", "test") for path in sorted(folder.glob(f"{part}/*/*"))]
    for path, image, file in zip(files, images, listed.files, strict=True):
        np.testing.assert_array_equal(image, read_image(path))
        label = listed.classes.index(path.parent.name)
        assert file == (path, label, path.parent.parent.name == "test")
    resized(files[0])  # sizes may be mixed where all are resized
    assert decode(listed, 16).shape == (13, 16, 16, 3)


def test_what_is_hidden_does_not_count(image_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = image_folder()
    before = list_folder(str(folder))
    train, cat = folder / "train", folder / "train" / "cat"
    for path in (cat / ".DS_Store", cat / "Thumbs.db", folder / "notes.txt"):
        path.write_text("x")
    (train / ".ipynb_checkpoints").mkdir()
    assert list_folder(str(folder)) == before
    # A class that lies elsewhere counts, and so does a name that isn't UTF-8.
    shutil.move(train / "dog", tmp_path / "elsewhere")
    (train / "dog").symlink_to(tmp_path / "elsewhere")
    shutil.copy(cat / "00.png", os.fsencode(cat) + b"/\xff\xfe.png")
    after = list_folder(str(folder))
    assert len(after.files) == len(before.files) + 1 and after.state != before.state


@pytest.mark.parametrize("change", ["times", "size", "pixels", "train/cat/x", "test/cat/x"])
def test_the_state_changes_with_every_file(image_folder: Callable[..., Path], change: str) -> None:
    folder = image_folder()
    before = list_folder(str(folder))
    assert list_folder(f"{folder}/../pets") == before
    path = folder / "train" / "cat" / "04.png"
    stat = path.stat()
    if "/" in change:
        path.rename(folder / change)
    else:  # what is as large and as old was changed all the same
        path.write_bytes(path.read_bytes()[:-1] + b"x" + b"x" * (change == "size"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000 * (change == "times")))
    assert list_folder(str(folder)).state != before.state
