"""What a trained network is worth: metrics and calibration, intervals and verdicts, cost.

Everything here takes logits and labels (or a network to time) and knows nothing of runs.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import optimize, stats
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from helpers.config import images_at_once, memory_format
from helpers.data import Split
from helpers.loader import normalise, send
from helpers.models import undisturbed

BATCH = 500  # images in one forward pass at most
LEVEL = 0.95  # of intervals
SMALLEST_DIFFERENCE = 0.005  # half a point of accuracy: what is smaller isn't of interest


def predict(
    model: nn.Module, split: Split, mean: Tensor, std: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the logits N x K (float32, on the CPU) of all images of a split, in its order."""
    device = next(model.parameters()).device
    mean, std = mean.to(device), std.to(device)
    at_once = images_at_once(device, *split.images.shape[-2:], BATCH)
    logits = []
    fast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with undisturbed(model, frozen=False), fast:  # one context: weights are cast once
        for images in split.images.split(at_once):
            logits.append(model(normalise(send(images, device), mean, std)).float())
    return torch.cat(logits).cpu()


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy, cross-entropy, macro precision, recall and F1, and calibration error.

    `logits` is N x K, `labels` N. All but the loss (nats) lie in [0, 1]. A class that is never
    predicted counts with precision 0.
    """
    predicted = logits.argmax(1)
    how = {"labels": range(logits.shape[1]), "average": "macro", "zero_division": 0}
    precision, recall, f1, _ = precision_recall_fscore_support(labels, predicted, **how)
    return {
        "accuracy": float((predicted == labels).double().mean()),
        "loss": float(F.cross_entropy(logits.double(), labels)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "calibration_error": expected_calibration_error(logits, labels),
    }


def robustness(
    model: nn.Module, corrupted: Tensor, labels: Tensor, mean: Tensor, std: Tensor, **how: Any
) -> np.ndarray:
    """Return whether each image is classified rightly under each common corruption.

    `corrupted` are the images as `corruptions.corrupt_all` returns them, `labels` N, the rest as
    for `predict`. The array of 0 and 1 is corruptions x 6 x N: severity 1 to 5 after 0, the images
    as they are. Hendrycks and Dietterich (2019).
    """
    shape = corrupted.shape[:3]
    every = Split(corrupted.flatten(0, 2), labels.repeat(shape[0] * shape[1]))
    logits = predict(model, every, mean, std, **how)
    return (logits.argmax(1) == every.labels).double().view(shape).numpy()


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> pd.DataFrame:
    """Return how sure and how right a network is in each of `bins` equal bins of confidence.

    `logits` is N x K, `labels` N. Confidence is the probability of the predicted class. Columns:
    mean confidence, accuracy (both NaN in an empty bin) and the number of images. Guo et al.,
    "On Calibration of Modern Neural Networks" (ICML 2017), section 2.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    index = (confidence * bins).long().clamp(max=bins - 1).numpy()
    correct = (predicted == labels).double().numpy()
    table = pd.DataFrame({"confidence": confidence.numpy(), "accuracy": correct, "images": 1})
    by_bin = table.groupby(index).agg({"confidence": "mean", "accuracy": "mean", "images": "sum"})
    return by_bin.reindex(range(bins)).fillna({"images": 0})


