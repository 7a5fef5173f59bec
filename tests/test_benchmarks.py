"""Each benchmark runs, on next to nothing, and reports what it compares."""

from __future__ import annotations

import pytest
import torch

from benchmarks import executors, faults, gpu, gradcam, profile, training
from helpers.config import ROOT


def test_training() -> None:
    text = training.markdown(tiny=True)
    assert text.startswith("## Training")
    for row in ("(a) training ResNet-18", "(b) augmentation", "(c) evaluation"):
        assert row in text


def test_gradcam() -> None:
    for peer in ("pytorch_grad_cam", "torchcam", "captum"):
        pytest.importorskip(peer, reason=f"peer library {peer} is not installed")
    text = gradcam.markdown(rounds=1, tiny=True)
    assert text.startswith("## Grad-CAM")
    for name in ("forward alone", "this package", "grad-cam", "torchcam", "captum"):
        assert f"| {name} |" in text


def test_executors() -> None:
    text = executors.markdown(tiny=True)
    assert text.startswith("## Executors")
    assert f"| {executors.LOCAL} |" in text and f"| {executors.LOOP} |" in text
    assert "| resnet18 | 0.0625 | 8 | 2 |" in profile.markdown(tiny=True)


def test_gpu_rehearsed_on_a_cpu() -> None:
    text = gpu.markdown(torch.device("cpu"), tiny=True)
    assert "this was a CPU" in text and "| eager, fastest |" in text
    assert "| simple_cnn | the same bits | the same bits (exit code -9) |" in text
    assert text.count("| 0 |") == 7, "the maps of every method"


def test_every_planted_fault_fits_the_code() -> None:
    for fault in faults.FAULTS:
        _, where, *change = fault.split(" :: ")
        module, function = where.split(".", 1)
        source = (ROOT / "helpers" / f"{module}.py").read_text()
        assert compile(faults.planted(source, function, *change), where, "exec")
