"""Bad input of every kind: an error of the documented type that names the culprit, and no more.

Hypothesis makes the inputs up, always the same ones. An error counts as ours if it was raised in
helpers/, not inside torch, OpenCV or NumPy, and names what was wrong.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import config, plots, training
from helpers.data import DATASETS, NO_AUGMENTATION, check_dataset, load_dataset, read_image
from helpers.gradcam import cam
from helpers.models import MODELS, build_model
from helpers.runs import Run, RunError, load_or_train, load_result, read_run, stored_runs
from helpers.starts import IMAGENET, Pruning, Transfer
from helpers.training import RECIPES, CheckpointError, load_checkpoint, save_checkpoint

HELPERS = config.ROOT / "helpers"

# How many inputs each group of tests tries.
SETTINGS, FILES, IMAGES, FOLDERS, QUESTIONS, FIGURES = 250, 200, 150, 40, 150, 8


def tries(count: int) -> settings:
    """Settings of a property that is tried with `count` inputs, the same ones each time."""
    ignored = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=ignored,
    )


@contextmanager
def refused(*types: type[Exception], naming: str = "") -> Iterator[None]:
    """Expect one of the errors, raised in helpers/ and with `naming` in its message."""
    try:
        yield
    except types as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        assert Path(place.filename).parent == HELPERS, f"raised in {place.filename}: {error!r}"
        assert naming in str(error), f"{naming!r} isn't named: {error}"
        return
    pytest.fail(f"accepted; expected {' or '.join(t.__name__ for t in types)}")


# --- Settings ----------------------------------------------------------------------------------

NO_NUMBER = st.one_of(
    st.text(max_size=5),
    st.binary(max_size=5),
    st.booleans(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.complex_numbers(),
    st.just(float("nan")),
    st.builds(object),
)
NO_WHOLE = NO_NUMBER | st.floats() | st.integers(max_value=0)
NO_TEXT = st.none() | st.integers() | st.floats() | st.binary() | st.lists(st.text(), max_size=2)
NO_BOOL = st.none() | st.integers() | st.floats() | st.text(max_size=5)


def outside(low: float, high: float) -> st.SearchStrategy:
    """Numbers outside low to high (both included there), infinities among them, and no numbers."""
    below = st.floats(max_value=low, exclude_max=True, allow_nan=False)
    above = st.floats(min_value=high, exclude_min=True, allow_nan=False)
    return NO_NUMBER | st.none() | below | above | st.just(10**400)


def none_of(allowed: tuple[str, ...]) -> st.SearchStrategy:
    """Texts that aren't among `allowed`, and what is no text."""
    return st.text(max_size=10).filter(lambda text: text not in allowed) | NO_TEXT


BELOW_ONE = float(np.nextafter(1, 0))
BAD_RUN = {
    "dataset": NO_TEXT | st.just(""),
    "fingerprint": NO_TEXT | st.just(""),
    "model": none_of(MODELS),
    "recipe": none_of(()) | st.none(),
    "epochs": NO_WHOLE | st.none(),
    "seed": NO_NUMBER | st.none() | st.floats() | st.integers(max_value=-1),
    "image_size": NO_WHOLE | st.integers(max_value=7) | st.integers(min_value=4097),
    "train_size": NO_WHOLE,
    "validation_size": NO_WHOLE,
    "test_size": NO_WHOLE,
    "width": outside(1e-300, 16),
    "stem": none_of(("auto", "cifar", "imagenet")),
    "residual": NO_BOOL,
    "dropout": outside(0, BELOW_ONE),
    "patience": NO_WHOLE,
    "start": NO_NUMBER | st.integers(),
}
BAD_RECIPE = {
    "name": NO_TEXT | st.just("") | st.text().map(lambda text: f"{text}/{text}"),
    "optimizer": none_of(training.OPTIMIZERS),
    "schedule": none_of(training.SCHEDULES),
    "learning_rate": outside(1e-300, sys.float_info.max),
    "batch_size": NO_WHOLE | st.none(),
    "epochs": NO_WHOLE | st.none(),
    "reference_batch_size": NO_WHOLE,
    "momentum": outside(0, BELOW_ONE),
    "nesterov": NO_BOOL,
    "weight_decay": outside(0, sys.float_info.max),
    "label_smoothing": outside(0, BELOW_ONE),
    "augmentation": NO_NUMBER | st.none() | st.integers(),
}
BAD_AUGMENTATION = {
    "flip": NO_BOOL,
    "trivial_augment": NO_BOOL,
    "crop_padding": NO_NUMBER | st.none() | st.floats() | st.integers(max_value=-1),
    "cutout": NO_NUMBER | st.none() | st.integers(min_value=33),
    "colour_jitter": outside(0, BELOW_ONE),
    "mixup": outside(0, 10),
}
BAD_START = {
    "rate_factor": outside(1e-300, 1),
    "frozen": NO_BOOL,
    "share": outside(0, BELOW_ONE),
    "kind": none_of(("weights", "channels")),
    "source": none_of((IMAGENET,)),
}
RUN = Run("shapes", "0" * 16, "resnet20", RECIPES["fast"], epochs=2, seed=0, train_size=600)
PARTS: dict[str, tuple[Any, dict[str, st.SearchStrategy]]] = {
    "run": (RUN, BAD_RUN),
    "recipe": (RECIPES["fast"], BAD_RECIPE),
    "augmentation": (NO_AUGMENTATION, BAD_AUGMENTATION),
}


