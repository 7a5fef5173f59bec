"""One training run, from a fresh network to trained weights.

`train` is the loop: batches from the resident loader, a forward and a backward pass in mixed
precision, a step of the optimizer, validation after every epoch, early stopping, and checkpoints
from which a killed run goes on bit for bit. A `Recipe` says how to train; four are published with
names (RECIPES).

What makes it fast is named where it happens: channels_last, autocast, a fused optimizer, no
synchronisation inside an epoch, and on CUDA a network compiled once into CUDA graphs.

Several processes can train one network together, each on its share of every batch:

    torchrun --nproc-per-node=4 -m helpers.training RUN.json
"""

from __future__ import annotations

import argparse
import copy
import csv
import hashlib
import io
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from helpers.config import as_float, check, compute_dtype, is_whole
from helpers.data import NO_AUGMENTATION, Augmentation, Dataset, make_loader
from helpers.evaluation import predict

# --- Recipes -----------------------------------------------------------------------------------

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "step", "triangular", "onecycle")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, apart from for how long.

    `learning_rate` is the highest of the schedule. With `reference_batch_size` it is meant for
    that batch size and scales with the square root of the batch's share of it, which keeps the
    variance of a step (Hoffer et al., NIPS 2017). `momentum` and `nesterov` are SGD's. `epochs` is
    the length that the protocol is known with.

    Raises ValueError for a setting outside what is allowed.
    """

    name: str
    optimizer: str
    learning_rate: float
    schedule: str
    batch_size: int
    epochs: int
    reference_batch_size: int | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    augmentation: Augmentation = field(default=NO_AUGMENTATION)

    def __post_init__(self) -> None:
        name = self.name
        path = not isinstance(name, str) or not name or "/" in name or "\\" in name
        check("name", name, not path, "text without slashes (it names the run's folder)")
        for field_name in ("learning_rate", "momentum", "weight_decay", "label_smoothing"):
            value = as_float(field_name, getattr(self, field_name))
            object.__setattr__(self, field_name, value)
        check("optimizer", self.optimizer, self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS))
        check("schedule", self.schedule, self.schedule in SCHEDULES, " or ".join(SCHEDULES))
        rate = self.learning_rate
        check("learning_rate", rate, 0 < rate < math.inf, "a positive number")
        check("batch_size", self.batch_size, is_whole(self.batch_size), "a positive whole number")
        check("epochs", self.epochs, is_whole(self.epochs), "a positive whole number")
        check("momentum", self.momentum, 0 <= self.momentum < 1, "0 to below 1")
        check("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")
        smoothing = self.label_smoothing
        check("label_smoothing", smoothing, 0 <= smoothing < 1, "0 to below 1")
        reference = self.reference_batch_size
        allowed = reference is None or is_whole(reference)
        check("reference_batch_size", reference, allowed, "a positive whole number, or None")
        check("nesterov", self.nesterov, isinstance(self.nesterov, bool), "True or False")
        is_augmentation = isinstance(self.augmentation, Augmentation)
        check("augmentation", self.augmentation, is_augmentation, "an Augmentation")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov is True with momentum 0; set a momentum, or nesterov=False")

    @property
    def peak_learning_rate(self) -> float:
        """The highest learning rate, after scaling with the batch size."""
        share = self.batch_size / (self.reference_batch_size or self.batch_size)
        return self.learning_rate * math.sqrt(share)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # As many tutorials do it: five epochs of Adam, nothing else.
        Recipe("adam", "adam", 1e-3, "constant", batch_size=64, epochs=5),
        # Smith and Topin, "Super-Convergence" (2018), with torch's OneCycleLR shape.
        Recipe(
            "onecycle",
            "sgd",
            0.1,
            "onecycle",
            batch_size=128,
            epochs=30,
            weight_decay=5e-4,
            augmentation=Augmentation(flip=True, crop_padding=4),
        ),
        # He et al. (2016), section 4.2: divide by 10 at half and three quarters of 64,000 steps.
        Recipe(
            "textbook",
            "sgd",
            0.1,
            "step",
            batch_size=128,
            epochs=164,
            weight_decay=1e-4,
            augmentation=Augmentation(flip=True, crop_padding=4),
        ),
        # A standard ResNet-18 reaches 95 % on CIFAR-10 with these settings in 80 epochs.
        Recipe(
            "fast",
            "sgd",
            0.2,
            "triangular",
            batch_size=512,
            epochs=80,
            reference_batch_size=500,
            nesterov=True,
            weight_decay=5e-4,
            augmentation=Augmentation(flip=True, crop_padding=4, cutout=12),
        ),
    )
}


def learning_rate_at(recipe: Recipe, step: int, steps: int) -> float:
    """Return the learning rate of a step (from 0) of `steps`: the schedule has no other state.

    constant    the peak throughout
    step        the peak; a tenth from half of the steps on; a hundredth from three quarters on
    triangular  rises in a straight line over the first fifth, then falls in one to 0
    onecycle    torch's OneCycleLR: cosine from 1/25 up over 30 %, cosine down to 1/250,000
    """
    peak = recipe.peak_learning_rate
    if recipe.schedule == "constant":
        return peak
    if recipe.schedule == "step":
        return peak * 0.1 ** ((step >= 0.5 * steps) + (step >= 0.75 * steps))
    if recipe.schedule == "triangular":
        rise = max(1, 0.2 * steps)
        return peak * min((step + 1) / rise, (steps - step) / max(1, steps - rise))

    def cosine(start: float, end: float, share: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))

    top = 0.3 * steps - 1
    if step <= top:
        return cosine(peak / 25, peak, step / top)
    return cosine(peak, peak / 25e4, (step - top) / max(1, steps - 1 - top))


def parameter_groups(model: nn.Module, rate_factor: float) -> list[dict[str, Any]]:
    """Return the trainable parameters of each part of a network, the last part first.

    A part is a child module that has parameters; "scale" is what its learning rate is multiplied
    by: 1 for the last, `rate_factor` for the one before, its square for the next.
    """
    parts = [
        [p for p in child.parameters() if p.requires_grad]
        for child in model.children()
        if next(child.parameters(), None) is not None
    ]
    groups = [
        {"params": part, "scale": rate_factor**distance}
        for distance, part in enumerate(reversed(parts))
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    model: nn.Module, recipe: Recipe, rate_factor: float = 1.0
) -> torch.optim.Optimizer:
    """Return the recipe's optimizer of all trainable parameters.

    Fused on CUDA: one kernel updates all parameters. With a `rate_factor` below 1 each part of the
    network learns more slowly than the one after it (`parameter_groups`).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    parameters = trainable if rate_factor == 1 else parameter_groups(model, rate_factor)
    common = {"lr": recipe.peak_learning_rate, "weight_decay": recipe.weight_decay}
    common["fused"] = trainable[0].is_cuda
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, momentum=recipe.momentum, nesterov=recipe.nesterov, **common
        )
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, **common)


