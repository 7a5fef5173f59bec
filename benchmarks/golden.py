"""The golden record: what a rebuild of the code must leave equal bit for bit.

    python -m benchmarks.golden             compare with benchmarks/golden.json
    python -m benchmarks.golden --write     write it

SHA-256 of the weights and histories of eleven small runs (each network and recipe, early stopping,
every augmentation, transfer, pruning), of the maps of every CAM method on fixed weights, and the
fingerprints of datasets. Bits depend on processor and torch: compare on one machine, before and
after a change; the record names its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from helpers import gradcam, models, runs, shapes
from helpers.config import PROFILES, Study
from helpers.data import Dataset, load_dataset
from helpers.loader import Augmentation, normalise
from helpers.recipes import RECIPES
from helpers.runs import Pruning, Run, Transfer

RECORD = Path(__file__).parent / "golden.json"
SIZES = {"train_size": 100, "validation_size": 40, "test_size": 40}
EVERY_AUGMENTATION = Augmentation(True, 4, 8, 0.3, True, 0.4)


def digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def draw_folder(root: Path, classes: int = 10, images_a_class: int = 6, size: int = 24) -> Path:
    """Draw a folder of images of so many pixels, laid out as train/<class>/*."""
    labels = np.arange(classes * images_a_class) % classes
    drawing = shapes.draw(labels, image_size=size, seed=7)
    for number, (image, label) in enumerate(zip(drawing.images, labels, strict=True)):
        path = root / "train" / shapes.CLASSES[label] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image[..., ::-1])
    return root


def golden_runs(data_dir: Path) -> dict[str, Run]:
    """Return the runs of the record by what is special about them."""

    def run(model: str, recipe: str, changes: dict[str, Any] | None = None, **fields: Any) -> Run:
        size = fields.setdefault("image_size", 24)
        dataset = load_dataset("shapes", data_dir=data_dir, image_size=size, **SIZES)
        changed = replace(RECIPES[recipe], batch_size=20, **changes or {})
        settings = {"epochs": 2, "seed": 3, "width": 0.25} | SIZES | fields
        return Run("shapes", dataset.fingerprint, model, changed, **settings)

    base = run("resnet18", "onecycle")
    steep, stopping = {"learning_rate": 0.05}, {"epochs": 8, "patience": 2, "dropout": 0.5}
    every = {"augmentation": EVERY_AUGMENTATION, "label_smoothing": 0.1}
    return {
        "simple_cnn, adam, early stopping, dropout": run("simple_cnn", "adam", steep, **stopping),
        "resnet18, onecycle": base,
        "resnet34, fast": run("resnet34", "fast"),
        "resnet50, textbook": run("resnet50", "textbook"),
        "resnet20, adam, every augmentation": run("resnet20", "adam", every, width=1.0),
        "resnet18, adam, imagenet stem": run("resnet18", "adam", stem="imagenet", image_size=40),
        "plain resnet20, fast": run("resnet20", "fast", width=1.0, residual=False),
        "transfer, rate factor": run("resnet18", "fast", seed=4, start=Transfer(base, False, 0.4)),
        "transfer, frozen": run("resnet18", "fast", seed=4, start=Transfer(base, frozen=True)),
        "pruned weights": run("resnet18", "fast", start=Pruning(base, "weights", 0.6)),
        "pruned channels": run("resnet18", "fast", start=Pruning(base, "channels", 0.5)),
    }


def golden_maps(dataset: Dataset) -> dict[str, str]:
    """Return digests of the maps of every method on a network of fixed weights."""
    images = normalise(dataset.test.images[:8], *dataset.channel_statistics)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = models.build_model("resnet18", num_classes=10, width=0.25).eval()
    maps = {}
    for method in gradcam.METHODS:
        some = images[:2] if method == "score-cam" else images
        for target, size in ((None, "input"), ("all", "layer")):
            found = gradcam.cam(network, some, target, ["layer2", "layer4"], method, size=size)
            maps[f"{method}, target {target}"] = digest(found.maps)
    return maps


def record(folder: Path) -> dict[str, str]:
    """Return the record of this code on this machine, on one thread."""
    torch.set_num_threads(1)
    cpu, data_dir = torch.device("cpu"), folder / "data"
    study = Study(PROFILES["smoke"], "shapes", folder / "runs", data_dir, folder, cpu, "none")
    sets = {"shapes": 24, "shapes-marked": 24, "digits": 16}
    sets[str(draw_folder(folder / "two words"))] = 24
    found = {"machine": " / ".join(runs.machine(cpu).values())}
    for name, size in sets.items():
        dataset = load_dataset(name, image_size=size, data_dir=data_dir)
        found[f"fingerprints: {Path(name).name}"] = dataset.fingerprint
    for name, run in golden_runs(data_dir).items():
        result = runs.load_or_train(run, study)
        found[f"weights: {name}"] = digest(result.load_model().state_dict())
        history = result.history.drop(columns="seconds").to_csv(index=False)
        found[f"histories: {name}"] = hashlib.sha256(history.encode()).hexdigest()
    drawn = load_dataset("shapes", data_dir=data_dir, image_size=24, **SIZES)
    return found | {f"maps: {name}": value for name, value in golden_maps(drawn).items()}


def main() -> int:
    """Write the record, or compare with it; return 1 if anything differs."""
    with tempfile.TemporaryDirectory() as folder:
        found = record(Path(folder))
    if "--write" in sys.argv:
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    stored = json.loads(RECORD.read_text())
    print(f"record of {stored.pop('machine')}\nnow on    {found['machine']}")
    wrong = [name for name, value in stored.items() if found.get(name) != value]
    count = len(stored)
    print("\n".join([*wrong, f"{count - len(wrong)} of {count} are equal bit for bit"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