@tries(SETTINGS)
@given(st.data())
def test_a_bad_setting_is_named(data: st.DataObject) -> None:
    good, bad = PARTS[data.draw(st.sampled_from(sorted(PARTS)))]
    name = data.draw(st.sampled_from(sorted(bad)))
    value = data.draw(bad[name])
    with refused(ValueError, naming=name):
        replace(good, **{name: value})


@tries(60)
@given(st.data())
def test_a_bad_start_is_named(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(BAD_START)))
    value = data.draw(BAD_START[name])
    good = Transfer(RUN) if name in ("rate_factor", "frozen") else Pruning(RUN, "weights", 0.5)
    with refused(ValueError, naming=name):
        replace(RUN, start=replace(good, **{name: value}))


@tries(60)
@given(st.data())
def test_a_bad_argument_of_load_dataset_is_named(data: st.DataObject) -> None:
    sizes = ("train_size", "validation_size", "test_size")
    bad = dict.fromkeys(sizes, NO_WHOLE) | {
        "image_size": BAD_RUN["image_size"],
        "dataset": NO_TEXT | st.just("") | st.just("a/\0"),
    }
    name = data.draw(st.sampled_from(sorted(bad)))
    value = data.draw(bad[name])
    with refused(ValueError, naming=name):
        load_dataset(value) if name == "dataset" else load_dataset("digits", **{name: value})


@tries(60)
@given(st.text(max_size=20))
@example("cifar")
@example("CIFAR10")
@example("shapes ")
@example("../nowhere")
@example("-rf")
def test_a_dataset_that_is_not_there_is_named(name: str) -> None:
    assume(name and name not in DATASETS and "\0" not in name)
    assume(not os.path.isdir(os.path.expanduser(name)))
    for ask in (load_dataset, check_dataset):
        with refused(ValueError, FileNotFoundError, naming=str(Path(name).name)):
            ask(name)


@tries(60)
@given(st.data())
def test_a_bad_argument_of_build_model_is_named(data: st.DataObject) -> None:
    bad = {
        "num_classes": NO_WHOLE | st.none() | st.just(1),
        "in_channels": NO_WHOLE | st.none(),
        "width": BAD_RUN["width"],
        "dropout": BAD_RUN["dropout"],
        "stem": none_of(("auto", "cifar", "imagenet")),
    }
    name = data.draw(st.sampled_from(sorted(bad)))
    with refused(ValueError, naming=name):
        build_model("resnet18", **{"num_classes": 10, name: data.draw(bad[name])})


# --- Files -------------------------------------------------------------------------------------


def changed(content: bytes) -> st.SearchStrategy:
    """The bytes of a file with one part cut off, flipped, or put in; never as they were."""
    places = st.integers(0, len(content) - 1)
    return st.one_of(
        places.map(lambda at: content[:at]),
        st.tuples(places, st.integers(1, 255)).map(
            lambda x: content[: x[0]] + bytes([content[x[0]] ^ x[1]]) + content[x[0] + 1 :]
        ),
        st.tuples(places, st.binary(min_size=1, max_size=8)).map(
            lambda x: content[: x[0]] + x[1] + content[x[0] :]
        ),
        st.binary(max_size=300),
    ).filter(lambda new: new != content)


