"""One training run, from a fresh network to trained weights.

`train_epoch` is the loop over batches: a forward and a backward pass in mixed precision and a step
of the optimizer. `train` calls it for every epoch, validates, stops early if wanted, and writes a
checkpoint from which a killed run goes on bit for bit.

What makes it fast is named where it happens: channels_last, autocast, a fused optimizer, no
synchronisation inside an epoch, and on CUDA a network compiled once into CUDA graphs.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import hashlib
import io
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.config import compute_dtype, memory_format, write_atomically
from helpers.data import Dataset
from helpers.evaluation import predict
from helpers.loader import Loader
from helpers.numerics import faulty_layer
from helpers.recipes import Recipe, learning_rate_at


def parameter_groups(model: nn.Module, rate_factor: float) -> list[dict[str, Any]]:
    """Return the trainable parameters of each part of a network, the last part first.

    A part is a child module that has parameters; "scale" is what its learning rate is multiplied
    by: 1 for the last, `rate_factor` for the one before, its square for the next.
    """
    parts = [list(child.parameters()) for child in model.children()]
    groups = [
        {"params": [p for p in part if p.requires_grad], "scale": rate_factor**distance}
        for distance, part in enumerate(reversed([part for part in parts if part]))
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module, recipe: Recipe, rate_factor: float = 1.0
) -> torch.optim.Optimizer:
    """Return the recipe's optimizer of all trainable parameters.

    With a `rate_factor` below 1 each part of the network learns more slowly than the one after it
    (`parameter_groups`). On CUDA it is fused, one kernel for all parameters, that float16's scaler
    doesn't wait for.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    parameters = trainable if rate_factor == 1 else parameter_groups(model, rate_factor)
    options = {"lr": recipe.peak_learning_rate, "weight_decay": recipe.weight_decay}
    options["fused"] = trainable[0].is_cuda
    if recipe.optimizer == "sgd":
        options |= {"momentum": recipe.momentum, "nesterov": recipe.nesterov}
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizer = kinds[recipe.optimizer](parameters, **options)
    if options["fused"] and recipe.optimizer == "sgd" and recipe.momentum:
        # Else it stays unwritten memory when the scaler leaves out the first step.
        for parameter in trainable:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite."""


class OutOfMemory(RuntimeError):
    """The device's memory doesn't hold the network with this batch size."""


# How torch says so: on CUDA and MPS, for cuDNN and cuBLAS, on a CPU under Linux and Windows.
MEMORY_RAN_OUT = re.compile("out of memory|ALLOC_FAILED|can't allocate memory|not enough memory")


@dataclass(frozen=True)
class EpochRecord:
    """One epoch. Training figures are running means under augmentation and dropout.

    Losses are in nats, accuracies in [0, 1]; `learning_rate` is the epoch's last; `seconds` is
    wall-clock time with validation, and the only field that differs when a run is repeated.
    """

    epoch: int
    learning_rate: float
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float


STATEFUL = ("model", "optimizer", "scaler")


@dataclass
class State:
    """What a run has come to; with torch's generators, all that a checkpoint holds.

    `best_epoch` has the lowest validation loss, `best` its weights if training may stop early.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dtype: torch.dtype
    history: list[EpochRecord]
    best_epoch: int = 0
    best: dict[str, Tensor] | None = None

    @property
    def arithmetic(self) -> str:
        """The type of device and the number format, as "cuda, torch.float16"."""
        device = next(self.model.parameters()).device
        return f"{device.type}, {self.dtype}"

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically: the SHA-256 of the rest, then torch.save."""
        content = {name: getattr(self, name).state_dict() for name in STATEFUL}
        content |= {"best": self.best, "best_epoch": self.best_epoch, "cpu": torch.get_rng_state()}
        content |= {"history": list(map(asdict, self.history)), "arithmetic": self.arithmetic}
        if (device := next(self.model.parameters()).device).type == "cuda":
            content["cuda"] = torch.cuda.get_rng_state(device)
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(path, hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; nothing in it is executed.

        One of another arithmetic is left aside, with a warning: the bits would be others. Raises
        ValueError for one that is damaged or of another network.
        """
        stored = path.read_bytes()
        try:
            if hashlib.sha256(stored[32:]).digest() != stored[:32]:
                raise ValueError("its checksum doesn't fit its bytes")
            content = torch.load(io.BytesIO(stored[32:]), map_location="cpu", weights_only=True)
            now = self.arithmetic
            if (then := content.get("arithmetic", now)) != now:  # older checkpoints don't say
                warnings.warn(
                    f"{path} was computed in {then}, now it is {now}: begun anew", stacklevel=2
                )
                return
            for name in STATEFUL:
                getattr(self, name).load_state_dict(content[name])
            self.history = [EpochRecord(**record) for record in content["history"]]
            self.best, self.best_epoch = content["best"], content["best_epoch"]
            torch.set_rng_state(content["cpu"])
            if "cuda" in content:
                torch.cuda.set_rng_state(content["cuda"], next(self.model.parameters()).device)
        except Exception as error:  # code in a pickle, or whatever else isn't a checkpoint
            raise ValueError(
                f"{path} can't be used ({error}). Delete it to train this run from the start."
            ) from error