def expected_calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Return the mean gap of confidence and accuracy over 15 bins (Guo et al., equation 3)."""
    table = reliability(logits, labels)
    gap = (table["accuracy"] - table["confidence"]).abs()
    return float((table["images"] * gap).sum() / len(labels))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature T, 0.05 to 20, for which softmax(logits / T) fits the labels best.

    `logits` (N x K) and `labels` (N) are those of the validation split. T minimises their
    cross-entropy, which is convex in 1/T: its slope has one zero at most (Guo et al., section
    4.2). At 0.05 all were right, at 20 the logits tell nothing.
    """
    logits = logits.double()
    true = logits.gather(1, labels[:, None])[:, 0]

    def slope(inverse: float) -> float:
        return float((((inverse * logits).softmax(1) * logits).sum(1) - true).mean())

    if slope(1 / 20) >= 0:
        return 20.0
    return 0.05 if slope(1 / 0.05) <= 0 else 1 / optimize.brentq(slope, 1 / 20, 1 / 0.05)


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its 95 % interval and the number of values behind it."""

    mean: float
    low: float
    high: float
    n: int

    def percent(self) -> str:
        """Write as percentages: 91.2 [90.4, 92.0]."""
        return f"{percent(self.mean)} [{percent(self.low)}, {percent(self.high)}]"


def percent(share: float, sign: str = "") -> str:
    """Write a share as a percentage with one decimal; `sign` "+" marks positive ones too.

    Halves are rounded up in size: with 1,000 test images and two seeds every second accuracy ends
    in a half, and format() would round it now up, now down.
    """
    rounded = Decimal(repr(round(100 * float(share), 9))).quantize(Decimal("0.1"), ROUND_HALF_UP)
    return f"{rounded + 0:{sign}}"  # adding 0 makes -0.0 0.0


def seeds_intervals(
    values: Mapping[Any, np.ndarray],
    contrasts: Mapping[Any, Mapping[Any, float]] | None = None,
    *,
    apart: Collection[Any] = (),
) -> dict[Any, Interval]:
    """Return the mean of each configuration over seeds and test images, with its interval.

    Each array is seeds x images: 1 where that seed's network was right; or one value a seed.
    `contrasts` asks for sums of configurations instead, by name with the weight of each:
    {"gain": {"b": 1, "a": -1}} is how much more often b was right than a, on the same images, over
    the seeds that both have.

    Seeds are a sample of a few. Their variance is therefore pooled over all configurations given,
    which have to be alike, and the interval is Student's t; that of those `apart` is pooled by
    itself. Where the weights add up to 0, what all networks of a seed have in common falls out (not
    if some are apart). Test images are a sample, too: the variance of the mean is (MS_seeds +
    MS_images - MS_residual) / (seeds x images), with the mean squares of a two-way analysis of
    variance and Satterthwaite's (1946) degrees of freedom. With single seeds the interval is that
    of the images alone. `n` counts the seeds.
    """
    tables = {name: np.asarray(table, dtype=np.float64) for name, table in values.items()}
    tables = {name: t[:, None] if t.ndim == 1 else t for name, t in tables.items()}
    for name, table in tables.items():
        if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all():
            raise ValueError(f"{name}: expected seeds x images of finite values, found {table}")
    intervals = {}
    for name, weights in (contrasts or {name: {name: 1.0} for name in tables}).items():
        count = min(len(tables[part]) for part in weights)
        table = sum(weight * tables[part][:count] for part, weight in weights.items())
        (seeds, images), mean = table.shape, float(table.mean())
        in_common = not apart and len(tables) > 1 and abs(sum(weights.values())) < 1e-9
        by_seed, parts = 0.0, 0.0
        for alike in (False, True):
            group = {n: t for n, t in tables.items() if (n in apart) is alike}
            variance, freedom = _spread([*group.values()], in_common)
            part = variance * sum(w**2 for n, w in weights.items() if n in group) / seeds
            by_seed, parts = by_seed + part, parts + part**2 / max(freedom, 1)
        residuals = table - table.mean(1, keepdims=True) - table.mean(0) + mean
        residual = (residuals**2).sum() / max((seeds - 1) * (images - 1), 1) / table.size
        by_image = ((table.mean(0) - mean) ** 2).sum() / max(images - 1, 1) / images
        variance = max(by_seed + by_image - residual, by_seed, by_image)
        parts += by_image**2 / max(images - 1, 1)
        reach = stats.t.ppf((1 + LEVEL) / 2, variance**2 / parts) if parts else 0.0
        half = float(reach * np.sqrt(variance))
        intervals[name] = Interval(mean, mean - half, mean + half, seeds)
    return intervals


def _spread(tables: Sequence[np.ndarray], in_common: bool) -> tuple[float, int]:
    """Return the variance of a seed's mean, pooled over tables, and its degrees of freedom.

    With `in_common` it is that of what is a network's own, beside what all of a seed share.
    """
    if in_common:  # of the seeds that all have
        tables = [table[: min(map(len, tables))] for table in tables]
    own = [table.mean(1) - table.mean() for table in tables]
    freedom = sum(len(means) - 1 for means in own)
    if in_common and own:
        own = np.stack(own) - np.mean(own, axis=0)
        freedom = (len(own) - 1) * (own.shape[1] - 1)
    squares = sum((means**2).sum() for means in own)
    return (squares / freedom if freedom else 0.0), freedom


def seeds_interval(values: np.ndarray) -> Interval:
    """Return the interval of one configuration alone, see `seeds_intervals`."""
    return seeds_intervals({"values": values})["values"]


@dataclass(frozen=True)
class Verdict:
    """What the measurements say of a claim: a word, and the effects that are the reason.

    `source` is how others put the claim, if they did.
    """

    claim: str
    word: str
    effects: Mapping[str, Interval]
    unit: str
    trained_out: bool | None
    source: str

    @property
    def reason(self) -> str:
        """The effects with their intervals, as text."""
        formats = {"nats": "{:+.3f}", "times": "{:.1f}"}
        written = formats.get(self.unit, "{:+.2f}").format
        written = (lambda x: percent(x, "+")) if self.unit == "points" else written
        parts = []
        for name, effect in self.effects.items():
            mean, low, high = map(written, (effect.mean, effect.low, effect.high))
            parts.append(f"{name} {mean} {self.unit}".strip() + f" [{low}, {high}]")
        return "; ".join(parts)

    def __str__(self) -> str:
        return f"**{self.word.capitalize()}.** {self.claim}: {self.reason}."


def verdict(
    claim: str,
    effect: Interval | Mapping[str, Interval],
    *,
    smallest: float = SMALLEST_DIFFERENCE,
    trained_out: bool | None = None,
    unit: str = "points",
    source: str = "",
) -> Verdict:
    """Judge a claim by the interval of an effect that is positive where it holds.

    It holds if the whole interval reaches at least `smallest`, the smallest effect of interest; it
    does not hold if all lies below; else it is not decided. Of several effects all have to hold,
    and one that doesn't decides. Networks that weren't `trained_out` decide nothing about
    capacity: the budget was too small (None: that doesn't matter). `unit` "points" writes
    percentages, others plain numbers.
    """
    effects = {"": effect} if isinstance(effect, Interval) else effect
    word = "not decided"
    if trained_out is False:
        word = "budget too small"
    elif all(e.low >= smallest for e in effects.values()):
        word = "holds"
    elif any(e.high < smallest for e in effects.values()):
        word = "does not hold"
    return Verdict(claim, word, effects, unit, trained_out, source)


def multiply_adds(model: nn.Module, image_size: int) -> int:
    """Return the multiply-adds of an image's forward pass in convolutions and linear layers."""
    with undisturbed(model), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device))
    return counter.get_total_flops() // 2  # a multiply-add counts as two there


