"""Training speed against a straightforward loop, side by side in one run.

    python -m benchmarks.training [--tiny]

The reference is what many tutorials write: float32, NCHW, a DataLoader with per-image torchvision
transforms. Both train a ResNet-18 on 32-pixel images with the same settings. Repetitions of the two
alternate, so that a drift of the machine's speed hits both.
"""

from __future__ import annotations

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

from helpers import config, shapes, training
from helpers.data import Dataset, Split
from helpers.evaluation import predict
from helpers.loader import Augmentation, Loader
from helpers.models import build_model
from helpers.recipes import Recipe

REPETITIONS = 5
SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


def drawn_dataset(count: int) -> Dataset:
    """Return a dataset of `count` drawn images of 32 pixels in each split."""
    splits = []
    for seed in range(3):
        labels = torch.arange(count) % 10
        images = shapes.draw(labels.numpy(), seed=seed).images.transpose(0, 3, 1, 2)
        splits.append(Split(torch.from_numpy(images.copy()), labels))
    return Dataset("shapes", "Shapes", shapes.CLASSES, *splits, "benchmark")


class PerImage(torch.utils.data.Dataset):
    """Images one at a time through torchvision's transforms, as tutorials have it."""

    def __init__(self, split: Split, mean: list[float], std: list[float], train: bool):
        self.images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in split.images]
        self.labels = split.labels.tolist()
        augment = [v2.RandomCrop(32, 4, padding_mode="reflect"), v2.RandomHorizontalFlip()]
        convert = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose(
            [*(augment if train else []), *convert, v2.Normalize(mean, std)]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def alternate(calls: dict[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Call each once to warm up, then all in turn; return the seconds that each reported."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            times[name].append(call())
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
) -> tuple[nn.Module, Callable[[], float]]:
    """Return a ResNet-18 and a call that trains it for an epoch and returns the seconds."""
    device, dtype = loader.device, config.compute_dtype(loader.device)
    model = build_model("resnet18", num_classes=10, width=width)
    model.to(device, memory_format=config.memory_format(device))
    forward = training.compiled(model, loader, dtype) if compiled else model
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = training.State(model, training.make_optimizer(model, recipe), scaler, dtype, [])
    steps = len(loader)
    return model, lambda: timed(
        lambda: training.train_epoch(state, forward, loader, recipe, 0, steps)
    )


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
    dataset = drawn_dataset(count)
    mean, std = dataset.channel_statistics
    recipe = Recipe(
        "benchmark", "sgd", 0.01, "constant", batch, 1, augmentation=Augmentation(), **SGD
    )
    per_image = PerImage(dataset.train, mean.tolist(), std.tolist(), train=True)
    loader = Loader(dataset.train, mean, std, batch, Augmentation(), device=device)

    compiled = device.type in training.COMPILED_DEVICES
    ours, our_epoch = our_trainer(loader, recipe, width, compiled)
    reference = build_model("resnet18", num_classes=10, width=width).to(device)
    epoch = straightforward(reference, per_image, batch)
    contenders = {"helpers.training": our_epoch, "straightforward loop": lambda: timed(epoch)}
    training_times = alternate(contenders, REPETITIONS)

    def resident() -> float:
        return timed(lambda: [None for _ in loader.batches(0)])

    def transforms() -> float:
        return timed(
            lambda: [None for _ in DataLoader(per_image, batch, shuffle=True, drop_last=True)]
        )

    contenders = {"resident loader": resident, "per-image torchvision transforms": transforms}
    augmentation = alternate(contenders, REPETITIONS)
    plain = PerImage(dataset.test, mean.tolist(), std.tolist(), train=False)

    def our_evaluation() -> float:
        return timed(lambda: predict(ours, dataset.test, mean, std, dtype=dtype))

    def reference_evaluation() -> float:
        def epoch() -> None:
            reference.eval()
            with torch.no_grad():
                for images, _ in DataLoader(plain, batch):
                    reference(images.to(device)).argmax(1).cpu()

        return timed(epoch)

    contenders = {
        "helpers.evaluation.predict": our_evaluation,
        "straightforward loop": reference_evaluation,
    }
    evaluation = alternate(contenders, REPETITIONS)
    seen = len(loader) * batch
    return [
        "| what | contender | median (range) | ratio (range) | target |",
        "|---|---|---|---|---|",
        *rows("(a) training ResNet-18", "images/s", training_times, seen, "at least 3.5"),
        *rows("(b) augmentation", "images/s", augmentation, seen, "at least 15"),
        *rows("(c) evaluation", "images/s", evaluation, count, ""),
    ]


def markdown(tiny: bool = False) -> str:
    """Measure and return this benchmark's section of RESULTS.md."""
    count, batch, width = (40, 20, 0.125) if tiny else (512, 128, 1.0)
    lines = measure(count, batch, width)
    return "\n".join(
        [
            "## Training",
            "",
            f"`python -m benchmarks.training`: ResNet-18 at width {width:g}, 32-pixel drawn "
            f"images, batches of {batch}, {REPETITIONS} alternating repetitions over {count} "
            "images after a warm-up. Ratios are medians of the pairwise ratios.",
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    print(markdown(tiny="--tiny" in sys.argv))
