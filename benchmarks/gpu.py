"""What a GPU makes of this study, in under ten minutes: `make gpu-check` writes GPU.md.

Training speed and what kernels that repeat cost; whether a repeated and a killed run give the same
bits; how far maps are from the CPU's. A CPU rehearses it, in small.
"""

from __future__ import annotations

import multiprocessing
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.golden import EVERY_AUGMENTATION, digest
from benchmarks.training import our_trainer, timed
from helpers import config, gradcam, runs, training
from helpers.data import Split, load_dataset
from helpers.evaluation import measure, multiply_adds
from helpers.loader import Loader, normalise
from helpers.models import build_model
from helpers.recipes import RECIPES

CPU = torch.device("cpu")


def speed(device: torch.device, tiny: bool) -> list[str]:
    width, batch, drawn, times, side = (0.125, 20, 40, 1, 64) if tiny else (1, 512, 4096, 10, 8192)
    matrix = torch.ones(side, side, device=device, dtype=config.compute_dtype(device))
    peak = 2 * side**3 / measure(lambda: matrix @ matrix, device=device)
    dataset = load_dataset("shapes", train_size=drawn)
    recipe = replace(RECIPES["fast"], batch_size=batch)
    split = Split(dataset.train.images.repeat(times, 1, 1, 1), dataset.train.labels.repeat(times))
    options = {"augmentation": recipe.augmentation, "device": device}
    loader = Loader(split, *dataset.channel_statistics, batch, **options)
    lines = [f"Of a large matrix product, the peak: {peak / 1e12:.3g} TFLOP/s.", ""]
    lines += ["| ResNet-18, kernels | images/s | of the peak | idle |", "|---|---|---|---|"]
    activity = ProfilerActivity.CPU if device == CPU else ProfilerActivity.CUDA
    kind = "self_cpu_time_total" if device == CPU else "self_device_time_total"
    for compiled in (False,) if tiny else (True, False):
        fastest = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True)
        for name, kernels in {"repeat": training.repeatable(device, 0), "fastest": fastest}.items():
            with kernels:
                model, epoch = our_trainer(loader, recipe, width, compiled)
                epoch()
                rate = len(split) // batch * batch / min(timed(epoch) for _ in range(3))
                with profile(activities=[activity]) as found:
                    seconds = timed(epoch)
            busy = sum(getattr(event, kind) for event in found.key_averages()) / 1e6 / seconds
            share = 6 * multiply_adds(model, 32) * rate / peak  # 2 forward, 4 backward
            name = f"{'compiled' if compiled else 'eager'}, {name}"
            lines.append(f"| {name} | {rate:,.0f} | {share:.1%} | {max(0, 1 - busy):.1%} |")
    return lines


def bits(device: torch.device, folder: Path, model: str, tiny: bool) -> str:
    size, width, epochs = (40, 0.125, 20) if tiny else (2000, 1.0, 60)
    sizes = {"image_size": 32, "train_size": size, "validation_size": 40, "test_size": 40}
    fingerprint = load_dataset("shapes", data_dir=folder, **sizes).fingerprint
    recipe = replace(RECIPES["adam"], batch_size=size // 4, augmentation=EVERY_AUGMENTATION)
    settings = {"epochs": epochs, "seed": 0, "width": width, "dropout": 0.3, **sizes}
    run, found = runs.Run("shapes", fingerprint, model, recipe, **settings), []
    for name in ("first", "repeated", "killed"):
        places, options = (folder / f"{name} {model}", folder, folder), {"checkpoint_seconds": 0.0}
        study = config.Study(config.PROFILES["smoke"], "shapes", *places, device, "none")
        if name == "killed":
            start = multiprocessing.get_context("spawn").Process
            process = start(target=runs.load_or_train, args=(run, study), kwargs=options)
            process.start()
            while process.is_alive() and not (places[0] / run.key / "resume.pt").exists():
                time.sleep(0.01)
            process.kill()
            process.join()
        found.append(digest(runs.load_or_train(run, study, **options).load_model().state_dict()))
    same = ["the same bits" if bits == found[0] else "OTHER BITS" for bits in found[1:]]
    return f"| {model} | {same[0]} | {same[1]} (exit code {process.exitcode}) |"


def maps(device: torch.device) -> list[str]:
    drawn = load_dataset("shapes", train_size=10, validation_size=1, test_size=8).test.images
    images = normalise(drawn, torch.full((3,), 0.5), torch.full((3,), 0.2))
    model = build_model("resnet18", num_classes=10, width=0.25)
    lines = ["| maps | largest difference from the CPU's, in [0, 1] |", "|---|---|"]
    for name in gradcam.METHODS:
        both = [gradcam.cam(model.to(d), images, 0, "layer2", name).maps for d in (device, CPU)]
        lines.append(f"| {name} | {float((both[0].cpu() - both[1]).abs().max()):.2g} |")
    return lines


def markdown(device: torch.device, tiny: bool = False) -> str:
    begun, about = time.perf_counter(), runs.machine(device) | {"kernel": platform.release()}
    about |= {"driver": config.nvidia_gpu() or "none", "cuDNN": torch.backends.cudnn.version()}
    lines = ["# On a GPU", "", ", ".join(f"{name} {value}" for name, value in about.items()), ""]
    if device == CPU:
        lines += ["**A rehearsal: this was a CPU. Nothing here says anything about a GPU.**", ""]
    lines += [*speed(device, tiny), "", "| run | repeated | killed, resumed |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for model in ("simple_cnn",) if tiny else ("simple_cnn", "resnet18"):
            lines.append(bits(device, Path(folder), model, tiny))
    lines += ["", *maps(device), "", f"Measured in {time.perf_counter() - begun:.0f} s."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    device = config.choose_device()
    text = markdown(device, tiny=device == CPU)
    (Path(__file__).parent / "GPU.md").write_text(text)
    print(text)
