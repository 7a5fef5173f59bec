"""Where a training step spends its time, by operator (`python -m benchmarks.profile`)."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch.profiler import profile

from helpers import config, training
from helpers.models import build_model
from helpers.recipes import RECIPES

# The share of an operator's own time, by what its name holds; the first that fits counts.
KINDS = {
    "convolution backward": ("convolution_backward",),
    "convolution": ("convolution",),
    "batch norm": ("batch_norm",),
    "ReLU": ("threshold", "clamp_min", "relu"),
    "addition": ("aten::add",),
    "copies and casts": ("copy_", "_to_copy", "fill_", "reorder"),
}


def shares(name: str, width: float, batch: int, threads: int, steps: int) -> dict[str, float]:
    """Return images a second, and the share of a training step that each kind of operator takes."""
    torch.set_num_threads(threads)
    model = build_model(name, num_classes=10, width=width)
    model.to(memory_format=torch.channels_last).train()
    images, labels = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = training.make_optimizer(model, RECIPES["long"])
    dtype = config.compute_dtype(images.device)

    def step() -> None:
        with training.mixed_precision(images.device, dtype):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    with profile() as found:
        for _ in range(steps):
            step()
    taken = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in found.key_averages():
        fits = (k for k, marks in KINDS.items() if any(m in event.key for m in marks))
        taken[next(fits, "other")] += event.self_cpu_time_total / 1e6
    total = sum(taken.values())
    return {"images/s": steps * batch / total} | {k: v / total for k, v in taken.items()}


def markdown(tiny: bool = False) -> str:
    """Measure and return this section of RESULTS.md."""
    names, widths, batches = ("resnet18", "resnet50"), (0.25, 1.0), (64, 128, 256)
    if tiny:
        names, widths, batches = names[:1], (0.0625,), (8,)
    training.keep_memory()
    lines = ["## A training step", "", "`python -m benchmarks.profile`: images a second, and the "]
    lines[-1] += "share (%) of a step's time by operator, own time, 32-pixel images."
    lines += ["", f"| network | width | batch | threads | images/s | {' | '.join(KINDS)} | other |"]
    lines.append("|---" * (len(KINDS) + 6) + "|")
    settings = [(n, w, b, t) for n in names for w in widths for b in batches for t in (1, 2)]
    before = torch.get_num_threads()
    for name, width, batch, threads in settings:
        speed, *parts = shares(name, width, batch, threads, 2).values()
        cells = [name, width, batch, threads, f"{speed:,.0f}", *(f"{100 * p:.0f}" for p in parts)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    torch.set_num_threads(before)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown("--tiny" in sys.argv))
