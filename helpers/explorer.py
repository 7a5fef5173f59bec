"""An interactive Grad-CAM explorer for notebooks: pick an image, class, layer, method, opacity.

Where widgets can't run (a headless run, a static page) the picture is shown once.
"""

from __future__ import annotations

import io
import tempfile
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from IPython.display import Image as StaticImage
from IPython.display import display
from PIL import Image
from torch import nn

from helpers import gradcam, plots
from helpers.config import Study
from helpers.data import Dataset
from helpers.folders import read_image, resize
from helpers.loader import normalise

SIDE = 256  # pixels of a displayed image


def picture(
    network: nn.Module, image: np.ndarray, dataset: Dataset, opacity: float = 0.5, **options: Any
) -> tuple[bytes, str]:
    """Explain one image, H x W x 3 uint8: a PNG of it and of its map, and a line that says what.

    It is resized as the training images were. `options` are those of `gradcam.cam`.
    """
    small = torch.from_numpy(resize(image, dataset.image_size)).permute(2, 0, 1)[None]
    device = next(network.parameters()).device
    batch = normalise(small, *dataset.channel_statistics).to(device)
    result = gradcam.cam(network, batch, **options)
    shown = plots.enlarge(image, SIDE)
    panels = np.hstack([shown, plots.overlay(shown, result.maps[0], opacity)])
    png = io.BytesIO()
    Image.fromarray(panels).save(png, "PNG")
    shares = 100 * result.logits[0].softmax(0)
    chosen = (int(shares.argmax()), int(result.targets[0]))
    named = [f"{dataset.classes[k]} ({shares[k]:.0f} %)" for k in chosen]
    empty = ": none, the map is zero everywhere" if bool(result.all_zero[0]) else ""
    return png.getvalue(), f"predicted {named[0]}; evidence for {named[1]}{empty}"


def explore(network: nn.Module, dataset: Dataset, study: Study) -> Any:
    """Return the explorer as a widget, or as a static picture where nobody is there to click."""
    test = dataset.test
    if study.progress != "bar":
        return StaticImage(picture(network, test.images[0].permute(1, 2, 0).numpy(), dataset)[0])
    classes = {"predicted": None} | {name: k for k, name in enumerate(dataset.classes)}
    maps = (nn.Conv2d, nn.Sequential)
    layers = [name for name, part in network.named_children() if isinstance(part, maps)]
    upload = widgets.FileUpload(accept="image/*", description="your image")

    def update(number: int, file: tuple, **options: Any) -> None:
        image, truth = test.images[number].permute(1, 2, 0).numpy(), test.labels[number]
        truth = f"true {dataset.classes[int(truth)]}"
        if file:
            with tempfile.NamedTemporaryFile() as copy:
                copy.write(file[0]["content"])
                copy.flush()
                try:
                    image, truth = read_image(copy.name), "your image"
                except ValueError as error:
                    print(error)
        png, text = picture(network, image, dataset, **options)
        print(f"{truth}; {text}")
        display(StaticImage(png))

    return widgets.interactive(
        update,
        number=widgets.IntSlider(0, 0, len(test) - 1, description="image"),
        file=upload,
        target=widgets.Dropdown(options=classes, description="class"),
        layers=widgets.Dropdown(
            options=layers, value=gradcam.default_layer(network), description="layer"
        ),
        method=widgets.Dropdown(options=list(gradcam.METHODS), description="method"),
        opacity=widgets.FloatSlider(0.5, min=0, max=1, step=0.05, description="opacity"),
    )