# --- Files -------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or all of the new, never a part.

    Raises OSError, naming the file and the remedy, if it can't be written; the old content stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{path} can't be written ({error.strerror}). Free disk space or make the folder "
            "writable, or set RUNS_DIR and ANALYSIS_DIR to other ones, and run again: nothing "
            "finished is lost",
        ) from error


CHECKPOINT_FORMAT = b"resnet-study checkpoint 2\n"


class CheckpointError(RuntimeError):
    """A checkpoint that can't be used; the message names the file and the remedy."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically: a format line, the SHA-256 of the rest, then torch.save."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    write_atomically(path, CHECKPOINT_FORMAT + hashlib.sha256(payload).digest() + payload)


def load_checkpoint(path: Path, identity: str) -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Raises CheckpointError if it's of another format, damaged, or of another run than `identity`.
    """
    remedy = f"Delete {path} to train this run from the start."
    content = path.read_bytes()
    start = len(CHECKPOINT_FORMAT)
    if content[:start] != CHECKPOINT_FORMAT:
        found = content[:start].split(b"\n")[0][:40]
        raise CheckpointError(
            f"{path} begins with {found!r}, expected {CHECKPOINT_FORMAT.strip()!r}: it's of "
            f"another version or no checkpoint. {remedy}"
        )
    payload = content[start + 32 :]
    if hashlib.sha256(payload).digest() != content[start : start + 32]:
        raise CheckpointError(f"{path} is damaged: its checksum doesn't fit its bytes. {remedy}")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        found = state["identity"]
    except Exception as error:  # code in a pickle, or whatever else isn't a checkpoint's state
        raise CheckpointError(f"{path} isn't a checkpoint ({error}). {remedy}") from error
    if found != identity:
        raise CheckpointError(f"{path} belongs to the run {found}, expected {identity}. {remedy}")
    return state


