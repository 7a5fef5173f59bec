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


@pytest.fixture
def network() -> torch.nn.Module:
    return build_model("resnet18", num_classes=10, width=0.125).eval()


def test_headless_shows_a_picture(network, dataset, study: Study) -> None:
    assert explorer.explore(network, dataset, study).size == (512, 256)


def test_every_control_reaches_the_picture(network, dataset, study: Study, monkeypatch) -> None:
    asked = []

    def picture(network, image, dataset, **options):
        asked.append({"image": image, **options})
        return Image.new("RGB", (2, 2)), ""

    monkeypatch.setattr(explorer, "picture", picture)
    view = explorer.explore(network, dataset, replace(study, progress="bar"))
    view.update()
    start = {"target": None, "layers": "layer4", "method": "grad-cam", "opacity": 0.5}
    assert start.items() <= asked[0].items()
    controls = {control.description: control for control in view.children[:-1]}
    for name, value in {"target": 2, "layers": "conv1", "method": "layercam", "opacity": 1}.items():
        controls[name].value = value
        assert asked[-1][name] == value
    controls["image"].value = 3
    assert np.array_equal(asked[-1]["image"], dataset.test.images[3].permute(1, 2, 0))
    mine, file = np.full((40, 60, 3), 200, np.uint8), io.BytesIO()
    Image.fromarray(mine).save(file, "PNG")
    about = {"name": "mine.png", "type": "image/png", "last_modified": datetime.now(timezone.utc)}
    controls["Upload"].value = ({**about, "size": 1, "content": memoryview(file.getvalue())},)
    assert np.array_equal(asked[-1]["image"], mine)


def test_a_picture_says_what_it_explains(network, dataset) -> None:
    image = dataset.test.images[0].permute(1, 2, 0).numpy()
    found, text = explorer.picture(network, image, dataset, target=4)
    assert "evidence for star" in text and text.startswith("predicted ")
    assert found != explorer.picture(network, image, dataset, target=4, opacity=0.1)[0]
    with torch.no_grad():
        network.fc.weight.abs_()
        network.fc.weight[4].neg_()
    assert "zero everywhere" in explorer.picture(network, image, dataset, target=4)[1]
