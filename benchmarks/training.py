"""Training speed against a straightforward loop, side by side in one run.

    python -m benchmarks.training [--tiny]

The reference is what many tutorials write: float32, NCHW, a DataLoader with per-image torchvision
transforms. Both train a ResNet-18 on 32-pixel images with the same settings. Repetitions of the two
alternate, so that a drift of the machine's speed hits both.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from helpers import config, training
from helpers.data import Split, load_dataset
from helpers.evaluation import predict
from helpers.loader import Augmentation, Loader
from helpers.models import build_model
from helpers.recipes import Recipe

REPETITIONS = 5
SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


class PerImage(torch.utils.data.Dataset):
    """Images one at a time through torchvision's transforms, as tutorials have it."""

    def __init__(self, split: Split, mean: list[float], std: list[float], train: bool):
        self.images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in split.images]
        self.labels = split.labels.tolist()
        augment = [v2.RandomCrop(32, 4, padding_mode="reflect"), v2.RandomHorizontalFlip()]
        convert = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        steps = [*(augment if train else []), *convert, v2.Normalize(mean, std)]
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def alternate(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Call each once to warm up, then all in turn; return the seconds that each took."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPETITIONS):
        for name, call in calls.items():
            times[name].append(timed(call))
    return times


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rows(what: str, unit: str, times: dict[str, list[float]], work: int, target: str) -> list[str]:
    """Return a table row a contender and, in the first one's, the ratio of the medians."""
    ours, reference = times.values()
    pairs = [b / a for a, b in zip(ours, reference, strict=True)]
    ratio = f"**{statistics.median(pairs):.2f}** ({min(pairs):.2f} to {max(pairs):.2f})"
    lines = []
    for i, (name, values) in enumerate(times.items()):
        speeds = sorted(work / v for v in values)
        lines.append(
            f"| {what if i == 0 else ''} | {name} | {statistics.median(speeds):,.0f} {unit} "
            f"({speeds[0]:,.0f} to {speeds[-1]:,.0f}) | {ratio if i == 0 else ''} | "
            f"{target if i == 0 else ''} |"
        )
    return lines


def our_trainer(
    loader: Loader, recipe: Recipe, width: float, compiled: bool
) -> tuple[nn.Module, Callable[[], object]]:
    """Return a ResNet-18 and a call that trains it for an epoch."""
    device, dtype = loader.device, config.compute_dtype(loader.device)
    model = build_model("resnet18", num_classes=10, width=width)
    model.to(device, memory_format=config.memory_format(device))
    forward = training.compiled(model, loader, dtype) if compiled else model
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = training.State(model, training.make_optimizer(model, recipe), scaler, dtype, [])
    epoch = functools.partial(training.train_epoch, state, forward, loader, recipe, 0, len(loader))
    return model, epoch


def straightforward(model: nn.Module, images: PerImage, batch: int) -> Callable[[], None]:
    """Return a call that trains a network for an epoch as many tutorials write it."""
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, **SGD)

    def epoch() -> None:
        model.train()
        for inputs, labels in DataLoader(images, batch, shuffle=True, drop_last=True):
            loss = F.cross_entropy(model(inputs.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return epoch


def measure(count: int, batch: int, width: float) -> list[str]:
    """Return the table's lines: training, augmentation, evaluation."""
    device = config.choose_device()
    dtype = config.compute_dtype(device)
    dataset = load_dataset("shapes", train_size=count, validation_size=count, test_size=count)
    mean, std = dataset.channel_statistics
    recipe = Recipe(
        "benchmark", "sgd", 0.01, "constant", batch, 1, augmentation=Augmentation(), **SGD
    )
    per_image = PerImage(dataset.train, mean.tolist(), std.tolist(), train=True)
    loader = Loader(dataset.train, mean, std, batch, Augmentation(), device=device)

    compiled = device.type in training.COMPILED_DEVICES
    ours, our_epoch = our_trainer(loader, recipe, width, compiled)
    reference = build_model("resnet18", num_classes=10, width=width).to(device)
    plain = PerImage(dataset.test, mean.tolist(), std.tolist(), train=False)

    def reference_evaluation() -> None:
        reference.eval()
        with torch.no_grad():
            for images, _ in DataLoader(plain, batch):
                reference(images.to(device)).argmax(1).cpu()

    transformed = DataLoader(per_image, batch, shuffle=True, drop_last=True)
    trained = {
        "helpers.training": our_epoch,
        "straightforward loop": straightforward(reference, per_image, batch),
    }
    augmented = {
        "resident loader": lambda: [None for _ in loader.batches(0)],
        "per-image torchvision transforms": lambda: [None for _ in transformed],
    }
    evaluated = {
        "helpers.evaluation.predict": lambda: predict(ours, dataset.test, mean, std, dtype=dtype),
        "straightforward loop": reference_evaluation,
    }
    seen = len(loader) * batch
    return [
        "| what | contender | median (range) | ratio (range) | target |",
        "|---|---|---|---|---|",
        *rows("(a) training ResNet-18", "images/s", alternate(trained), seen, "at least 3.5"),
        *rows("(b) augmentation", "images/s", alternate(augmented), seen, "at least 15"),
        *rows("(c) evaluation", "images/s", alternate(evaluated), count, ""),
    ]


def markdown(tiny: bool = False) -> str:
    """Measure and return this benchmark's section of RESULTS.md."""
    count, batch, width = (40, 20, 0.125) if tiny else (512, 128, 1.0)
    text = (
        f"`python -m benchmarks.training`: ResNet-18 at width {width:g}, 32-pixel drawn images, "
        f"batches of {batch}, {REPETITIONS} alternating repetitions over {count} images after a "
        "warm-up. Ratios are medians of the pairwise ratios."
    )
    return "\n".join(["## Training", "", text, "", *measure(count, batch, width), ""])


if __name__ == "__main__":
    print(markdown(tiny="--tiny" in sys.argv))