# --- Training ----------------------------------------------------------------------------------


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite."""


class OutOfMemory(RuntimeError):
    """The device's memory doesn't hold the network with this batch size."""


# How torch says so: on CUDA and MPS, on a CPU under Linux, and on one under Windows.
OUT_OF_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


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


@dataclass(frozen=True)
class Progress:
    """What `train` reports while it runs: loss and accuracy are those of the epoch so far."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    images_per_second: float


@dataclass(frozen=True)
class Trained:
    """What `train` returns: the history, which epoch's weights the network has, and the time.

    `best_epoch` is the epoch with the lowest validation loss. `stopped_early` says whether
    patience ran out before the last epoch; with patience, the weights are the best epoch's.
    """

    history: tuple[EpochRecord, ...]
    best_epoch: int
    stopped_early: bool
    seconds: float


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list, so that a loop can write checkpoints first.

    A notebook's interrupt button sends SIGINT. A second SIGINT interrupts at once. Handlers can
    be set from the main thread only; elsewhere nothing is collected.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(number: int) -> NoReturn:
    """Leave after a signal, as the signal would have without a handler."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _generator_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_generators(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


# Processes that train together agree this often on checkpoints and on stopping: it waits for the
# device and the network.
STEPS_BETWEEN_AGREEMENTS = 10


def process_rank() -> tuple[int, int]:
    """Return this process's number and how many train together: (0, 1) if it trains alone."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


# Where compiling pays: on a CPU it gains nothing and costs up to a minute.
COMPILED_DEVICES = ("cuda",)

# Compiled networks by structure, so that another seed of a network doesn't compile it again.
_compiled: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {}


