"""Profiles, paths and the device: every choice that comes from outside, read once.

This is the only module that reads the environment. A study is decided by

    PROFILE      how much work: smoke (tests), quick (default, minutes on a laptop), long (a night
                 or two on a laptop) or full (a CUDA GPU)
    DATASET      what on: a name from `helpers.data.DATASETS` or the path of a folder of images
    BATCH_SIZE   the most images in a batch, where memory doesn't hold the profile's

and by RUNS_DIR, DATA_DIR, ANALYSIS_DIR, DEVICE (auto, cpu, cuda or mps) and PROGRESS. EXECUTOR says
whether runs are trained one after the other (local) or several at a time, on CORES_PER_RUN cores
each (processes, as on a CPU if nothing is said, or ray). PUBLISH=yes writes every run that is read
into the study's set as well.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from joblib import cpu_count
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

ROOT = Path(__file__).resolve().parent.parent

# That CUDA's kernels repeat bit for bit has to be said before CUDA or torch's compiler are used, in
# every process that trains.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")

Settings = TypeVar("Settings")
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def settings(cls: type[Settings]) -> type[Settings]:
    """Make a class a frozen dataclass whose values pydantic checks strictly, else ValueError."""
    checked = pydantic_dataclass(frozen=True, config=STRICT)(cls)
    make = checked.__init__

    @functools.wraps(make)
    def init(self: Settings, *values: Any, **named: Any) -> None:
        try:
            make(self, *values, **named)
        except ValidationError as error:
            raise ValueError(readable(cls, error)) from None
        finally:
            checked.__init__ = init  # pydantic puts its own back once a later class is known

    checked.__init__ = init
    return checked


def readable(cls: type, error: ValidationError) -> str:
    """Return a line that says of each setting what was found and what is expected."""
    names, said = dict(enumerate(cls.__dataclass_fields__)), []
    for part in error.errors(include_url=False):
        first, *inner = part["loc"] or ("",)
        name = ".".join(n for n in map(str, (names.get(first, first), *inner)) if n.isidentifier())
        found = f" is {' '.join(repr(part['input'])[:60].split())}: " if name else ""
        message = part["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        said.append(f"{name} is missing" if part["type"] == "missing" else name + found + message)
    return f"{cls.__name__}: {'; '.join(said)}"


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
    """One study: a profile on a dataset, the folders it uses, the device and the executor."""

    profile: Profile
    dataset: str
    runs_dir: Path
    data_dir: Path
    analysis_dir: Path
    device: torch.device
    progress: str = "bar"  # or "none", or "file:PATH", see `helpers.executors`
    executor: str = "local"
    cores_per_run: int = 1
    publish: bool = False  # whether runs are also written to the set's runs/

    @property
    def set_name(self) -> str:
        """Name of this study's folder under analysis/."""
        return f"{dataset_slug(self.dataset)}-{self.profile.name}"

    @property
    def folder(self) -> Path:
        """Where this study's set lies: figures/, results/, notebooks/, computed/ and runs/."""
        return self.analysis_dir / self.set_name


def dataset_slug(dataset: str) -> str:
    """Return a name fit for files: a dataset's own name, or the last part of a folder's path."""
    name = Path(os.path.expanduser(dataset)).resolve().name if is_path(dataset) else dataset
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return slug or "folder"


def is_path(dataset: str) -> bool:
    """Tell a folder of images (with a path separator or a tilde, or "." or "..") from a name."""
    if re.match(r"[\w-]{2,}:", dataset):  # with classes, as fashion-mnist:Bag,T-shirt/top
        return False
    return any(mark in dataset for mark in ("/", os.sep, "~")) or dataset in (".", "..")


def nvidia_gpu() -> str:
    """Return an NVIDIA GPU and its driver, as "Tesla T4, 535.104.05", or "" if none is here."""
    query = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.check_output(query, text=True, stderr=subprocess.DEVNULL, timeout=60)
        return said.partition("\n")[0]
    return "/dev/nvidia0" if Path("/dev/nvidia0").exists() else ""