# Where compiling pays: on a CPU a short run doesn't win back the minute that it takes.
COMPILED_DEVICES = ("cuda",)
_compiled: list[tuple] = []  # what was compiled last: structure, images' shape, format
Forward = Callable[[Tensor], Tensor]
CPU = torch.device("cpu")


def trusted_dtype(model: nn.Module, loader: Loader) -> torch.dtype:
    """Return a device's `compute_dtype` if its kernels are right for a network, else float32."""
    dtype = compute_dtype(loader.device)
    if dtype == torch.float32:
        return dtype
    images, labels = next(loader.batches(0))
    layer = faulty_layer(model, images, lambda logits: F.cross_entropy(logits, labels), dtype)
    if layer is None:
        return dtype
    warnings.warn(
        f"{dtype} is wrong here in layer {layer!r}: training in float32, slower but right",
        stacklevel=2,
    )
    return torch.float32


def mixed_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which a device multiplies in a format."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compiled(model: nn.Module, loader: Loader, dtype: torch.dtype) -> Forward:
    """Return the compiled forward pass of a network, or where that fails, warn and return it as is.

    Small networks are bound by kernel launches; mode "reduce-overhead" replays them as CUDA graphs,
    of fixed sizes (`dynamic=False`). Compiling takes up to a minute. The same structure with other
    weights reuses it; for another it is given up first, since graphs keep their memory and torch
    stops at eight. It compiles in the first step and then records: three are tried, then undone.
    """
    images, _ = next(loader.batches(0))
    if _compiled != (key := [(str(model), images.shape, dtype)]):
        torch.compiler.reset()
        _compiled[:] = key
    fast = torch.compile(model, mode="reduce-overhead", dynamic=False)
    before = copy.deepcopy(model.state_dict())

    def forward(images: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return fast(images)

    set_training_mode(model)
    try:
        with repeatable(loader.device, loader.seed):
            for _ in range(3):
                model.zero_grad()  # CUDA graphs free a step's gradients with the step
                with mixed_precision(loader.device, dtype):
                    logits = forward(images)
                logits.float().sum().backward()
        return forward
    except Exception as error:
        if MEMORY_RAN_OUT.search(str(error)):
            raise
        warnings.warn(f"not compiled, so slower: torch.compile failed ({error})", stacklevel=2)
        return model
    finally:
        model.load_state_dict(before)
        model.zero_grad()


def keep_memory() -> None:
    """Have the C library keep freed memory: glibc gets pages anew for large tensors in every step.

    It holds for the rest of the process. Without glibc nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped apart
        library.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap isn't made smaller


def set_training_mode(model: nn.Module) -> None:
    """Put a network in training mode, but for batch norms whose parameters are frozen.

    In training mode these would go on to follow the statistics of each batch.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()


def train_epoch(
    state: State, forward: Forward, loader: Loader, recipe: Recipe, epoch: int, steps: int
) -> tuple[float, float]:
    """Train on each batch of an epoch (from 0); return mean loss (nats) and accuracy.

    `forward` is the network or its compiled form; `steps` counts those of all epochs.
    """
    exact = torch.float64 if loader.device.type != "mps" else torch.float32
    # Summed up on the device, so that the host never waits for it inside an epoch.
    loss_sum, correct = torch.zeros(2, dtype=exact, device=loader.device)
    set_training_mode(state.model)
    for step, (images, labels) in enumerate(loader.batches(epoch), epoch * len(loader)):
        rate = learning_rate_at(recipe, step, steps)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        with mixed_precision(loader.device, state.dtype):
            logits = forward(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        # Of a mixed image (mixup) the class with the larger share counts as the right one.
        classes = labels if labels.ndim == 1 else labels.argmax(1)
        loss_sum += loss.detach()
        correct += (logits.detach().argmax(1) == classes).sum()
    return float(loss_sum) / len(loader), float(correct) / (len(loader) * loader.batch_size)


def train_and_validate(
    state: State, forward: Forward, loader: Loader, dataset: Dataset, recipe: Recipe, epochs: int
) -> EpochRecord:
    """Train one more epoch of `epochs`, validate, and keep what came of it in the state."""
    begun, epoch, steps = time.perf_counter(), len(state.history), epochs * len(loader)
    train_loss, train_accuracy = train_epoch(state, forward, loader, recipe, epoch, steps)
    split = dataset.validation
    logits = predict(state.model, split, loader.mean, loader.std, dtype=state.dtype)
    seconds = time.perf_counter() - begun  # the logits are on the CPU: the device has finished
    loss = float(F.cross_entropy(logits, split.labels))
    accuracy = float((logits.argmax(1) == split.labels).double().mean())
    rate = learning_rate_at(recipe, (epoch + 1) * len(loader) - 1, steps)
    for what, value in (("training", train_loss), ("validation", loss)):
        if not math.isfinite(value):
            raise TrainingDiverged(
                f"the {what} loss stopped being finite in epoch {epoch + 1}, which ended at "
                f"learning rate {rate:.3g}. Lower the learning rate (recipe {recipe.name!r}: "
                f"{recipe.learning_rate:.3g}), or check the data for wrong values."
            )
    if loss < min((record.validation_loss for record in state.history), default=math.inf):
        state.best_epoch = epoch + 1
    state.history.append(
        EpochRecord(epoch + 1, rate, train_loss, train_accuracy, loss, accuracy, seconds)
    )
    return state.history[-1]


def train(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    epochs: int,
    seed: int,
    patience: int | None = None,
    rate_factor: float = 1.0,
    device: torch.device = CPU,
    folder: Path | None = None,
    checkpoint_seconds: float = 30.0,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> State:
    """Train a network in place on a dataset's training split; the test split isn't touched.

    With `patience`, training stops when the validation loss hasn't fallen for that many epochs,
    and the network gets the weights of the best epoch (Prechelt, 1998). `rate_factor` is that of
    `make_optimizer`. In a `folder`, history.csv is written after each epoch and resume.pt, from
    which the run goes on if it is there, at most every `checkpoint_seconds`. On the same CPU
    and software weights and history are the same bit for bit, however often it was cut off.

    Raises ValueError for a batch larger than the training split or a resume.pt that can't be used,
    TrainingDiverged when the loss isn't finite, and OutOfMemory.
    """
    if recipe.batch_size > (most := len(dataset.train)):
        raise ValueError(f"batch_size is {recipe.batch_size}; expected at most {most}, all images")
    keep_memory()
    model.to(device, memory_format=memory_format(device))
    seen = (*dataset.channel_statistics, recipe.batch_size, recipe.augmentation, dataset.flippable)
    loader = Loader(dataset.train, *seen, seed, device)
    checkpoint, saved = folder and folder / "resume.pt", time.monotonic()
    with repeatable(device, seed), explained_out_of_memory(model, recipe, dataset):
        dtype = trusted_dtype(model, loader)
        # float16's small range needs a scaled loss; bfloat16 and float32 don't.
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        state = State(model, make_optimizer(model, recipe, rate_factor), scaler, dtype, [])
        forward = compiled(model, loader, dtype) if device.type in COMPILED_DEVICES else model
        if checkpoint and checkpoint.exists():
            state.load(checkpoint)
        while (epoch := len(state.history)) < epochs:
            if patience is not None and epoch - state.best_epoch >= patience:
                break
            record = train_and_validate(state, forward, loader, dataset, recipe, epochs)
            if patience is not None and state.best_epoch == record.epoch:
                state.best = copy.deepcopy(model.state_dict())
            if folder:
                table = pd.DataFrame(state.history).to_csv(index=False)
                write_atomically(folder / "history.csv", table.encode())
            if checkpoint and time.monotonic() - saved >= checkpoint_seconds:
                state.save(checkpoint)
                saved = time.monotonic()
            if on_epoch:
                on_epoch(record)
    if patience is not None:
        model.load_state_dict(state.best)
    return state


@contextlib.contextmanager
def repeatable(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators, from which dropout draws, and choose kernels that repeat.

    Torch warns of operations that have none. All is put back afterwards.
    """
    exact = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": True}
    before = torch.get_deterministic_debug_mode()
    filling, fills = torch.utils.deterministic, torch.utils.deterministic.fill_uninitialized_memory
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.backends.cudnn.flags(**exact),
    ):
        torch.set_deterministic_debug_mode("warn")
        filling.fill_uninitialized_memory = False  # which takes time, and is for finding faults
        torch.manual_seed(seed)
        try:
            yield
        finally:
            torch.set_deterministic_debug_mode(before)
            filling.fill_uninitialized_memory = fills


@contextlib.contextmanager
def explained_out_of_memory(model: nn.Module, recipe: Recipe, dataset: Dataset) -> Iterator[None]:
    """Raise OutOfMemory, with advice, where torch says that memory ran out."""
    try:
        yield
    except RuntimeError as error:
        if not MEMORY_RAN_OUT.search(str(error)):
            raise
        parameters = sum(p.numel() for p in model.parameters())
        raise OutOfMemory(
            f"memory ran out training {type(model).__name__} ({parameters:,} parameters) with "
            f"batch_size {recipe.batch_size} on {dataset.image_size}-pixel images. Set the "
            f"variable BATCH_SIZE={max(1, recipe.batch_size // 2)}, or lower width or image_size."
        ) from error