def measure(call: Callable[[], object], *, repeats: int = 7, device: torch.device) -> float:
    """Return the median seconds of a call after two to warm up; each ends as the device does."""
    times = []
    for _ in range(2 + repeats):
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def latency(model: nn.Module, image_size: int, batch_size: int = 1, repeats: int = 7) -> float:
    """Return the seconds of a batch's forward pass in float32, on the model's device."""
    device = next(model.parameters()).device
    images = torch.ones(batch_size, 3, image_size, image_size, device=device)
    images = images.contiguous(memory_format=memory_format(device))
    with undisturbed(model), torch.inference_mode():
        return measure(lambda: model(images), repeats=repeats, device=device)


def gradient_norms(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Return the norm of the loss's gradient for each convolution's weights, from the input on.

    `images` is N x C x H x W as the network takes it, `labels` N. Convolutions on shortcuts are
    left out. A copy of the network runs in training mode (batch statistics), as in a first step.
    """
    network = copy.deepcopy(model).train()
    layers = [(n, m.weight) for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    weights = [weight for name, weight in layers if "downsample" not in name]
    with torch.enable_grad():
        loss = F.cross_entropy(network(images), labels)
        gradients = torch.autograd.grad(loss, weights)
    return [float(gradient.norm()) for gradient in gradients]