STATE = {"identity": "a-run", "epoch": 1, "model": {"weight": torch.arange(6.0)}}


def checkpoint_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resume.pt"
        save_checkpoint(path, STATE)
        return path.read_bytes()


@tries(FILES)
@given(changed(checkpoint_bytes()))
def test_a_changed_checkpoint_is_refused_and_stays(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resume.pt"
        path.write_bytes(content)
        with refused(CheckpointError, naming=str(path)):
            load_checkpoint(path, "a-run")
        assert path.read_bytes() == content


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("inside", ["state", "identity", "deep"])
def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path, inside: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / "resume.pt"
    evil = Evil(marker)
    states = {"state": evil, "identity": {"identity": evil}, "deep": STATE | {"model": [evil]}}
    save_checkpoint(path, states[inside])  # with a checksum that fits
    with refused(CheckpointError, naming=str(path)):
        load_checkpoint(path, "a-run")
    assert not marker.exists()
    pickle.loads(pickle.dumps(evil))
    assert marker.exists(), "the test's code would not have run at all"


def test_code_in_stored_arrays_is_not_executed(tmp_path: Path, study: config.Study) -> None:
    marker = tmp_path / "executed"
    array = np.array([Evil(marker)], dtype=object)
    result = load_or_train(small_run(study), study)
    buffer = io.BytesIO()
    np.savez(buffer, test_logits=array)
    (result.folder / "predictions.npz").write_bytes(buffer.getvalue())
    with refused(RunError, naming="predictions.npz"):
        load_result(result.run, result.folder)
    assert not marker.exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@st.composite
def run_files(draw: st.DrawFn) -> bytes:
    """A run.json with one value replaced or removed, other JSON, or bytes that are no JSON."""
    kind = draw(st.sampled_from(["replaced", "removed", "added", "json", "bytes", "deep"]))
    if kind == "bytes":
        return draw(st.binary(max_size=100))
    if kind == "deep":
        return b"[" * 100_000
    if kind == "json":
        return json.dumps(draw(JSON)).encode()
    values = json.loads(json.dumps(asdict(RUN)))
    part = draw(st.sampled_from([values, values["recipe"], values["recipe"]["augmentation"]]))
    if kind == "added":
        part[draw(st.text(max_size=5).filter(lambda name: name not in part))] = draw(JSON)
    else:
        name = draw(st.sampled_from(sorted(part)))
        if kind == "removed":
            del part[name]
        else:
            part[name] = draw(JSON)
    return json.dumps(values).encode()


def test_most_changed_run_files_are_refused_the_others_are_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, counts = tmp_path / "run.json", {"refused": 0, "accepted": 0}

    @tries(FILES)
    @given(run_files())
    def look(content: bytes) -> None:
        path.write_bytes(content)
        try:
            run = read_run(path)
        except ValueError:
            with refused(ValueError, naming=str(path)):
                read_run(path)
            assert training.main([str(path)]) == 2
            assert str(path) in capsys.readouterr().err
            counts["refused"] += 1
            return
        counts["accepted"] += 1
        assert isinstance(run, Run) and isinstance(run.key, str)

    look()
    assert counts["refused"] > 4 * counts["accepted"], counts


def small_run(study: config.Study) -> Run:
    dataset = load_dataset(
        "shapes",
        image_size=16,
        train_size=20,
        validation_size=10,
        test_size=10,
        data_dir=study.data_dir,
    )
    return Run(
        "shapes",
        dataset.fingerprint,
        "simple_cnn",
        replace(RECIPES["adam"], batch_size=10),
        epochs=1,
        seed=0,
        image_size=16,
        train_size=20,
        validation_size=10,
        test_size=10,
        width=0.125,
    )


def test_a_changed_result_is_refused_and_stays(study: config.Study) -> None:
    result = load_or_train(small_run(study), study)
    names = ["result.json", "predictions.npz", "model.safetensors", "history.csv"]
    contents = {name: (result.folder / name).read_bytes() for name in names}

    @tries(FILES)
    @given(st.data())
    def look(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(names))
        content = data.draw(changed(contents[name]))
        if name == "result.json":  # white space and the like may change without harm
            with suppress(ValueError, RecursionError):
                assume(json.loads(content) != json.loads(contents[name]))
        path = result.folder / name
        path.write_bytes(content)
        try:
            with refused(RunError, naming=str(result.folder)):
                load_or_train(result.run, study)
            assert stored_runs(study.runs_dir)["state"][0].startswith("damaged")
            assert path.read_bytes() == content
        finally:
            path.write_bytes(contents[name])

    look()
    assert load_or_train(result.run, study).test_accuracy == result.test_accuracy


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"error": 3}'])
def test_a_damaged_mark_of_failure_is_told(content: bytes, study: config.Study) -> None:
    run = small_run(study)
    folder = study.runs_dir / run.key
    folder.mkdir(parents=True)
    (folder / "failed.json").write_bytes(content)
    with refused(RunError, naming=str(folder)):
        load_or_train(run, study)


