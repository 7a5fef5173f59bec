"""Run all benchmarks and write benchmarks/RESULTS.md (`make bench`)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torchvision

from benchmarks import executors, gradcam, profile, training
from helpers import config, runs


def main() -> int:
    """Measure, write RESULTS.md, print it."""
    device = runs.machine(config.choose_device())
    lines = [
        "# Measured speed",
        "",
        "Written by `make bench`. Contenders run side by side and in turn; read the ratios, since "
        "absolute times depend on the machine.",
        "",
        f"Machine: {device['device']}; compute type {device['dtype']}; Python {device['python']}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}.",
        "",
    ]
    path = Path(__file__).parent / "RESULTS.md"
    text = "\n".join(lines)
    for benchmark in (training, profile, gradcam, executors):
        # Written after each, so that nothing measured is lost.
        text += "\n" + benchmark.markdown()
        path.write_text(text.rstrip() + "\n")
    print(text)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
