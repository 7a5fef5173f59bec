"""Run all benchmarks and write benchmarks/RESULTS.md (`make bench`)."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision

from benchmarks import executors, faults, gradcam, profile, training
from helpers import config, runs

if __name__ == "__main__":
    device = runs.machine(config.choose_device())
    text = (
        "# Measured\n\nWritten by `make bench`. Contenders run side by side and in turn; read the "
        "ratios, since absolute times depend on the machine. What was tried, and why targets are "
        "missed: [TRIED.md](TRIED.md). What tests notice of random changes: "
        "[MUTANTS.md](MUTANTS.md).\n\n"
        f"Machine: {device['device']}; compute type {device['dtype']}; Python {device['python']}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}.\n"
    )
    for benchmark in (training, profile, gradcam, executors, faults):
        # Written after each, so that nothing measured is lost.
        text += "\n" + benchmark.markdown()
        (Path(__file__).parent / "RESULTS.md").write_text(text.rstrip() + "\n")
    print(text)
