"""Cost of Grad-CAM maps, side by side with pytorch-grad-cam, torchcam, captum and a forward pass.

`python -m benchmarks.gradcam` prints a Markdown section; `markdown()` returns it. Every contender
has its own copy of the network, made ready beforehand, and turns the same batch into maps at image
size. Each round times all of them, in an order that rotates from round to round; times are medians
with the range over the rounds, ratios are medians of the ratios within a round. Peak memory is that
of a process of its own, over what it held before the batch. Needs requirements-peers.txt.
"""

from __future__ import annotations

import copy
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.gradcam import cam
from helpers.models import build_model

FORWARD, OURS = "forward alone", "this package"
PEERS = ["grad-cam", "torchcam", "captum"]
STAGES = ["layer1", "layer2", "layer3", "layer4"]
Contender = Callable[[Tensor], object]


def contender(name: str, model: nn.Module, layers: list[str], task: str) -> Contender:
    """Images to maps at image size for the task "one" (class 0), "all" (each class) or "layers"."""
    model = copy.deepcopy(model).eval()
    modules = [model.get_submodule(layer) for layer in layers]
    classes = list(range(10)) if task == "all" else [0]

    def enlarge(maps: Tensor, images: Tensor) -> Tensor:
        maps = F.interpolate(maps[:, None], images.shape[-2:], mode="bilinear")[:, 0]
        return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)

    if name == FORWARD:
        return torch.no_grad()(model)
    if name == OURS:
        target = "all" if task == "all" else 0
        return lambda images: cam(model, images, target, layers)
    if name == "grad-cam":
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        peer = GradCAM(model, modules)
        targets = {k: ClassifierOutputTarget(k) for k in classes}
        return lambda images: [peer(images, [targets[k]] * len(images)) for k in classes]
    if name == "torchcam":
        from torchcam.methods import GradCAM

        extractor = GradCAM(model, layers)

        def with_torchcam(images: Tensor) -> list[Tensor]:
            scores = model(images)
            maps = []
            for k in classes:
                found = extractor(k, scores, normalized=False, retain_graph=k != classes[-1])
                maps += [enlarge(one, images) for one in found]
            return maps

        return with_torchcam
    from captum.attr import LayerGradCam

    peers = [LayerGradCam(model, module) for module in modules]
    return lambda images: [
        enlarge(peer.attribute(images, k, relu_attributions=True)[:, 0].detach(), images)
        for k in classes
        for peer in peers
    ]


def measure(contenders: dict[str, Contender], images: Tensor, rounds: int) -> dict[str, list]:
    """Milliseconds an image of each contender in each round, after one round to warm up."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        for step in range(len(names)):
            name = names[(turn + step) % len(names)]
            start = time.perf_counter()
            contenders[name](images)
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start) / len(images))
    return times


def ratio(times: dict[str, list[float]], of: str, to: str) -> float:
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))


def _status(field: str) -> float:
    """A line of /proc/self/status in MiB (Linux)."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def own_peak(name: str, batch: int) -> float:
    """Peak resident MiB over the start, for one batch at layer4, in this process."""
    model = build_model("resnet18", num_classes=10, image_size=32)
    run = contender(name, model, ["layer4"], "one")
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    run(images[:1])
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # sets the peak to what is resident now
    start = _status("VmRSS")
    run(images)
    return _status("VmHWM") - start


def peak_memory(name: str, batch: int) -> float:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gradcam", "--peak", name, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def markdown(*, rounds: int = 21, tiny: bool = False) -> str:
    """Measure (about ten minutes on two cores), or try on `tiny` data; return the section."""
    small, large, deep = (2, 4, 1) if tiny else (64, 256, 8)
    resnet18 = build_model("resnet18", num_classes=10, image_size=32)
    images = torch.randn(large, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    side = 64 if tiny else 224
    deep_images = torch.randn(deep, 3, side, side, generator=torch.Generator().manual_seed(0))
    last = functools.partial(contender, model=resnet18, layers=["layer4"])

    columns: dict[str, dict[str, list[float]]] = {}
    everyone = [FORWARD, OURS, *PEERS]
    for batch in (1, small, large):
        runs = {name: last(name, task="one") for name in everyone}
        columns[f"layer4, batch {batch}"] = measure(runs, images[:batch], rounds)
    runs = {name: last(name, task="all") for name in everyone}
    columns[f"all 10 classes, batch {small}"] = measure(runs, images[:small], rounds)
    runs = {name: contender(name, resnet18, STAGES, "layers") for name in everyone}
    columns[f"4 layers, batch {small}"] = measure(runs, images[:small], rounds)
    resnet50 = build_model("resnet50", num_classes=1000, image_size=224)
    runs = {name: contender(name, resnet50, ["layer4"], "one") for name in everyone}
    columns[f"ResNet-50 at {side}, batch {deep}"] = measure(runs, deep_images, rounds)
    del runs
    weighed = [OURS, "grad-cam"] if tiny else everyone  # each in a process that loads all peers
    memory = {name: peak_memory(name, large) for name in weighed}

    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *PEERS))
    lines = [
        "## Grad-CAM",
        "",
        f"Milliseconds an image, median (range) of {rounds} interleaved rounds; ResNet-18 at 32 x "
        "32 unless said otherwise, forward pass and enlarging included. Peak memory in MiB over "
        f"the start, layer4, batch {large}. {torch.get_num_threads()} threads, "
        f"{platform.machine()}, Python {platform.python_version()}, {versions}.",
        "",
        "| | " + " | ".join([*columns, "peak MiB"]) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name in everyone:
        cells = []
        for times in columns.values():
            low, middle, high = min(times[name]), statistics.median(times[name]), max(times[name])
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} | {memory.get(name, 0):.0f} |")

    _, some, many, classes, _, deeper = columns.values()
    worst = max(
        (ratio(times, OURS, peer), peer, column)
        for column, times in columns.items()
        for peer in ("torchcam", "captum")
    )
    ratios = [  # what, measured, target, and whether the target is the least or the most
        (f"layer4 against the forward pass, batch {small}", ratio(some, OURS, FORWARD), 1.05, 0),
        (f"layer4 against the forward pass, batch {large}", ratio(many, OURS, FORWARD), 1.05, 0),
        (f"peak memory against grad-cam, batch {large}", memory[OURS] / memory["grad-cam"], 0.2, 0),
        (f"worst against torchcam and captum ({worst[1]}, {worst[2]})", worst[0], 1.03, 0),
        (f"grad-cam against ours, layer4, batch {small}", ratio(some, "grad-cam", OURS), 3, 1),
        ("grad-cam against ours, all 10 classes", ratio(classes, "grad-cam", OURS), 25, 1),
        ("captum against ours, all 10 classes", ratio(classes, "captum", OURS), 8, 1),
        (f"grad-cam against ours, ResNet-50 at {side}", ratio(deeper, "grad-cam", OURS), 3, 1),
    ]
    lines += ["", "| ratio | measured | target | met |", "|---|---|---|---|"]
    for text, value, limit, least in ratios:
        met = "yes" if (value >= limit if least else value <= limit) else "no"
        lines.append(
            f"| {text} | {value:.3f} | at {'least' if least else 'most'} {limit} | {met} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(json.dumps(own_peak(sys.argv[2], int(sys.argv[3]))))
    else:
        print(markdown(tiny="--tiny" in sys.argv))
