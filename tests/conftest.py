"""Fixtures that several test modules use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.golden import draw_folder
from helpers.config import PROFILES, Study
from helpers.data import Dataset, load_dataset
from helpers.recipes import Recipe
from helpers.runs import Result, Run


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A smoke study on shapes, on the CPU, in a folder of the test's own."""
    folder = tmp_path / "study"
    return Study(
        profile=PROFILES["smoke"],
        dataset="shapes",
        runs_dir=folder / "runs",
        data_dir=tmp_path / "data",
        analysis_dir=folder / "analysis",
        device=torch.device("cpu"),
        progress="none",
    )


@pytest.fixture
def drawn_folder(tmp_path: Path) -> Path:
    """A folder of two classes of images, with a space in its name."""
    return draw_folder(tmp_path / "two words", classes=2, images_a_class=12)


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of small PNG images of noise, each unlike all others; without test/ for 0."""

    def write(
        name: str = "pets",
        *,
        train: int = 10,
        test: int = 2,
        classes: tuple[str, ...] = ("cat", "dog"),
        size: int = 12,
    ) -> Path:
        generator = np.random.default_rng(0)
        for part, count in (("train", train), ("test", test)):
            for label in classes if count else ():
                (tmp_path / name / part / label).mkdir(parents=True)
                for number in range(count):
                    pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                    path = tmp_path / name / part / label / f"{number:02d}.png"
                    Image.fromarray(pixels).save(path)
        return tmp_path / name

    return write


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Dataset]:
    """load_dataset with a data folder of the test's own."""

    def call(name: Path | str, **options: object) -> Dataset:
        return load_dataset(str(name), **{"data_dir": tmp_path / "data"} | options)

    return call


SMALL = {"image_size": 16, "train_size": 80, "validation_size": 40, "test_size": 40}


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder that tests share, so that each drawing is made once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def small_shapes(shared_data: Path) -> Dataset:
    """Drawn images of 16 pixels: 80 to train, 40 to validate, 40 to test."""
    return load_dataset("shapes", data_dir=shared_data, **SMALL)


@pytest.fixture
def small_study(study: Study, shared_data: Path) -> Study:
    """The `study`, with the data folder that tests share."""
    return replace(study, data_dir=shared_data)


@pytest.fixture(scope="session")
def small_run(small_shapes: Dataset) -> Callable[..., Run]:
    """Make a Run of a SimpleCNN with dropout, 10 steps long; `data` is another Dataset."""

    def make(data: Dataset = small_shapes, **changes: object) -> Run:
        recipe = Recipe("test", "sgd", 0.05, "triangular", batch_size=16, epochs=2)
        settings = {"model": "simple_cnn", "recipe": recipe, "epochs": 2, "seed": 0, "width": 0.25}
        about = {"dataset": data.name, "fingerprint": data.fingerprint, "dropout": 0.2}
        return Run(**settings | about | SMALL | changes)

    return make


@pytest.fixture(scope="session")
def differing() -> Callable[[Result, Result], list[str]]:
    """Name what differs between two results of the same run; nothing but seconds may."""

    def compare(one: Result, other: Result) -> list[str]:
        names = ("model.safetensors", "predictions.npz")
        found = [
            n for n in names if (one.folder / n).read_bytes() != (other.folder / n).read_bytes()
        ]
        names = ("metrics", "best_epoch", "stopped_early", "classes")
        found += [name for name in names if getattr(one, name) != getattr(other, name)]
        histories = [result.history.drop(columns="seconds") for result in (one, other)]
        return found + ([] if histories[0].equals(histories[1]) else ["history"])

    return compare