# --- Images and folders ------------------------------------------------------------------------

SUFFIXES = (".png", ".jpg", ".bmp", ".tiff", ".webp", ".gif", ".ppm", ".hdr")
PIXELS = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)


def encoded(suffix: str) -> bytes:
    if suffix == ".gif":
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(PIXELS).save(file, "GIF")
        return file.getvalue()
    pixels = PIXELS.astype(np.float32) / 255 if suffix == ".hdr" else PIXELS
    return cv2.imencode(suffix, pixels)[1].tobytes()


def test_a_changed_image_is_an_image_or_named(tmp_path: Path) -> None:
    """An image's changed bytes may still be one. Whatever has no format is refused."""
    path = tmp_path / 'it\'s "an" image.png'

    @tries(IMAGES)
    @given(st.sampled_from(SUFFIXES).flatmap(lambda suffix: changed(encoded(suffix))))
    def look(content: bytes) -> None:
        path.write_bytes(content)
        try:
            image = read_image(path)
        except ValueError:
            with refused(ValueError, naming=str(path)):
                read_image(path)
        else:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert path.read_bytes() == content

    look()


def test_bytes_without_a_format_are_named(tmp_path: Path) -> None:
    path = tmp_path / "noise.jpg"

    @tries(IMAGES)
    @given(st.binary(max_size=200))
    def look(content: bytes) -> None:
        # The few bytes of PBM and its kin do make an image.
        assume(content[:1] not in (b"P", b"B"))
        path.write_bytes(content)
        with refused(ValueError, naming=str(path)):
            read_image(path)

    look()


NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=20
).filter(lambda name: not name.startswith(".") and len(name.encode()) < 200)
STRANGE_NAMES = ("-rf", "a b", "it's", '"quoted"', "$x$", "ünïcödé", "`id`", "%s", "~", "*", "\n")
PNG = cv2.imencode(".png", PIXELS[:8, :7])[1].tobytes()
BROKEN = {
    "empty": b"",
    "text": b"not an image",
    "cut off": PNG[: len(PNG) // 2],
    "header alone": PNG[:16],
    "pickle": pickle.dumps(STATE),
    "html": b"<html><script>alert(1)</script></html>",
}


def tree(root: Path) -> dict[Path, bytes]:
    """Every file under a folder with its bytes."""
    return {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@tries(FOLDERS)
@given(
    st.lists(NAMES | st.sampled_from(STRANGE_NAMES), min_size=2, max_size=4, unique=True),
    st.lists(NAMES | st.sampled_from(STRANGE_NAMES), min_size=3, max_size=5, unique=True),
    st.none() | st.sampled_from(sorted(BROKEN)),
)
def test_a_folder_with_strange_names_loads_or_names_the_broken_file(
    classes: list[str], files: list[str], broken: str | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "my images"
        for name in classes:
            (root / "train" / name).mkdir(parents=True)
            for number, file in enumerate(files):
                pixels = np.full((8, 8, 3), 20 * number, np.uint8)
                (root / "train" / name / file).write_bytes(cv2.imencode(".png", pixels)[1])
        if broken is not None:
            (root / "train" / classes[-1] / files[-1]).write_bytes(BROKEN[broken])
        before = tree(root)
        load = lambda: load_dataset(f"{root}/", image_size=8, data_dir=Path(folder) / "data")  # noqa: E731
        if broken is None:
            dataset = load()
            assert dataset.classes == tuple(sorted(classes))
            count = len(dataset.train) + len(dataset.validation) + len(dataset.test)
            assert count == len(classes) * len(files)
        else:
            with refused(ValueError, naming=str(root / "train" / classes[-1] / files[-1])):
                load()
        assert tree(root) == before


def write_classes(root: Path, names: list[str], images: int = 3, size: int = 8) -> Path:
    """Write a folder of one-coloured PNG images."""
    for label, name in enumerate(names):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for number in range(images):
            pixels = np.full((size, size, 3), (label + 40 * number) % 256, np.uint8)
            cv2.imwrite(str(folder / f"{number}.png"), pixels)
    return root


def loop(root: Path) -> None:
    (root / "train" / "loop").symlink_to(root / "train" / "loop")
    (root / "train" / "a" / "loop").symlink_to(root / "train")
    (root / "train" / "a" / "self.png").symlink_to(root / "train" / "a" / "self.png")


def dangling(root: Path) -> None:
    (root / "train" / "a" / "gone.png").symlink_to(root / "nowhere.png")


def pipe(root: Path) -> None:
    os.mkfifo(root / "train" / "a" / "pipe.png")


def device(root: Path) -> None:
    (root / "train" / "a" / "zero.png").symlink_to("/dev/zero")


@pytest.mark.skipif(os.name != "posix", reason="links and pipes as POSIX has them")
@pytest.mark.parametrize("disturb", [loop, dangling, pipe, device], ids=lambda f: f.__name__)
def test_loops_pipes_and_devices_neither_hang_nor_count(
    disturb: Callable[[Path], None], tmp_path: Path
) -> None:
    root = write_classes(tmp_path / "images", ["a", "b"])
    disturb(root)
    dataset = load_dataset(str(root), data_dir=tmp_path / "data")
    assert dataset.classes == ("a", "b")
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 6


@pytest.mark.skipif(os.name != "posix", reason="links as POSIX has them")
def test_a_linked_class_folder_counts(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "images", ["a", "b"])
    shutil.move(root / "train" / "b", tmp_path / "elsewhere")
    (root / "train" / "b").symlink_to(tmp_path / "elsewhere")
    assert load_dataset(str(root), data_dir=tmp_path / "data").classes == ("a", "b")


@pytest.mark.parametrize("side", [1, 5000])
def test_the_smallest_and_a_very_large_image(side: int, tmp_path: Path) -> None:
    root = write_classes(tmp_path / "images", ["a", "b"])
    path = root / "train" / "a" / "odd.png"
    cv2.imwrite(str(path), np.full((side, side, 3), 200, np.uint8))
    with refused(ValueError, naming=str(path)):
        load_dataset(str(root), data_dir=tmp_path / "data")
    dataset = load_dataset(str(root), image_size=16, data_dir=tmp_path / "data")
    parts = [dataset.train, dataset.validation, dataset.test]
    images = torch.cat([part.images for part in parts])
    assert images.shape == (7, 3, 16, 16)
    assert int((images == 200).flatten(1).all(1).sum()) == 1


def test_a_class_with_one_image_is_named(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "images", ["many", "single"])
    for number in (1, 2):
        (root / "train" / "single" / f"{number}.png").unlink()
    with refused(ValueError, naming="'single'"):
        load_dataset(str(root), data_dir=tmp_path / "data")


def test_a_thousand_classes(tmp_path: Path) -> None:
    names = [f"class {number:04d}" for number in range(1000)]
    root = write_classes(tmp_path / "images", names)
    dataset = load_dataset(str(root), data_dir=tmp_path / "data")
    assert dataset.classes == tuple(names)
    assert len(dataset.train.labels.unique()) == 1000
    model = build_model("resnet20", num_classes=1000, image_size=8, width=0.25)
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 1000)


def test_names_that_differ_only_by_case(tmp_path: Path) -> None:
    root = tmp_path / "images"
    try:
        write_classes(root, ["Cat", "cat", "CAT"])
    except FileExistsError:
        pytest.skip("this file system doesn't tell upper from lower case")
    assert load_dataset(str(root), data_dir=tmp_path / "data").classes == ("CAT", "Cat", "cat")


@tries(FIGURES)
@given(st.lists(NAMES | st.sampled_from(STRANGE_NAMES), min_size=2, max_size=4, unique=True))
@example(["$x$", "$\\frac$", "a$b", "$$"])
def test_any_class_name_can_be_drawn(classes: list[str]) -> None:
    counts = np.eye(len(classes), dtype=int)
    errors = pd.DataFrame({"ResNet-18": np.linspace(0, 1, len(classes))}, index=classes)
    image = np.zeros((8, 8, 3), np.uint8)
    figures = [
        plots.confusion_matrices({"ResNet-18": counts}, classes),
        plots.class_errors(errors),
        plots.class_balance(pd.DataFrame({"train": range(len(classes))}, index=classes)),
        plots.image_grid([image] * len(classes), classes, columns=1, row_labels=classes),
    ]
    try:
        for figure in figures:
            figure.savefig(io.BytesIO(), dpi=20)
    finally:
        plt.close("all")


# --- Questions to a network --------------------------------------------------------------------

CLASSES, COUNT = 5, 3


def network() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model("resnet20", num_classes=CLASSES, image_size=16, width=0.25)


NETWORK, INPUT = network(), torch.rand(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BAD_CLASS = st.integers(max_value=-1) | st.integers(min_value=CLASSES)
CLASS = st.integers(0, CLASSES - 1)
BAD_TARGET = st.one_of(
    BAD_CLASS,
    st.lists(CLASS, max_size=7).filter(lambda target: len(target) != COUNT),
    st.lists(CLASS | BAD_CLASS, min_size=COUNT, max_size=COUNT).filter(
        lambda target: not all(0 <= k < CLASSES for k in target)
    ),
    st.lists(st.none() | st.text() | st.floats() | st.booleans(), min_size=COUNT, max_size=COUNT),
    st.lists(st.lists(CLASS, max_size=2), min_size=COUNT, max_size=COUNT),
    st.text().filter(lambda text: text != "all"),
    st.floats() | st.booleans() | st.binary() | st.complex_numbers(),
    st.dictionaries(CLASS, CLASS) | st.sets(CLASS) | st.builds(object),
    st.just(torch.zeros(COUNT)) | st.just(torch.zeros(COUNT, 1, dtype=torch.int64)),
    st.just(lambda rows: rows) | st.just(lambda rows: None) | st.just(lambda rows: rows.sum()),
)
NAMES_OF_LAYERS = {name for name, _ in NETWORK.named_modules()}
BAD_LAYER = st.one_of(
    st.text().filter(lambda text: text not in NAMES_OF_LAYERS),
    st.sampled_from(["fc", "avgpool", "", "layer4", "layer1.0.conv1.weight", "forward", "layer1."]),
    st.lists(st.text().filter(lambda text: text not in NAMES_OF_LAYERS), max_size=3),
    st.integers() | st.floats() | st.binary() | st.builds(object),
    st.lists(st.none() | st.integers(), min_size=1, max_size=3),
    st.dictionaries(st.text(), st.text()),
    st.builds(torch.nn.ReLU),
)
BAD_IMAGES = st.one_of(
    st.lists(st.integers(0, 5), max_size=5)
    .map(lambda shape: torch.zeros(shape))
    .filter(lambda x: x.shape[-3:-2] != (3,) or x.numel() == 0 or x.ndim not in (3, 4)),
    st.just(INPUT.double().mul(255).to(torch.uint8)),
    st.just(INPUT.numpy()) | st.none() | st.text() | st.lists(st.floats(), max_size=2),
    st.just(torch.full((1, 3, 16, 16), float("nan"))),
    st.just(torch.full((1, 3, 16, 16), float("inf"))),
    st.just(torch.zeros(1, 1, 16, 16)),
    st.just(torch.zeros(1, 4, 16, 16)),
)


def state_of(model: torch.nn.Module) -> list[Any]:
    """What a question must leave as it was."""
    modules = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return [modules, [(t.requires_grad, t.grad, float(t.double().sum())) for t in tensors]]


@tries(QUESTIONS)
@given(st.data())
def test_a_bad_question_is_refused_and_leaves_no_trace(data: st.DataObject) -> None:
    before = state_of(NETWORK)
    what = data.draw(st.sampled_from(["target", "layers", "images", "method", "size"]))
    bad = {
        "target": BAD_TARGET,
        "layers": BAD_LAYER,
        "images": BAD_IMAGES,
        "method": none_of(("grad-cam", "hirescam")),
        "size": none_of(("input", "layer")),
    }
    arguments = {"images": INPUT, "layers": "layer3", what: data.draw(bad[what])}
    if what == "layers" and arguments["layers"] == "layer4":
        assume("layer4" not in NAMES_OF_LAYERS)
    with refused(ValueError, TypeError):
        cam(NETWORK, **arguments)
    assert state_of(NETWORK) == before
