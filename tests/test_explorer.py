"""The explorer widget of 05."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import explorer
from helpers.config import Study
from helpers.data import Dataset, load_dataset
from helpers.models import build_model


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset("shapes", image_size=16, train_size=20, validation_size=10, test_size=12)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model("resnet18", num_classes=10, width=0.125).eval()


@pytest.fixture
def view(network, dataset, study: Study):
    """The explorer as somebody sees it who can click; its controls by their description."""
    shown = explorer.explore(network, dataset, replace(study, progress="bar"))
    shown.update()
    return shown, {control.description: control for control in shown.children[:-1]}


def upload(name: str, content: bytes) -> tuple[dict]:
    """Return what the browser sends for an uploaded file."""
    now = datetime.now(timezone.utc)
    about = {"name": name, "type": "image/png", "size": len(content), "last_modified": now}
    return ({**about, "content": memoryview(content)},)


def test_headless_shows_a_static_picture(network, dataset, study: Study) -> None:
    shown = explorer.explore(network, dataset, study)
    assert Image.open(io.BytesIO(shown.data)).size == (2 * explorer.SIDE, explorer.SIDE)


def test_every_control_reaches_the_picture(view, monkeypatch) -> None:
    _, controls = view
    asked = []

    def picture(network, image, dataset, **options):
        asked.append({"image": image.sum(), **options})
        return b"", ""

    monkeypatch.setattr(explorer, "picture", picture)
    names = {"image": "image", "class": "target", "layer": "layers"}
    for name, value in {
        "image": 3,
        "class": 2,
        "layer": "layer2",
        "method": "layercam",
        "opacity": 0.9,
    }.items():
        controls[name].value = value
        assert asked[-1][names.get(name, name)] == value or name == "image", name
    assert asked[0]["image"] != 0


def test_own_file_is_explained_and_a_broken_one_named(view, capsys) -> None:
    _, controls = view
    file = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), 200, np.uint8)).save(file, "PNG")
    capsys.readouterr()
    controls["your image"].value = upload("mine.png", file.getvalue())
    assert "your image; predicted" in capsys.readouterr().out
    controls["your image"].value = upload("broken.png", b"no image")
    assert "can't be read as an image" in capsys.readouterr().out


def test_a_picture_says_what_it_explains(network, dataset) -> None:
    image = dataset.test.images[0].permute(1, 2, 0).numpy()
    png, text = explorer.picture(network, image, dataset, target=4)
    assert "evidence for star" in text and text.startswith("predicted ")
    assert png != explorer.picture(network, image, dataset, target=4, opacity=0.1)[0]
    with torch.no_grad():
        network.fc.weight.abs_()
        network.fc.weight[4].neg_()
    assert "zero everywhere" in explorer.picture(network, image, dataset, target=4)[1]
