"""Profiles, paths and the device: every choice that comes from outside, read once.

This is the only module that reads the environment. A study is decided by two variables:

    PROFILE   how much work: smoke (tests), quick (default, minutes on a laptop), long (an evening
              on a laptop) or full (a CUDA GPU)
    DATASET   what on: a name from `helpers.data.DATASETS` or the path of a folder of images

and, for where things go, RUNS_DIR, DATA_DIR, ANALYSIS_DIR, DEVICE and PROGRESS. TENSORBOARD=1 also
writes TensorBoard logs into the runs' folders (it needs the package tensorboard). EXECUTOR=ray
trains several runs at a time, on a CPU with CORES_PER_RUN cores each (helpers/executors.py).
"""

from __future__ import annotations

import functools
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


# --- Settings ----------------------------------------------------------------------------------


def check(name: str, value: object, allowed: bool, expected: str) -> None:
    """Raise ValueError, naming the setting and what is expected, unless it's allowed."""
    if not allowed:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def is_whole(value: object, lowest: int = 1) -> bool:
    """Tell whether a setting is an int (not a bool, not 3.0) of at least `lowest`."""
    return type(value) is int and value >= lowest


def as_float(name: str, value: object) -> float:
    """Return a number as a float, so that equal settings (1 and 1.0) are written the same.

    Raises ValueError, naming the setting, for what isn't a number.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    check(name, value, is_number, "a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf


# --- Studies -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """How much work a study does. It never changes which code runs.

    Sizes are numbers of images (None: all there are), `image_size` is in pixels (None: the
    dataset's own), `width` multiplies every network's channel counts, `batch_size` caps the
    recipe's batch size, and every comparison is repeated once for each of `seeds`.
    """

    name: str
    train_size: int | None
    validation_size: int | None
    test_size: int | None
    image_size: int | None
    width: float
    epochs: int
    batch_size: int
    seeds: tuple[int, ...]
    default_dataset: str


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("smoke", 120, 40, 60, 16, 0.125, 2, 20, (0, 1), "shapes"),
        Profile("quick", 2500, 500, 1000, 24, 0.25, 8, 64, (0, 1), "shapes"),
        Profile("long", 6000, 1000, 2000, 32, 0.25, 12, 64, (0, 1), "cifar10"),
        Profile("full", None, None, None, None, 1.0, 60, 512, (0, 1, 2), "cifar10"),
    )
}


# Where runs are trained: in this process, one after the other, or by Ray, several at a time.
EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class Study:
    """One study: a profile on a dataset, the folders it uses, the device and the executor."""

    profile: Profile
    dataset: str
    runs_dir: Path
    data_dir: Path
    analysis_dir: Path
    device: torch.device
    progress: str
    tensorboard: bool = False
    executor: str = "local"
    cores_per_run: int = 1

    @property
    def set_name(self) -> str:
        """Name of this study's folder under analysis/: the dataset and the profile."""
        return f"{dataset_slug(self.dataset)}-{self.profile.name}"

    @property
    def figures_dir(self) -> Path:
        """Where this study's figures go."""
        return self.analysis_dir / self.set_name / "figures"

    @property
    def results_dir(self) -> Path:
        """Where this study's result files go."""
        return self.analysis_dir / self.set_name / "results"


def dataset_slug(dataset: str) -> str:
    """Return a name fit for files: a dataset's own name, or the last part of a folder's path."""
    name = Path(os.path.expanduser(dataset)).resolve().name if is_path(dataset) else dataset
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return slug or "folder"


def is_path(dataset: str) -> bool:
    """Tell a folder of images (with a path separator or a tilde, or "." or "..") from a name."""
    return any(mark in dataset for mark in ("/", os.sep, "~")) or dataset in (".", "..")


def choose_device(wanted: str = "auto") -> torch.device:
    """Return the device to train on: `wanted`, or the best there is for "auto".

    Raises ValueError for a device that torch doesn't know or that this machine lacks.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        device = None
    # How many torch sees of each; `wanted` may name one, as in cuda:1.
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if device is None or device.type not in counts:
        raise ValueError(f"DEVICE={wanted!r} is not a device; use auto, cpu, cuda or mps")
    if (device.index or 0) >= counts[device.type]:
        raise ValueError(
            f"DEVICE={wanted!r}, but torch sees {counts[device.type]} {device.type} devices; "
            "use DEVICE=cpu or auto"
        )
    return device


@functools.lru_cache(maxsize=1)
def study() -> Study:
    """Return the study that the environment asks for (read once a process).

    Raises ValueError for an unknown PROFILE, DEVICE, PROGRESS, EXECUTOR or CORES_PER_RUN. DATASET
    is checked when the data is loaded.
    """
    name = os.environ.get("PROFILE") or "quick"
    if name not in PROFILES:
        raise ValueError(f"PROFILE={name!r} is unknown; choose one of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    progress = os.environ.get("PROGRESS") or "bar"
    if not re.fullmatch("bar|none|file:.+", progress):
        raise ValueError(f"PROGRESS={progress!r} is unknown; use bar, none or file:PATH")
    executor = os.environ.get("EXECUTOR") or "local"
    if executor not in EXECUTORS:
        raise ValueError(f"EXECUTOR={executor!r} is unknown; use {' or '.join(EXECUTORS)}")
    cores = os.environ.get("CORES_PER_RUN") or "1"
    if not re.fullmatch("[1-9][0-9]{0,3}", cores):
        raise ValueError(f"CORES_PER_RUN={cores!r}; use a whole number of CPU cores, 1 or more")

    def folder(variable: str, default: str) -> Path:
        return Path(os.path.expanduser(os.environ.get(variable) or ROOT / default)).resolve()

    return Study(
        profile=profile,
        dataset=os.environ.get("DATASET") or profile.default_dataset,
        runs_dir=folder("RUNS_DIR", "runs"),
        data_dir=folder("DATA_DIR", "data"),
        analysis_dir=folder("ANALYSIS_DIR", "analysis"),
        device=choose_device(os.environ.get("DEVICE") or "auto"),
        progress=progress,
        tensorboard=os.environ.get("TENSORBOARD", "") not in ("", "0"),
        executor=executor,
        cores_per_run=int(cores),
    )


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the number format in which a device multiplies fastest without losing the training.

    CUDA: bfloat16 from compute capability 8.0 on, float16 before (a Colab T4). CPU: bfloat16 where
    the processor has instructions for it (AVX512-BF16 or AMX), since emulating it is slower than
    float32. Anything else: float32.
    """
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if modern else torch.float16
    # torch tells what the processor has only under private names, which may go.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, check, bool)() for check in checks)
    return torch.bfloat16 if device.type == "cpu" and native else torch.float32


# What the layers of a network hand on fits a processor's cache up to about so many pixels, or so
# many of large images, which networks begin by shrinking. A ResNet-50 of width 0.25 on two cores:
# 932 images/s of 32 pixels in batches of 64, 190 in batches of 500.
PIXELS_AT_ONCE, PIXELS_AT_ONCE_IF_LARGE = 2**16, 2**18
LARGE_IMAGE = 64 * 64


def images_at_once(device: torch.device, height: int, width: int, most: int) -> int:
    """Return how many images to send through a network at a time where it makes no difference.

    That is `most`, but fewer on a CPU: 64 of 32 x 32 pixels, and at least 4.
    """
    if device.type != "cpu":
        return most
    pixels = height * width
    budget = PIXELS_AT_ONCE if pixels <= LARGE_IMAGE else PIXELS_AT_ONCE_IF_LARGE
    return min(most, max(4, budget // pixels))
