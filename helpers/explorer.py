"""An interactive Grad-CAM explorer for notebooks: pick an image, class, layer, method, opacity.

Works in JupyterLab and Colab. Where widgets can't run (a headless run, a static page) the same
picture is shown once, for the first image.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn

from helpers import gradcam
from helpers.config import Study
from helpers.data import Dataset, normalise, read_image

SIDE = 256  # pixels of the displayed image


def picture(
    network: nn.Module,
    image: np.ndarray,
    dataset: Dataset,
    *,
    target: int | None = None,
    layer: str | None = None,
    method: str = "grad-cam",
    opacity: float = 0.5,
) -> tuple[bytes, str]:
    """Explain one image: return a PNG (image, map, overlay, contour) and a line that says what.

    `image` is H x W x 3 uint8 of any size; it is resized as the training images were. `target` is
    a class index, None for the predicted class.
    """
    size = dataset.image_size
    small = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    tensor = torch.from_numpy(small).permute(2, 0, 1)[None]
    batch = normalise(tensor, *dataset.channel_statistics)
    device = next(network.parameters()).device
    layers = layer or gradcam.default_layer(network)
    result = gradcam.cam(network, batch.to(device), target, layers, method)
    shown = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    panels = gradcam.side_by_side(shown, result.maps[0], opacity, SIDE)
    png = io.BytesIO()
    Image.fromarray(panels).save(png, "PNG")
    probabilities = result.logits[0].softmax(0)
    explained = int(result.targets[0])
    predicted = int(probabilities.argmax())
    text = (
        f"predicted {dataset.classes[predicted]} ({100 * probabilities[predicted]:.0f} %); "
        f"evidence for {dataset.classes[explained]} ({100 * probabilities[explained]:.0f} %) at "
        f"{layers} by {method}"
    )
    if bool(result.all_zero[0]):
        text += ": none, the map is zero everywhere"
    return png.getvalue(), text


def explore(network: nn.Module, dataset: Dataset, study: Study) -> Any:
    """Return the explorer as a widget, or as a static picture where widgets can't run."""
    from IPython.display import Image as StaticImage

    test = dataset.test
    if study.progress != "bar":  # nobody is there to click
        png, _ = picture(network, test.images[0].permute(1, 2, 0).numpy(), dataset)
        return StaticImage(png)
    import ipywidgets as widgets

    number = widgets.IntSlider(0, 0, len(test) - 1, description="image")
    target = widgets.Dropdown(
        options=[("predicted", -1), *((name, k) for k, name in enumerate(dataset.classes))],
        description="class",
    )
    convolutions = {name.split(".")[0] for name, m in network.named_modules() if _is_map(m)}
    names = [name for name, _ in network.named_children() if name in convolutions]
    layer = widgets.Dropdown(
        options=names, value=gradcam.default_layer(network), description="layer"
    )
    method = widgets.Dropdown(options=list(gradcam.METHODS), description="method")
    opacity = widgets.FloatSlider(0.5, min=0, max=1, step=0.05, description="opacity")
    upload = widgets.FileUpload(accept="image/*", multiple=False, description="your image")
    back = widgets.Button(description="test images")
    shown, caption = widgets.Image(format="png"), widgets.Label()
    own: list[np.ndarray] = []

    def update(_: object = None) -> None:
        index = number.value
        image = own[0] if own else test.images[index].permute(1, 2, 0).numpy()
        png, text = picture(
            network,
            image,
            dataset,
            target=None if target.value < 0 else target.value,
            layer=layer.value,
            method=method.value,
            opacity=opacity.value,
        )
        shown.value = png
        truth = "your image" if own else f"true {dataset.classes[int(test.labels[index])]}"
        caption.value = f"{truth}; {text}"

    def uploaded(_: object) -> None:
        if not upload.value:
            return
        file = upload.value[0]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / (Path(file["name"]).name or "image")
            path.write_bytes(bytes(file["content"]))
            try:
                own[:] = [read_image(path)]
            except ValueError as error:
                caption.value = str(error)
                return
        update()

    def cleared(_: object) -> None:
        own.clear()
        update()

    for control in (number, target, layer, method, opacity):
        control.observe(update, "value")
    upload.observe(uploaded, "value")
    back.on_click(cleared)
    update()
    controls = widgets.HBox(
        [
            widgets.VBox([number, target, layer]),
            widgets.VBox([method, opacity, widgets.HBox([upload, back])]),
        ]
    )
    shown.layout.max_width = "100%"
    # The picture goes below: beside a picture this wide, the controls would have no room.
    return widgets.VBox([controls, shown, caption])


def _is_map(module: nn.Module) -> bool:
    """Tell whether a module puts out feature maps with spatial extent."""
    return isinstance(module, nn.Conv2d | nn.BatchNorm2d)
