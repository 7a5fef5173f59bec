"""The explorer widget and the drawing of figures."""

from __future__ import annotations

import io
import sys
import types
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from helpers import config, explorer, gradcam, plots, runs
from helpers.data import Dataset, load_dataset
from helpers.evaluation import Interval
from helpers.models import build_model

matplotlib.use("agg")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset("shapes", image_size=16, train_size=20, validation_size=10, test_size=12)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model("resnet18", num_classes=10, width=0.125).eval()


@pytest.fixture
def study(tmp_path: Path) -> config.Study:
    return replace(config.study(), analysis_dir=tmp_path)


def controls(view) -> dict:
    found = {}

    def walk(widget) -> None:
        if getattr(widget, "description", ""):
            found[widget.description] = widget
        for child in getattr(widget, "children", ()):
            walk(child)

    walk(view)
    found["picture"], found["caption"] = view.children[1:]
    return found


def upload(name: str, content: bytes) -> tuple[dict]:
    """Return what the browser sends for an uploaded file."""
    now = datetime.now(timezone.utc)
    about = {"name": name, "type": "image/png", "size": len(content), "last_modified": now}
    return ({**about, "content": memoryview(content)},)


def test_headless_shows_a_static_picture(network, dataset, study) -> None:
    view = explorer.explore(network, dataset, replace(study, progress="none"))
    assert Image.open(io.BytesIO(view.data)).size[1] == explorer.SIDE


def test_every_control_changes_what_is_shown(network, dataset, study) -> None:
    c = controls(explorer.explore(network, dataset, replace(study, progress="bar")))
    assert c["class"].label == "predicted"
    for name, value in {
        "image": 3,
        "class": 2,
        "layer": "layer2",
        "method": "layercam",
        "opacity": 0.9,
    }.items():
        before = c["picture"].value
        c[name].value = value
        assert c["picture"].value != before, name
    assert "evidence for triangle" in c["caption"].value and "layer2" in c["caption"].value


def test_own_file_is_explained_and_a_broken_one_named(network, dataset, study) -> None:
    c = controls(explorer.explore(network, dataset, replace(study, progress="bar")))
    first = c["picture"].value
    file = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(file, "PNG")
    c["your image"].value = upload("mine.png", file.getvalue())
    assert c["caption"].value.startswith("your image") and c["picture"].value != first
    c["your image"].value = upload("broken.png", b"no image")
    assert "broken.png" in c["caption"].value
    c["test images"].click()
    assert c["picture"].value == first


def test_picture_names_the_explained_class_and_an_empty_map(network, dataset, monkeypatch) -> None:
    image = plots.to_rgb(dataset.test.images[0])
    _, text = explorer.picture(network, image, dataset, target=4)
    assert "evidence for star" in text
    empty = gradcam.CamResult(
        torch.zeros(1, 16, 16), torch.zeros(1, 10), torch.tensor([4]), torch.tensor([True])
    )
    monkeypatch.setattr(gradcam, "cam", lambda *_, **__: empty)
    assert "zero everywhere" in explorer.picture(network, image, dataset, target=4)[1]


def test_large_figures_are_shrunk_until_they_fit(study) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8)
    figure = plots.image_grid([noise] * 4, [""] * 4, columns=2, size=4)
    path = plots.save_figure(figure, study, "noise")
    assert path == study.figures_dir / "noise.png"
    assert path.stat().st_size <= plots.LARGEST_FIGURE


def test_intervals_figure_shows_each_value(study) -> None:
    values = {"one": Interval(0.5, 0.4, 0.6, 3), "two": Interval(0.25, 0.2, 0.3, 3)}
    figure = plots.intervals(values, title="title", label="label", reference="one")
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.texts] == ["50.0", "25.0"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["one", "two"]


def test_tensorboard_gets_every_epoch_or_says_what_is_missing(tmp_path, monkeypatch) -> None:
    study = replace(config.study(), runs_dir=tmp_path / "runs", tensorboard=True)
    small = runs.study_data(study)
    run = runs.make_run(study, small, "simple_cnn", seed=0)
    written = []

    class Writer:
        def __init__(self, folder: Path) -> None:
            assert folder.parent.name == run.key

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step, value))

        def flush(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        runs.load_or_train(run, study)
    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    result = runs.load_or_train(run, study)
    losses = [value for name, _, value in written if name == "validation_loss"]
    assert losses == result.history["validation_loss"].tolist()
    assert {step for _, step, _ in written} == set(result.history["epoch"])
