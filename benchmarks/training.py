"""Training speed against a straightforward loop, side by side in one run.

    python -m benchmarks.training [--tiny]

The reference is what many tutorials write: float32, NCHW, a DataLoader with per-image torchvision
transforms. Both train a ResNet-18 on 32-pixel images with the same settings. Repetitions of the two
alternate, so that a drift of the machine's speed hits both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from helpers import config, shapes, training
from helpers.data import Augmentation, Dataset, ResidentLoader, Split
from helpers.evaluation import predict
from helpers.models import build_model

REPETITIONS = 5


def drawn_dataset(count: int) -> Dataset:
    """Return a dataset of `count` drawn images of 32 pixels in each split."""
    splits = []
    for seed in range(3):
        drawing = shapes.draw(torch.arange(count).numpy() % 10, seed=seed)
        images = torch.from_numpy(drawing.images.transpose(0, 3, 1, 2).copy())
        splits.append(Split(images, torch.from_numpy(drawing.labels)))
    return Dataset("shapes", "Shapes", shapes.CLASSES, *splits, "benchmark")


class PerImage(torch.utils.data.Dataset):
    """Images one at a time through torchvision's transforms, as tutorials have it."""

    def __init__(self, split: Split, mean: list[float], deviation: list[float], train: bool):
        self.images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in split.images]
        self.labels = split.labels.tolist()
        augment = [v2.RandomCrop(32, 4, padding_mode="reflect"), v2.RandomHorizontalFlip()]
        convert = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose(
            [*(augment if train else []), *convert, v2.Normalize(mean, deviation)]
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


class MeasuredLoop(training._Loop):
    """The training loop, with the time inside forward, backward and step taken apart."""

    inside = 0.0

    def _train_step(self, *arguments: object) -> None:
        self.inside += timed(lambda: training._Loop._train_step(self, *arguments))


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


def measure(count: int, batch: int, width: float) -> list[str]:
    """Return the table's lines: training, augmentation, evaluation, overhead."""
    device = config.choose_device()
    dtype = config.compute_dtype(device)
    dataset = drawn_dataset(count)
    mean, deviation = dataset.channel_statistics
    recipe = training.Recipe(
        "benchmark", "sgd", 0.01, "constant", batch, 1, nesterov=True, weight_decay=5e-4,
        augmentation=Augmentation(),
    )  # fmt: skip
    per_image = PerImage(dataset.train, mean.tolist(), deviation.tolist(), train=True)

    ours = build_model("resnet18", num_classes=10, width=width)
    loop = MeasuredLoop(ours, dataset, recipe, 1, 0, None, 1.0, device, None, "")
    shares = []

    def our_epoch() -> float:
        loop.step, loop.inside = 0, 0.0
        seconds = timed(lambda: list(loop._epoch_steps(None)))
        shares.append(1 - loop.inside / seconds)
        return seconds

    reference = build_model("resnet18", num_classes=10, width=width).to(device)
    optimizer = torch.optim.SGD(
        reference.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
    )

    def reference_epoch() -> float:
        def epoch() -> None:
            reference.train()
            for images, labels in DataLoader(per_image, batch, shuffle=True, drop_last=True):
                loss = F.cross_entropy(reference(images.to(device)), labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()

        return timed(epoch)

    training_times = alternate(
        {"helpers.training": our_epoch, "straightforward loop": reference_epoch}, REPETITIONS
    )
    shares = shares[1:]

    loader = ResidentLoader(dataset.train, mean, deviation, batch, Augmentation(), device=device)
    batches = count // batch

    def resident() -> float:
        return timed(lambda: [None for _ in loader.batches(0)])

    def transforms() -> float:
        return timed(
            lambda: [None for _ in DataLoader(per_image, batch, shuffle=True, drop_last=True)]
        )

    augmentation = alternate(
        {"resident loader": resident, "per-image torchvision transforms": transforms},
        REPETITIONS,
    )
    plain = PerImage(dataset.test, mean.tolist(), deviation.tolist(), train=False)

    def our_evaluation() -> float:
        return timed(lambda: predict(ours, dataset.test, mean, deviation, dtype=dtype))

    def reference_evaluation() -> float:
        def epoch() -> None:
            reference.eval()
            with torch.no_grad():
                for images, _ in DataLoader(plain, batch):
                    reference(images.to(device)).argmax(1).cpu()

        return timed(epoch)

    evaluation = alternate(
        {
            "helpers.evaluation.predict": our_evaluation,
            "straightforward loop": reference_evaluation,
        },
        REPETITIONS,
    )
    seen = batches * batch
    share = [100 * s for s in shares]
    spread = f"{statistics.median(share):.2f} % ({min(share):.2f} to {max(share):.2f})"
    return [
        "| what | contender | median (range) | ratio (range) | target |",
        "|---|---|---|---|---|",
        *rows("(a) training ResNet-18", "images/s", training_times, seen, "at least 2.0"),
        *rows("(b) augmentation", "images/s", augmentation, seen, "at least 15"),
        *rows("(c) evaluation", "images/s", evaluation, count, ""),
        "| (d) epoch outside forward, backward, step | helpers.training | "
        f"{spread} | | at most 3 % |",
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="only check that it runs")
    print(markdown(parser.parse_args().tiny))
    sys.exit(0)
