"""Bad input of every kind: an error of the documented type that names the culprit, and no more.

Hypothesis makes the inputs up, always the same ones. An error counts as ours if it was raised in
helpers/, not inside torch, pydantic or NumPy, and says in one line what was wrong.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import config, runs
from helpers.data import DATASETS, check_dataset, load_dataset, study_data
from helpers.folders import read_image
from helpers.loader import NO_AUGMENTATION
from helpers.models import MODELS
from helpers.recipes import RECIPES
from helpers.runs import IMAGENET, Pruning, Run, RunError, Transfer
from helpers.training import State, make_optimizer

HELPERS = config.ROOT / "helpers"


def tries(count: int) -> settings:
    """Settings of a property that is tried with `count` inputs, the same ones each time."""
    checks = list(HealthCheck)
    fixed = {"derandomize": True, "deadline": None, "database": None}
    return settings(max_examples=count, suppress_health_check=checks, **fixed)


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


NO_NUMBER = st.one_of(
    st.text(max_size=5) | st.binary(max_size=5) | st.booleans() | st.builds(object),
    st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(), st.integers(), max_size=1),
    st.complex_numbers() | st.just(float("nan")) | st.just(torch.zeros(9, 9)),
)
NO_WHOLE = NO_NUMBER | st.floats() | st.integers(max_value=0)
NO_TEXT = st.none() | st.integers() | st.floats() | st.binary() | st.lists(st.text(), max_size=2)
NO_BOOL = st.none() | st.integers() | st.floats() | st.text(max_size=5)


def outside(low: float, high: float) -> st.SearchStrategy:
    """Numbers outside low to high (both included there), infinities among them, and no numbers."""
    below = st.floats(max_value=low, exclude_max=True, allow_nan=False)
    above = st.floats(min_value=high, exclude_min=True, allow_nan=False)
    return NO_NUMBER | st.none() | below | above | st.just(10**400)


def none_of(*allowed: str) -> st.SearchStrategy:
    """Texts that aren't among `allowed`, and what is no text."""
    return st.text(max_size=10).filter(lambda text: text not in allowed) | NO_TEXT


SHARE = outside(0, float(np.nextafter(1, 0)))
RUN = Run("shapes", "0" * 16, "resnet20", RECIPES["fast"], epochs=2, seed=0, train_size=600)
GOOD = (RUN, RECIPES["fast"], NO_AUGMENTATION, Transfer(RUN), Pruning(RUN, "weights", 0.5))
BAD_VALUES = {
    "epochs batch_size": NO_WHOLE | st.none(),
    "train_size validation_size test_size patience reference_batch_size": NO_WHOLE,
    "residual nesterov flip trivial_augment frozen": NO_BOOL,
    "dropout label_smoothing sparsity colour_jitter momentum": SHARE,
    "dataset fingerprint": NO_TEXT | st.just(""),
    "seed": NO_NUMBER | st.none() | st.floats() | st.integers(max_value=-1),
    "image_size": NO_WHOLE | st.integers(max_value=7) | st.integers(min_value=4097),
    "crop_padding cutout": NO_NUMBER | st.none() | st.floats() | st.integers(max_value=-1),
    "width": outside(5e-324, 16),  # the smallest number above 0
    "learning_rate": outside(5e-324, sys.float_info.max),
    "weight_decay": outside(0, sys.float_info.max),
    "rate_factor": outside(5e-324, 1),
    "mixup": outside(0, 10),
    "name": NO_TEXT | st.just("") | st.text().map(lambda text: f"{text}/{text}"),
    "model": none_of(*MODELS),
    "stem": none_of("auto", "cifar", "imagenet"),
    "optimizer": none_of("sgd", "adam", "adamw"),
    "schedule": none_of("constant", "step", "triangular", "onecycle"),
    "kind": none_of("weights", "channels"),
    "source": none_of(IMAGENET) | st.just(Transfer(RUN)),
    "recipe": none_of() | st.just(asdict(RECIPES["fast"])) | st.just(NO_AUGMENTATION),
    "augmentation": NO_NUMBER | st.none() | st.just(RECIPES["fast"]),
    "start": NO_NUMBER | st.integers() | st.just(RUN),
}
BAD = {name: values for names, values in BAD_VALUES.items() for name in names.split()}


@tries(400)
@given(st.data())
def test_a_bad_setting_is_named_in_one_line(data: st.DataObject) -> None:
    good = data.draw(st.sampled_from(GOOD))
    name = data.draw(st.sampled_from(sorted(field.name for field in fields(good))))
    with pytest.raises(ValueError) as caught:
        replace(good, **{name: data.draw(BAD[name])})
    message = str(caught.value)
    assert type(caught.value) is ValueError and "\n" not in message
    assert message.startswith(f"{type(good).__name__}: ") and name in message
    for internal in ("type=", "https:", "ValidationError", "ArgsKwargs", "Input should"):
        assert internal not in message


