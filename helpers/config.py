"""Profiles, paths and the device: every choice that comes from outside, read once.

This is the only module that reads the environment. A study is decided by two variables:

    PROFILE   how much work: smoke (tests), quick (default, minutes on a laptop), long (an evening
              on a laptop) or full (a CUDA GPU)
    DATASET   what on: a name from `helpers.data.DATASETS` or the path of a folder of images

and, for where things go, RUNS_DIR, DATA_DIR, ANALYSIS_DIR, DEVICE and PROGRESS. EXECUTOR=processes
or ray trains several runs at a time, on a CPU with CORES_PER_RUN cores each (helpers/executors.py).
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

ROOT = Path(__file__).resolve().parent.parent

# --- Settings ----------------------------------------------------------------------------------

Settings = TypeVar("Settings")
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def settings(cls: type[Settings]) -> type[Settings]:
    """Make a class a frozen dataclass whose values pydantic checks whenever one is made.

    Strict: no bool for an int, no text for a number, no NaN, no unknown name; 1 becomes 1.0 where
    a float is wanted. Raises ValueError, in one line, for values that aren't allowed.
    """
    checked = pydantic_dataclass(frozen=True, config=STRICT)(cls)
    make = checked.__init__

    @functools.wraps(make)
    def init(self: Settings, *values: Any, **named: Any) -> None:
        try:
            make(self, *values, **named)
        except ValidationError as error:
            raise ValueError(readable(cls, error)) from None
        finally:
            # Pydantic puts its own back when it first uses a class whose types name a later one.
            checked.__init__ = init

    checked.__init__ = init
    return checked


def readable(cls: type, error: ValidationError) -> str:
    """Return a line that says of each setting what was found and what is expected."""
    names, said = dict(enumerate(cls.__dataclass_fields__)), []
    for part in error.errors(include_url=False):
        first, *inner = part["loc"] or ("",)
        name = ".".join(n for n in map(str, (names.get(first, first), *inner)) if n.isidentifier())
        found = " ".join(repr(part["input"])[:60].split())
        message = part["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        missing = f"{name} is missing" if part["type"] == "missing" else ""
        said.append(missing or (f"{name} is {found}: {message}" if name else message))
    return f"{cls.__name__}: {'; '.join(said)}"


# --- Studies -----------------------------------------------------------------------------------


@settings
class Profile:
    """How much work a study does. It never changes which code runs.

    Sizes are numbers of images (None: all there are), `image_size` is in pixels (None: the
    dataset's own), `width` multiplies every network's channel counts, `recipe` is that of
    `helpers.recipes.RECIPES` which fits so much training, `batch_size` caps the recipe's, and every
    comparison is repeated once for each of `seeds`.
    """

    name: str
    train_size: int | None
    validation_size: int | None
    test_size: int | None
    image_size: int | None
    width: float
    epochs: int
    recipe: str
    batch_size: int
    seeds: tuple[int, ...]
    default_dataset: str


_ALL = (
    Profile("smoke", 120, 40, 60, 16, 0.125, 2, "fast", 20, (0, 1), "shapes"),
    Profile("quick", 6000, 500, 1000, 20, 0.25, 6, "quick", 32, (0, 1), "shapes"),
    Profile("long", None, None, None, 32, 0.25, 24, "long", 128, (0, 1, 2), "cifar10-jpeg"),
    Profile("full", None, None, None, None, 1.0, 60, "fast", 512, (0, 1, 2), "cifar10"),
)
PROFILES = {profile.name: profile for profile in _ALL}


@dataclass(frozen=True)
class Study:
    """One study: a profile on a dataset, the folders it uses, the device and the executor.

    `progress` is "bar", "none" or "file:PATH", see `helpers.executors`.
    """

    profile: Profile
    dataset: str
    runs_dir: Path
    data_dir: Path
    analysis_dir: Path
    device: torch.device
    progress: str = "bar"
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

    Raises ValueError for one that torch doesn't know, or on which it can't make a tensor.
    """
    if wanted == "auto":
        best = "mps" if torch.backends.mps.is_available() else "cpu"
        wanted = "cuda" if torch.cuda.is_available() else best
    try:
        return torch.zeros(1, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"DEVICE={wanted!r} can't be used ({reason}); use auto, cpu, cuda or mps"
        ) from None


@functools.lru_cache(maxsize=1)
def study() -> Study:
    """Return the study that the environment asks for (read once a process).

    Raises ValueError for a variable with an unknown value. DATASET is checked with the data.
    """

    def choice(variable: str, default: str, pattern: str, expected: str) -> str:
        value = os.environ.get(variable) or default
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{variable}={value!r} is unknown; use {expected}")
        return value

    def folder(variable: str, default: str) -> Path:
        return Path(os.path.expanduser(os.environ.get(variable) or ROOT / default)).resolve()

    name = choice("PROFILE", "quick", "|".join(PROFILES), f"one of {', '.join(PROFILES)}")
    return Study(
        profile=PROFILES[name],
        dataset=os.environ.get("DATASET") or PROFILES[name].default_dataset,
        runs_dir=folder("RUNS_DIR", "runs"),
        data_dir=folder("DATA_DIR", "data"),
        analysis_dir=folder("ANALYSIS_DIR", "analysis"),
        device=choose_device(os.environ.get("DEVICE") or "auto"),
        progress=choice("PROGRESS", "bar", "bar|none|file:.+", "bar, none or file:PATH"),
        executor=choice("EXECUTOR", "local", "local|processes|ray", "local, processes or ray"),
        cores_per_run=int(
            choice("CORES_PER_RUN", "1", "[1-9][0-9]{0,3}", "a whole number of CPU cores")
        ),
    )


# --- What a device does best -------------------------------------------------------------------


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


def images_at_once(device: torch.device, height: int, width: int, most: int) -> int:
    """Return how many images to send through a network at a time where it makes no difference.

    That is `most`, but on a CPU as many as its cache holds the layers of: 64 of 32 x 32 pixels, and
    at least 4. (A ResNet-50 of width 0.25 on two cores: 932 images/s so, 190 in batches of 500.)
    """
    pixels = height * width
    budget = 2**16 if pixels <= 64 * 64 else 2**18  # of large images networks first make small ones
    return min(most, max(4, budget // pixels)) if device.type == "cpu" else most


# --- Files -------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or all of the new, never a part.

    Raises OSError, naming the file and the remedy, if it can't be written; the old content stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder may be a file
            temporary.unlink()
        advice = "Free disk space, make the folder writable, or set RUNS_DIR and ANALYSIS_DIR"
        raise OSError(
            error.errno, f"{path} can't be written ({error.strerror}). {advice} to other ones"
        ) from error
