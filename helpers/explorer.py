"""An interactive Grad-CAM explorer for notebooks; a picture where widgets can't run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from IPython.display import display
from PIL import Image
from torch import nn

from helpers import gradcam, plots
from helpers.config import Study
from helpers.data import Dataset
from helpers.folders import read_image, resize
from helpers.loader import normalise


def picture(
    network: nn.Module, image: np.ndarray, dataset: Dataset, opacity: float = 0.5, **options: Any
) -> tuple[Image.Image, str]:
    """An image, H x W x 3 uint8, beside its map by `gradcam.cam(..., **options)`, and a caption."""
    small = torch.from_numpy(resize(image, dataset.image_size)).permute(2, 0, 1)[None]
    batch = normalise(small, *dataset.channel_statistics).to(next(network.parameters()).device)
    result = gradcam.cam(network, batch, **options)
    shown = plots.enlarge(image, 256)
    panels = np.hstack([shown, plots.overlay(shown, result.maps[0], opacity)])
    shares = 100 * result.logits[0].softmax(0)
    chosen = (int(shares.argmax()), int(result.targets[0]))
    predicted, explained = (f"{dataset.classes[k]} ({shares[k]:.0f} %)" for k in chosen)
    empty = ": none, the map is zero everywhere" if result.all_zero[0] else ""
    return Image.fromarray(panels), f"predicted {predicted}; evidence for {explained}{empty}"


def explore(network: nn.Module, dataset: Dataset, study: Study) -> widgets.Widget | Image.Image:
    """Pick an image or upload one, a class, layer, method and opacity (headless: one picture)."""
    images = dataset.test.images.permute(0, 2, 3, 1).numpy()
    parts = network.named_children()
    layers = [name for name, part in parts if isinstance(part, (nn.Conv2d, nn.Sequential))]
    if study.progress != "bar":
        return picture(network, images[0], dataset, layers=layers[-1])[0]

    def show(image: int, file: tuple, **options: Any) -> None:
        pixels, truth = images[image], f"true {dataset.classes[int(dataset.test.labels[image])]}"
        if file:
            with tempfile.TemporaryDirectory() as folder:
                (copy := Path(folder, "your image")).write_bytes(file[0]["content"])
                pixels, truth = read_image(copy), "your image"
        found, caption = picture(network, pixels, dataset, **options)
        print(f"{truth}; {caption}")
        display(found)

    return widgets.interactive(
        show,
        image=widgets.IntSlider(max=len(images) - 1),
        target={"predicted": None} | {name: k for k, name in enumerate(dataset.classes)},
        layers=layers[::-1],  # the last stage first
        method=list(gradcam.METHODS),
        opacity=(0.0, 1.0, 0.05),
        file=widgets.FileUpload(accept="image/*"),
    )
