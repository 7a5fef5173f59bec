"""Compute the maps that the site's explorer shows, from the published set's trained networks.

    python site/maps.py        writes site/explorer/maps.json; trains nothing

Run it by hand when another set is published. The networks are those of 04, of the first seed; the
images are the first of the test split that all of them get right, and the first that one gets
wrong. Maps are Grad-CAM's for every class, at the resolution of their layer, in 256 steps.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from typing import Any

import content
import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from helpers import config, data, gradcam, loader, plots, runs

EACH = 12  # images that all networks get right, and images that one gets wrong
LAYERS = 2  # the last ones
LARGEST = 5_000_000  # bytes


def text(values: bytes) -> str:
    """Write bytes as text."""
    return base64.b64encode(values).decode()


def png(image: Tensor) -> str:
    """Write an image, 3 x H x W uint8, as the text of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(plots.to_rgb(image)).save(file, "PNG", optimize=True)
    return text(file.getvalue())


def trained(study: config.Study, dataset: data.Dataset, model: str) -> runs.Result:
    """Return a network's finished run; ValueError if there is none, or without weights."""
    run = runs.make_run(study, dataset, model, seed=study.profile.seeds[0])
    if runs.is_finished(run, study):
        result = runs.load_or_train(run, study)
        if (result.folder / "model.safetensors").exists():
            return result
    raise ValueError(f"{run.key} is neither stored with its weights nor published with them")


def last_layers(network: nn.Module) -> list[str]:
    """Return the names of a network's last convolutional layers or stages, the last one first."""
    kinds = (nn.Conv2d, nn.Sequential)
    names = [name for name, part in network.named_children() if isinstance(part, kinds)]
    return names[-LAYERS:][::-1]


def explain(result: runs.Result, dataset: data.Dataset, chosen: Tensor) -> tuple[Any, Any]:
    """Return what a network's layers are, and its answers and maps for the chosen test images."""
    network = result.load_model()
    batch = loader.normalise(dataset.test.images[chosen], *dataset.channel_statistics)
    names = last_layers(network)
    found = gradcam.cam(network, batch, target="all", layers=names, size="layer")
    shares = result.test_logits[chosen].softmax(1)
    if (found.logits.softmax(1) - shares).abs().mean() > 0.02:
        raise ValueError(f"{result.run.key}: these are not the weights that were evaluated")
    maps = [(255 * found.maps[name]).round().byte().numpy() for name in names]
    layers = [{"name": n, "size": m.shape[2:]} for n, m in zip(names, maps, strict=True)]
    answers = [
        {
            "shares": [round(float(s), 4) for s in shares[i]],
            "maps": [text(m[i].tobytes()) for m in maps],
        }
        for i in range(len(chosen))
    ]
    return layers, answers


def main() -> None:
    """Write the maps of the published set."""
    about = content.results("04_depth")
    os.environ |= {"PROFILE": about["profile"]["name"], "DATASET": about["data"]["name"]}
    study = config.study()
    dataset = data.study_data(study)
    models = {title: name for name, title in plots.MODEL_TITLES.items()}
    found = {title: trained(study, dataset, models[title]) for title in about["networks"]}
    right = torch.from_numpy(np.stack([result.correct for result in found.values()])).bool().all(0)
    chosen = torch.cat([torch.nonzero(which)[:EACH, 0] for which in (right, ~right)])
    explained = {t: explain(result, dataset, chosen) for t, result in found.items()}
    levels = np.arange(256, dtype=np.uint8)[:, None]
    colours = cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)[..., ::-1]  # red first
    values = {
        "set": study.set_name,
        "title": dataset.title,
        "classes": dataset.classes,
        "colours": text(colours.tobytes()),
        "networks": [{"name": title, "layers": layers} for title, (layers, _) in explained.items()],
        "images": [
            {
                "number": int(number),
                "label": int(dataset.test.labels[number]),
                "pixels": png(dataset.test.images[number]),
                "answers": [answers[i] for _, answers in explained.values()],
            }
            for i, number in enumerate(chosen)
        ],
    }
    written = json.dumps(values, separators=(",", ":")).replace("<", r"\u003c")
    if len(written) > LARGEST:
        raise ValueError(f"{len(written):,} bytes of maps are too many; lower EACH")
    path = content.SITE / "explorer" / "maps.json"
    config.write_atomically(path, (written + "\n").encode())
    print(f"{len(chosen)} images of {study.set_name}, {len(written):,} bytes: {path}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