def choose_device(wanted: str = "auto") -> torch.device:
    """Return the device to train on, once it has multiplied two matrices, else ValueError.

    "auto" is an NVIDIA GPU if the machine has one, else the CPU; Apple's (mps) was never tried.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() or nvidia_gpu() else "cpu"
    try:
        matrix = torch.ones(8, 8, device=wanted)
        (matrix @ matrix).sum().item()
        return matrix.device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"DEVICE={wanted!r} can't be used ({reason}); use auto, cpu, cuda or mps. DEVICE=cpu "
            f"always works. NVIDIA GPU and driver: {nvidia_gpu() or 'none'}, torch "
            f"{torch.__version__} for CUDA {torch.version.cuda}: for cuda update the driver, or "
            "install a torch for an older one, pip install torch torchvision --index-url "
            "https://download.pytorch.org/whl/cu126"
        ) from None


@functools.lru_cache(maxsize=1)
def study() -> Study:
    """Return the study that the environment asks for (read once a process), else ValueError."""

    def choice(variable: str, default: str, pattern: str, expected: str) -> str:
        value = os.environ.get(variable) or default
        if not re.fullmatch(pattern, value):
            raise ValueError(f"{variable}={value!r} is unknown; use {expected}")
        return value

    def count(variable: str, default: int, of: str) -> int:
        return int(choice(variable, str(default), "[1-9][0-9]{0,5}", f"a whole number of {of}"))

    def folder(variable: str, default: str) -> Path:
        return Path(os.path.expanduser(os.environ.get(variable) or ROOT / default)).resolve()

    name = choice("PROFILE", "quick", "|".join(PROFILES), f"one of {', '.join(PROFILES)}")
    profile, device = PROFILES[name], os.environ.get("DEVICE") or "auto"
    most = count("BATCH_SIZE", profile.batch_size, "images")
    # On a CPU the full study would take weeks: who wants that has to say DEVICE=cpu.
    device = choose_device("cuda" if (name, device) == ("full", "auto") else device)
    # Runs that take seconds aren't worth the start of processes; a GPU trains one at a time.
    executor = "processes" if device.type == "cpu" and name != "smoke" else "local"
    return Study(
        profile=replace(profile, batch_size=min(most, profile.batch_size)),
        dataset=os.environ.get("DATASET") or profile.default_dataset,
        runs_dir=folder("RUNS_DIR", "runs"),
        data_dir=folder("DATA_DIR", "data"),
        analysis_dir=folder("ANALYSIS_DIR", "analysis"),
        device=device,
        progress=choice("PROGRESS", "bar", "bar|none|file:.+", "bar, none or file:PATH"),
        executor=choice("EXECUTOR", executor, "local|processes|ray", "local, processes or ray"),
        cores_per_run=count("CORES_PER_RUN", -(-cpu_count() // 4), "CPU cores"),
        publish=choice("PUBLISH", "no", "no|yes", "yes or no") == "yes",
    )


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return the number format in which a device trains fastest.

    CUDA: bfloat16 from compute capability 8.0 on, float16 before (a Colab T4). CPU: bfloat16 where
    the processor has instructions for it (AVX512-BF16 or AMX), else float32, as anywhere else.
    """
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if modern else torch.float16
    # torch tells what the processor has only under private names, which may go.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, check, bool)() for check in checks)
    return torch.bfloat16 if device.type == "cpu" and native else torch.float32


def images_at_once(device: torch.device, height: int, width: int, most: int) -> int:
    """Return how many images to send through a network at a time: `most`, on a CPU fewer.

    As many as its cache holds the layers of, at least 4. (A ResNet-50 of width 0.25 on two cores:
    932 images/s of 32 x 32 pixels with 64 at a time, 190 with 500.)
    """
    pixels = height * width
    budget = 2**16 if pixels <= 64 * 64 else 2**18  # of large images networks first make small ones
    return min(most, max(4, budget // pixels)) if device.type == "cpu" else most


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the order of images and weights in memory: all channels of a pixel together.

    Not on Apple's GPUs, whose kernels are made for the order N x C x H x W.
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or all of the new; else OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder may be a file
            temporary.unlink()
        advice = "Free disk space, make the folder writable, or set RUNS_DIR and ANALYSIS_DIR"
        said = f"{path} can't be written ({error.strerror}). {advice} to other ones"
        raise OSError(error.errno, said) from error
