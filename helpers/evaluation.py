"""What a trained network is worth: metrics with intervals, calibration, robustness and cost.

Everything here takes logits and labels (or a network to time) and knows nothing of runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from helpers.config import images_at_once
from helpers.data import Split, normalise

BATCH = 500  # images in one forward pass at most


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a network in training or evaluation mode, and every submodule back as it was after."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


def device_of(model: nn.Module) -> torch.device:
    """Return where a network runs; one without parameters, a quantized one, runs on the CPU."""
    return next(model.parameters(), torch.empty(0)).device


@torch.inference_mode()
def predict(
    model: nn.Module,
    split: Split,
    mean: Tensor,
    deviation: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    mirror: bool = False,
) -> Tensor:
    """Return the logits N x K (float32, on the CPU) of all images of a split, in its order.

    The model is put in evaluation mode for the time of the call. With a `dtype` below float32 the
    forward pass runs under autocast. `mirror` shows each image mirrored: the mean of
    both logits is test-time augmentation, to be reported apart from the plain figure.
    """
    device = device_of(model)
    at_once = images_at_once(device, *split.images.shape[-2:], BATCH)
    logits = []
    with mode(model, training=False):
        for images in split.images.split(at_once):
            batch = normalise(images.to(device), mean, deviation)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                out = model(batch.flip(-1) if mirror else batch)
            logits.append(out.float())
    return torch.cat(logits).cpu()


# --- Metrics -----------------------------------------------------------------------------------


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy, cross-entropy, macro precision, recall and F1, and calibration error.

    `logits` is N x K, `labels` N. All but the loss (nats) lie in [0, 1]. A class that is never
    predicted counts with precision 0.
    """
    predicted = logits.argmax(1)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels.numpy(),
        predicted.numpy(),
        labels=range(logits.shape[1]),
        average="macro",
        zero_division=0,
    )
    return {
        "accuracy": float((predicted == labels).double().mean()),
        "loss": float(F.cross_entropy(logits.double(), labels)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "calibration_error": expected_calibration_error(logits, labels),
    }


def confusion(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Return the confusion matrix K x K of counts: rows are true classes, columns predictions."""
    classes = range(logits.shape[1])
    return sklearn_confusion(labels.numpy(), logits.argmax(1).numpy(), labels=classes)


# --- Calibration -------------------------------------------------------------------------------

# A temperature outside these bounds says that the logits tell nothing, or that all were right.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> pd.DataFrame:
    """Return how sure and how right a network is in each of `bins` equal bins of confidence.

    `logits` is N x K, `labels` N. Confidence is the probability of the predicted class. Columns:
    mean confidence, accuracy (both NaN in an empty bin) and the number of images. Guo et al.,
    "On Calibration of Modern Neural Networks" (ICML 2017), section 2.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    correct = (predicted == labels).double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    images = torch.bincount(index, minlength=bins)
    sums = {"confidence": confidence, "accuracy": correct}
    columns = {
        name: torch.bincount(index, values, minlength=bins) / images
        for name, values in sums.items()
    }
    return pd.DataFrame({name: c.numpy() for name, c in (columns | {"images": images}).items()})


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the mean gap between confidence and accuracy over equal-width confidence bins.

    Guo et al. (2017), equation 3.
    """
    table = reliability(logits, labels, bins)
    gap = (table["accuracy"] - table["confidence"]).abs()
    return float((table["images"] * gap).sum() / len(labels))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T for which softmax(logits / T) fits the labels best.

    `logits` (N x K) and `labels` (N) are those of the validation split. T minimises their
    cross-entropy, which is convex in 1/T, so that halving the interval around the zero of its
    slope finds it. Guo et al. (2017), section 4.2. T stays within 0.05 and 20.

    Raises ValueError without logits, or if one isn't finite.
    """
    logits = logits.double()
    if len(logits) == 0 or not logits.isfinite().all():
        raise ValueError(
            f"expected finite logits of validation images, found shape {tuple(logits.shape)}"
        )
    true = logits.gather(1, labels[:, None])[:, 0]
    low, high = 1 / HIGHEST_TEMPERATURE, 1 / LOWEST_TEMPERATURE
    for _ in range(60):
        inverse = (low * high) ** 0.5
        slope = ((inverse * logits).softmax(1) * logits).sum(1) - true
        low, high = (low, inverse) if slope.mean() > 0 else (inverse, high)
    return 1 / (low * high) ** 0.5


# --- Robustness --------------------------------------------------------------------------------


def robustness(
    model: nn.Module,
    corrupted: Tensor,
    labels: Tensor,
    mean: Tensor,
    deviation: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Return whether each image is classified rightly under each common corruption.

    `corrupted` holds the images as `corruptions.corrupt_all` returns them, `labels` N. The array of
    0 and 1 is corruptions x 6 x N: severity 1 to 5 after 0, the images as they are. Hendrycks and
    Dietterich (2019). `mean`, `deviation` and `dtype` are those of `predict`.
    """
    shape = corrupted.shape[:3]
    every = Split(corrupted.flatten(0, 2), labels.repeat(shape[0] * shape[1]))
    logits = predict(model, every, mean, deviation, dtype=dtype)
    return (logits.argmax(1) == every.labels).double().view(shape).numpy()


# --- Intervals ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its confidence interval and the number of values behind it."""

    mean: float
    low: float
    high: float
    n: int

    def percent(self) -> str:
        """Write as percentages: 91.2 [90.4, 92.0]."""
        return f"{percent(self.mean)} [{percent(self.low)}, {percent(self.high)}]"


def percent(share: float, sign: str = "") -> str:
    """Write a share as a percentage with one decimal; `sign` "+" marks positive ones too.

    Halves are rounded up in size, as in the report: with 1,000 test images and two seeds every
    second accuracy ends in a half, and format() would round it now up, now down.
    """
    rounded = Decimal(repr(round(100 * float(share), 9))).quantize(Decimal("0.1"), ROUND_HALF_UP)
    return f"{rounded + 0:{sign}}"  # adding 0 makes -0.0 0.0


def bootstrap_interval(
    values: np.ndarray | Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Return the mean of N values with its percentile bootstrap interval (Efron, 1979).

    Raises ValueError for no values or a value that isn't finite.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    if len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"expected finite values to resample, found {len(values)}: {values[:5]}")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, 4_000_000 // len(values))  # bounds the index array's memory
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = generator.integers(0, len(values), (count, len(values)))
        means[start : start + count] = values[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), len(values))


def seeds_interval(
    values: np.ndarray, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Return the mean over seeds and test images with a two-level bootstrap interval.

    `values` is seeds x images: 1 where that seed's network was right, or the difference of two
    methods that share seeds and images (then the interval is that of a paired comparison). Seeds
    and images are both resampled, so the interval covers the luck of the initialisation as far as
    the few seeds show it, and that of the test set. `n` counts the seeds.

    Raises ValueError unless `values` is a non-empty table of finite numbers.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"expected seeds x images of finite values, found shape {values.shape}")
    generator = np.random.default_rng(seed)
    seeds, images = values.shape
    means = np.empty(resamples)
    for i in range(resamples):
        # Resampling rows and columns independently: weights instead of a copy of the table.
        row_weights = np.bincount(generator.integers(0, seeds, seeds), minlength=seeds)
        column_weights = np.bincount(generator.integers(0, images, images), minlength=images)
        means[i] = row_weights @ values @ column_weights / values.size
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), seeds)


def epochs_to_accuracy(validation_accuracy: Sequence[float], target: float) -> int | None:
    """Return the first epoch (from 1) whose validation accuracy reaches `target`, or None."""
    return next((i for i, a in enumerate(validation_accuracy, start=1) if a >= target), None)


# --- Cost --------------------------------------------------------------------------------------


def multiply_adds(model: nn.Module, image_size: int, in_channels: int = 3) -> int:
    """Return the multiply-adds of one image's forward pass (convolutions and linear layers).

    Counted by torch's own FLOP counter, which counts a multiply-add as two operations.
    """
    first = next(model.parameters())
    image = torch.zeros(1, in_channels, image_size, image_size, device=first.device)
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), mode(model, training=False), counter:
        model(image)
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class LayerSummary:
    """One row of `summarise`: a named layer, its output shape, parameters and multiply-adds."""

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def summarise(
    model: nn.Module, image_size: int, in_channels: int = 3, depth: int = 1
) -> list[LayerSummary]:
    """Return one row for each module down to `depth` levels, in the order of the forward pass.

    Shapes leave out the batch dimension. Multiply-adds and parameters of a row include all that
    is below it.
    """
    rows: list[tuple[str, str, tuple[int, ...], int]] = []
    hooks = []
    for name, module in model.named_modules():
        if name and name.count(".") < depth:

            def record(module: nn.Module, inputs: object, output: Tensor, name: str = name) -> None:
                parameters = sum(p.numel() for p in module.parameters())
                shape = tuple(output.shape[1:])
                rows.append((name, type(module).__name__, shape, parameters))

            hooks.append(module.register_forward_hook(record))
    first = next(model.parameters())
    image = torch.zeros(1, in_channels, image_size, image_size, device=first.device)
    counter = FlopCounterMode(display=False, depth=depth + 1)
    try:
        with torch.inference_mode(), mode(model, training=False), counter:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    counts = counter.get_flop_counts()
    owner = type(model).__name__
    return [
        LayerSummary(*row, sum(counts.get(f"{owner}.{row[0]}", {}).values()) // 2) for row in rows
    ]


@dataclass(frozen=True)
class Timing:
    """Median and spread (minimum and maximum) of repeated timings, in seconds."""

    median: float
    low: float
    high: float
    repeats: int


def measure(
    call: Callable[[], object], *, repeats: int = 7, warmups: int = 2, device: torch.device
) -> Timing:
    """Time a call `repeats` times after `warmups`, waiting for the device to finish each."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for _ in range(warmups):
        once()
    times = [once() for _ in range(repeats)]
    return Timing(statistics.median(times), min(times), max(times), repeats)


@torch.inference_mode()
def latency(model: nn.Module, image_size: int, batch_size: int = 1, repeats: int = 7) -> Timing:
    """Time the forward pass of a batch in float32 on the model's device, in evaluation mode."""
    device = device_of(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, image_size, image_size, generator=generator).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    with mode(model, training=False):
        return measure(lambda: model(images), repeats=repeats, device=device)


def gradient_norms(model: nn.Module, images: Tensor, labels: Tensor) -> list[tuple[str, float]]:
    """Return the norm of the loss's gradient for each convolution's weights, from the input on.

    `images` is N x C x H x W as the network takes it, `labels` N. The network runs in training
    mode (batch statistics), as in its first step; its running statistics, mode and gradients are
    put back.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    layers = [(n, m.weight) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    layers = [(n, w) for n, w in layers if "downsample" not in n]
    try:
        with torch.enable_grad(), mode(model, training=True):
            loss = F.cross_entropy(model(images), labels)
            gradients = torch.autograd.grad(loss, [weight for _, weight in layers])
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return [(n, float(g.norm())) for (n, _), g in zip(layers, gradients, strict=True)]