@tries(60)
@given(st.text(max_size=20))
@example("CIFAR10")
@example("../nowhere")
@example("-rf")
@example("a/\0")
@example("")
def test_a_dataset_that_is_not_there_is_named(name: str) -> None:
    assume(name not in DATASETS and not os.path.isdir(os.path.expanduser(name.replace("\0", ""))))
    named = repr(name) if "\0" in name or not config.is_path(name) else Path(name).name
    for ask in (load_dataset, check_dataset):
        with refused(ValueError, FileNotFoundError, naming=named):
            ask(name)


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


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def state() -> State:
    model = torch.nn.Linear(2, 1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return State(model, make_optimizer(model, RECIPES["fast"]), scaler, torch.float32, [])


def test_a_changed_checkpoint_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "resume.pt"
    state().save(path)
    whole = path.read_bytes()
    state().load(path)

    @tries(150)
    @given(changed(whole))
    def look(content: bytes) -> None:
        path.write_bytes(content)
        with refused(ValueError, naming=str(path)):
            state().load(path)
        assert path.read_bytes() == content

    look()


def test_a_checkpoint_of_something_else_is_refused_and_not_executed(tmp_path: Path) -> None:
    evil, path = Evil(tmp_path / "executed"), tmp_path / "resume.pt"
    for content in (evil, {"model": evil}, {"model": {"weight": [evil]}}, {"model": {}}, {}):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        payload = buffer.getvalue()
        path.write_bytes(hashlib.sha256(payload).digest() + payload)  # with a checksum that fits
        with refused(ValueError, naming=str(path)):
            state().load(path)
        assert not evil.marker.exists()
    pickle.loads(pickle.dumps(evil))
    assert evil.marker.exists(), "the test's code would not have run at all"


@pytest.fixture
def result(study: config.Study) -> runs.Result:
    dataset = study_data(study, train_size=20, validation_size=10, test_size=10)
    recipe = replace(RECIPES["adam"], batch_size=10)
    run = runs.make_run(study, dataset, "simple_cnn", seed=0, epochs=1, recipe=recipe)
    return runs.load_or_train(run, study)


def test_a_changed_result_is_refused_and_stays(study: config.Study, result: runs.Result) -> None:
    names = ["predictions.npz", "model.safetensors", "history.csv", "result.json"]
    contents = {name: (result.folder / name).read_bytes() for name in names}

    @tries(150)
    @given(st.sampled_from(names), st.data())
    def look(name: str, data: st.DataObject) -> None:
        content = data.draw(changed(contents[name]))
        path = result.folder / name
        path.write_bytes(content)
        try:
            with refused(RunError, naming=str(result.folder)):
                runs.load_or_train(result.run, study)
                assume(name != "result.json")  # which may change without harm
            assert path.read_bytes() == content
        finally:
            path.write_bytes(contents[name])

    look()
    assert runs.load_or_train(result.run, study).metrics == result.metrics
    for name in names:
        (result.folder / name).unlink()
        with refused(
            FileNotFoundError if name == "result.json" else RunError, naming=str(result.folder)
        ):
            runs.load_result(result.run, result.study)
        (result.folder / name).write_bytes(contents[name])


def test_code_in_stored_arrays_is_not_executed(tmp_path: Path, result: runs.Result) -> None:
    marker, buffer = tmp_path / "executed", io.BytesIO()
    np.savez(buffer, test_logits=np.array([Evil(marker)], dtype=object))
    (result.folder / "predictions.npz").write_bytes(buffer.getvalue())
    summary = json.loads((result.folder / "result.json").read_bytes())
    summary["files"]["predictions.npz"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    (result.folder / "result.json").write_text(json.dumps(summary))
    with refused(RunError, naming=str(result.folder)):
        runs.load_result(result.run, result.study)
    assert not marker.exists()


PIXELS = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)


def encoded(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind)
    return file.getvalue()


KINDS = st.sampled_from(["png", "jpeg", "bmp", "tiff", "webp", "gif", "ppm"])


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some damage
@tries(250)
@given(KINDS.flatmap(lambda kind: changed(encoded(kind))) | st.binary(max_size=200))
def test_a_changed_image_is_an_image_or_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / 'it\'s "an" image.png'
    path.write_bytes(content)
    try:
        image = read_image(path)
    except ValueError:
        with refused(ValueError, naming=str(path)):
            read_image(path)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert path.read_bytes() == content


LETTERS = st.characters(exclude_characters="/\0", exclude_categories=("Cs",))
STRANGE_NAMES = ("-rf", "a b", "it's", '"quoted"', "$x$", "ünïcödé", "`id`", "%s", "~", "*", "\n")
NAMES = st.sampled_from(STRANGE_NAMES) | st.text(LETTERS, min_size=1, max_size=20).filter(
    lambda name: not name.startswith(".") and len(name.encode()) < 200
)
BROKEN = (b"", b"not an image", encoded("png")[:60], encoded("png")[:16], pickle.dumps({}))


@tries(40)
@given(
    st.lists(NAMES, min_size=2, max_size=4, unique=True),
    st.lists(NAMES, min_size=3, max_size=5, unique=True),
    st.none() | st.sampled_from(BROKEN),
)
def test_a_folder_with_strange_names_loads_or_names_the_broken_file(
    classes: list[str], files: list[str], broken: bytes | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "my images"
        for name in classes:
            (root / "train" / name).mkdir(parents=True)
            for number, file in enumerate(files):
                pixels = np.full((8, 8, 3), 20 * number, np.uint8)
                (root / "train" / name / file).write_bytes(cv2.imencode(".png", pixels)[1])
        if broken is not None:
            culprit = root / "train" / classes[-1] / files[-1]
            culprit.write_bytes(broken)
            with refused(ValueError, naming=str(culprit)):
                load_dataset(f"{root}/", image_size=8, data_dir=Path(folder) / "data")
            return
        dataset = load_dataset(f"{root}/", image_size=8, data_dir=Path(folder) / "data")
        assert dataset.classes == tuple(sorted(classes))
        count = len(dataset.train) + len(dataset.validation) + len(dataset.test)
        assert count == len(classes) * len(files)