def _compile_once(model: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return a copy of `model` and the copy's compiled forward pass.

    Small networks are bound by kernel launches; mode "reduce-overhead" replays them as CUDA
    graphs. Compiling takes up to a minute, so a network of the same structure is reused with its
    weights reset. Only the latest structure is kept, since the graphs hold memory.
    """
    structure = _structure(model)
    if structure not in _compiled:
        _compiled.clear()
        torch.compiler.reset()
        twin = copy.deepcopy(model)  # the caller's own network stays out of later runs
        try:
            _compiled[structure] = (twin, torch.compile(twin, mode="reduce-overhead"))
        except Exception as error:
            _give_up_compiling(structure, twin, error)
    twin, forward = _compiled[structure]
    twin.load_state_dict(model.state_dict())
    return twin, forward


def _structure(model: nn.Module) -> str:
    """Return what a compiled network depends on: its layers, and what is trained or masked."""
    trained = [(name, p.requires_grad) for name, p in model.named_parameters()]
    return f"{model!r}{trained}{[name for name, _ in model.named_buffers()]}"


def _give_up_compiling(structure: str, model: nn.Module, error: Exception) -> None:
    """Warn, and let later runs of this network go on without compiling, too."""
    warnings.warn(
        f"torch.compile failed ({type(error).__name__}: {error}); training goes on without it, "
        "correct but slower",
        stacklevel=3,
    )
    _compiled[structure] = (model, model)


def train(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    epochs: int,
    seed: int,
    patience: int | None = None,
    rate_factor: float = 1.0,
    device: torch.device | None = None,
    folder: Path | None = None,
    identity: str = "",
    checkpoint_seconds: float = 30.0,
    on_progress: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> Trained:
    """Train a network in place on a dataset's training split.

    With `patience`, training stops when the validation loss hasn't fallen for that many epochs,
    and the network gets the weights of the best epoch (Prechelt, 1998). The test split isn't
    touched. Parameters that require no gradient stay as they are, and so do the statistics of a
    batch norm whose parameters don't. For `rate_factor` see `make_optimizer`.

    With a `folder`, resume.pt is written there every `checkpoint_seconds` and at the end of each
    epoch (unless one was written within a tenth of that time), and history.csv after each epoch;
    if resume.pt is there, and of this `identity`, the run goes on from it. SIGINT (Ctrl-C, a
    notebook's interrupt button) and SIGTERM write a checkpoint and then end the run.

    If torch.distributed is initialised, its processes train the network together: each takes its
    share of every batch, gradients are averaged, and the first process validates and writes the
    checkpoints. Batch norm uses the statistics of a process's own share; its running statistics
    are the first process's. Dropout differs between processes. Nothing is compiled.

    On the same machine and software, weights and history are the same bit for bit (but for
    seconds), however often the run was cut off. The state of torch's global generators is put
    back afterwards.

    Raises ValueError for a batch larger than the training split, or one that the processes can't
    share equally, TrainingDiverged when the loss isn't finite, OutOfMemory, and CheckpointError
    for a resume.pt that can't be used.
    """
    device = device or torch.device("cpu")
    check("epochs", epochs, is_whole(epochs), "a positive whole number")
    allowed = patience is None or is_whole(patience)
    check("patience", patience, allowed, "a positive whole number of epochs, or None")
    if recipe.batch_size > len(dataset.train):
        raise ValueError(
            f"batch_size is {recipe.batch_size}, but there are {len(dataset.train)} training "
            "images; use a smaller batch or more images"
        )
    generators = [device] if device.type == "cuda" else []
    cudnn = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=True
    )
    with torch.random.fork_rng(devices=generators), cudnn, stop_signals() as stop:
        loop = _Loop(
            model, dataset, recipe, epochs, seed, patience, rate_factor, device, folder, identity
        )
        try:
            return loop.run(checkpoint_seconds, on_progress, on_epoch, stop)
        except RuntimeError as error:
            if any(sign in str(error) for sign in OUT_OF_MEMORY_SIGNS):
                raise OutOfMemory(
                    f"{device} ran out of memory training {type(model).__name__} "
                    f"({sum(p.numel() for p in model.parameters()):,} parameters) with batch_size "
                    f"{recipe.batch_size} on {dataset.image_size}-pixel images. Lower batch_size, "
                    "then width or image_size."
                ) from error
            raise


class _Loop:
    """The state of one training run; all of it goes into a checkpoint."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        recipe: Recipe,
        epochs: int,
        seed: int,
        patience: int | None,
        rate_factor: float,
        device: torch.device,
        folder: Path | None,
        identity: str,
    ) -> None:
        self.dataset, self.recipe, self.device = dataset, recipe, device
        self.epochs, self.seed, self.patience = epochs, seed, patience
        self.folder, self.identity = folder, identity
        self.dtype = compute_dtype(device)
        # channels_last: convolutions read all channels of a pixel together.
        self.original = model.to(device, memory_format=torch.channels_last)
        self.model, self.forward = self.original, self.original
        self.rank, self.ranks = process_rank()
        self.compiled = device.type in COMPILED_DEVICES and self.ranks == 1
        if self.compiled:
            self.model, self.forward = _compile_once(self.original)
            self.compiled = self.forward is not self.model
        elif self.ranks > 1:
            device_ids = [device] if device.type == "cuda" else None
            self.forward = nn.parallel.DistributedDataParallel(self.original, device_ids)
        self.optimizer = make_optimizer(self.model, recipe, rate_factor)
        # float16's small range needs a scaled loss; bfloat16 and float32 don't.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.loader = make_loader(
            dataset,
            batch_size=recipe.batch_size,
            augmentation=recipe.augmentation,
            seed=seed,
            device=device,
            rank=self.rank,
            ranks=self.ranks,
        )
        self.epoch, self.step = 0, 0  # the next step to take
        self.sums = self._new_sums()
        self.history: list[EpochRecord] = []
        self.best: dict[str, Tensor] | None = None
        self.best_epoch, self.best_loss = 0, math.inf
        self.seconds, self.epoch_seconds = 0.0, 0.0

    def _new_sums(self) -> Tensor:
        """Return the epoch's sums, kept on the device: loss, correct, first step not finite.

        Of several processes each has its own; losses are divided by their number.
        """
        return torch.tensor(
            [0.0, 0.0, math.inf],
            dtype=torch.float64 if self.device.type != "mps" else torch.float32,
            device=self.device,
        )

    # The loop

    def run(
        self,
        checkpoint_seconds: float,
        on_progress: Callable[[Progress], None] | None,
        on_epoch: Callable[[EpochRecord], None] | None,
        stop: list[int],
    ) -> Trained:
        torch.manual_seed(self.seed + self.rank)  # dropout draws from torch's global generators
        if self.folder is not None and (self.folder / "resume.pt").exists():
            self._restore(load_checkpoint(self.folder / "resume.pt", self.identity))
        self._check_same_place()
        last_checkpoint = time.monotonic()
        while self.epoch < self.epochs and not self._out_of_patience():
            for _ in self._epoch_steps(on_progress):
                if self.ranks > 1 and self.step % STEPS_BETWEEN_AGREEMENTS:
                    continue
                due = time.monotonic() - last_checkpoint >= checkpoint_seconds
                due, signalled = self._agree(due, stop)
                if due or signalled:
                    self._save()
                    last_checkpoint = time.monotonic()
                if signalled:
                    leave(signalled)
            self._finish_epoch()
            if on_epoch:
                on_epoch(self.history[-1])
            due = time.monotonic() - last_checkpoint >= checkpoint_seconds / 10
            due, signalled = self._agree(due, stop)
            if due or signalled:
                self._save()
                last_checkpoint = time.monotonic()
            if signalled:
                leave(signalled)
        stopped_early = self.epoch < self.epochs
        if self.patience is not None and self.best is not None:
            self.model.load_state_dict(self.best)
        if self.model is not self.original:
            self.original.load_state_dict(self.model.state_dict())
        return Trained(tuple(self.history), self.best_epoch, stopped_early, self.seconds)

    def _agree(self, due: bool, stop: list[int]) -> tuple[bool, int]:
        """Return whether a checkpoint is due, and the signal to stop on (0: none).

        Processes that train together do both at the same step: the first one's clock decides, and
        a signal to any of them counts.
        """
        signalled = stop[0] if stop else 0
        if self.ranks == 1:
            return due, signalled
        told = torch.tensor([due and self.rank == 0, signalled], device=self.device)
        distributed.all_reduce(told, distributed.ReduceOp.MAX)
        due, signalled = told.tolist()
        return bool(due), signalled

    def _total(self) -> Tensor:
        """Return the epoch's sums over all processes."""
        total = self.sums.clone()
        if self.ranks > 1:
            distributed.all_reduce(total[:2], distributed.ReduceOp.SUM)
            distributed.all_reduce(total[2:], distributed.ReduceOp.MIN)
        return total

    def _epoch_steps(self, on_progress: Callable[[Progress], None] | None) -> Iterator[None]:
        """Train on the rest of the epoch, yielding after each step."""
        steps = len(self.loader)
        begun = reported = time.perf_counter()
        self._training_mode()
        for images, labels in self.loader.batches(self.epoch, self.step):
            self._train_step(images, labels, self.epoch * steps + self.step, self.epochs * steps)
            self.step += 1
            now = time.perf_counter()
            self.seconds += now - begun
            self.epoch_seconds += now - begun
            begun = now
            # Reading the sums waits for the device: twice a second on a CPU, never on a GPU.
            if on_progress and self.device.type == "cpu" and now - reported > 0.5:
                on_progress(self._progress())
                reported = now
            yield
            begun = time.perf_counter()  # writing a checkpoint isn't training
        if on_progress:
            on_progress(self._progress())

    def _training_mode(self) -> None:
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
                module.eval()

    def _train_step(self, images: Tensor, labels: Tensor, step: int, steps: int) -> None:
        """One step of gradient descent."""
        rate = learning_rate_at(self.recipe, step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = self._logits(images)
            loss = F.cross_entropy(
                logits.float(), labels, label_smoothing=self.recipe.label_smoothing
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            # The sums stay on the device, so that the host never waits for it inside an epoch.
            # Of a mixed image (mixup) the class with the larger share counts as the right one.
            classes = labels if labels.ndim == 1 else labels.argmax(1)
            correct = (logits.argmax(1) == classes).sum()
            bad = torch.where(torch.isfinite(loss), math.inf, float(self.step))
            self.sums[0] += loss / self.ranks
            self.sums[1] += correct
            self.sums[2] = torch.minimum(self.sums[2], bad.to(self.sums.dtype))

    def _logits(self, images: Tensor) -> Tensor:
        """Run the network; if its compiled form fails, warn once and go on without."""
        if not self.compiled:
            return self.forward(images)
        try:
            return self.forward(images)
        except Exception as error:
            if any(sign in str(error) for sign in OUT_OF_MEMORY_SIGNS):
                raise
            _give_up_compiling(_structure(self.original), self.model, error)
            self.forward, self.compiled = self.model, False
            return self.model(images)

    def _finish_epoch(self) -> None:
        """Validate, record the epoch, and remember the best weights."""
        begun = time.perf_counter()
        steps = len(self.loader)
        loss_sum, correct, bad_step = self._total().tolist()
        rate = learning_rate_at(self.recipe, (self.epoch + 1) * steps - 1, self.epochs * steps)
        if math.isfinite(bad_step):
            self._diverged("training", int(bad_step) + 1)
        logits = self._validate()
        labels = self.dataset.validation.labels
        validation_loss = float(F.cross_entropy(logits, labels))
        if not math.isfinite(validation_loss):
            self._diverged("validation", steps)
        spent = time.perf_counter() - begun
        self.seconds += spent
        seen = steps * self.recipe.batch_size
        self.history.append(
            EpochRecord(
                epoch=self.epoch + 1,
                learning_rate=rate,
                train_loss=loss_sum / steps,
                train_accuracy=correct / seen,
                validation_loss=validation_loss,
                validation_accuracy=float((logits.argmax(1) == labels).double().mean()),
                seconds=self.epoch_seconds + spent,
            )
        )
        if validation_loss < self.best_loss:
            self.best_loss, self.best_epoch = validation_loss, self.epoch + 1
            if self.patience is not None:
                state = self.model.state_dict()
                self.best = {name: value.detach().cpu().clone() for name, value in state.items()}
        self.epoch, self.step, self.epoch_seconds = self.epoch + 1, 0, 0.0
        self.sums = self._new_sums()
        if self.folder is not None and self.rank == 0:
            write_atomically(self.folder / "history.csv", history_csv(self.history))

    def _validate(self) -> Tensor:
        """Return the logits of the validation images; those of the first process for all."""
        if self.ranks > 1:
            for buffer in self.model.buffers():
                distributed.broadcast(buffer, 0)
        statistics = self.dataset.channel_statistics
        logits = predict(self.model, self.dataset.validation, *statistics, dtype=self.dtype)
        if self.ranks > 1:
            shared = logits.to(self.device)
            distributed.broadcast(shared, 0)
            logits = shared.cpu()
        return logits

    def _out_of_patience(self) -> bool:
        return self.patience is not None and self.epoch - self.best_epoch >= self.patience

    def _diverged(self, what: str, step: int) -> None:
        steps = len(self.loader)
        rate = learning_rate_at(self.recipe, self.epoch * steps + step - 1, self.epochs * steps)
        raise TrainingDiverged(
            f"the {what} loss stopped being finite in epoch {self.epoch + 1}, step {step} of "
            f"{steps}, at learning rate {rate:.3g}. Lower the learning rate (recipe "
            f"{self.recipe.name!r}: {self.recipe.learning_rate:.3g}), or check the data for "
            "wrong values."
        )

    def _progress(self) -> Progress:
        loss_sum, correct, _ = (self.sums * self.ranks).tolist()
        done = max(1, self.step)
        return Progress(
            epoch=self.epoch + 1,
            epochs=self.epochs,
            step=self.step,
            steps=len(self.loader),
            loss=loss_sum / done,
            accuracy=correct / (done * self.recipe.batch_size),
            images_per_second=self.step * self.recipe.batch_size / max(self.epoch_seconds, 1e-9),
        )

    # Checkpoints

    def _save(self) -> None:
        if self.folder is None:
            return
        generators = [_generator_states(self.device)]
        total = self._total()
        if self.ranks > 1:
            mine, generators = generators[0], [None] * self.ranks
            distributed.all_gather_object(generators, mine)
            if self.rank:
                return
        state = {
            "identity": self.identity,
            "epoch": self.epoch,
            "step": self.step,
            "sums": total,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generators": generators,
            "history": [asdict(record) for record in self.history],
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_loss": self.best_loss,
            "seconds": self.seconds,
            "epoch_seconds": self.epoch_seconds,
        }
        save_checkpoint(self.folder / "resume.pt", state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.rank < len(state["generators"]):  # else there are more processes than before
            _restore_generators(state["generators"][self.rank], self.device)
        self.epoch, self.step = state["epoch"], state["step"]
        shares = torch.tensor([1 / self.ranks, 1 / self.ranks, 1.0], dtype=state["sums"].dtype)
        self.sums = (state["sums"] * shares).to(self.device)
        self.history = [EpochRecord(**record) for record in state["history"]]
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.best_loss = state["best_loss"]
        self.seconds, self.epoch_seconds = state["seconds"], state["epoch_seconds"]

    def _check_same_place(self) -> None:
        """Raise CheckpointError unless all processes found the same checkpoint."""
        if self.ranks == 1:
            return
        place = torch.tensor([self.epoch, self.step], device=self.device)
        ends = torch.cat([place, -place])
        distributed.all_reduce(ends, distributed.ReduceOp.MAX)
        if not torch.equal(ends[:2], -ends[2:]):
            raise CheckpointError(
                f"process {self.rank} would go on from epoch {self.epoch + 1}, step {self.step}, "
                f"another from elsewhere: {self.folder} isn't the same folder for all. Set "
                "RUNS_DIR to one that all machines share."
            )


def history_csv(history: list[EpochRecord]) -> bytes:
    """Return the history as CSV text with a header line, in UTF-8."""
    text = io.StringIO()
    names = list(EpochRecord.__dataclass_fields__)
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(record) for record in history)
    return text.getvalue().encode()


# --- From the command line ---------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the Run of a JSON file, under torchrun in all its processes; return the exit code."""
    from helpers import config, runs  # above this module: they say where a result is kept

    parser = argparse.ArgumentParser(
        prog="python -m helpers.training", description="Train one run; with torchrun, together."
    )
    parser.add_argument("run", type=Path, help="a run.json, as in the folders under runs/")
    path = parser.parse_args(arguments).run
    try:
        run, study = runs.read_run(path), config.study()
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if not distributed.is_torchelastic_launched():
        result = runs.train_all([run], study)[run]
    else:
        result = runs.train_together(run, study)
    if result is not None:
        print(f"test accuracy {100 * result.test_accuracy:.2f} %, stored in {result.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
