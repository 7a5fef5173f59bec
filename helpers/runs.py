"""Runs and their results: describe once, train once, read for ever.

A `Run` holds everything that decides a result; two equal Runs are the same result, kept in
runs/<key>/. `load_or_train` returns the stored Result, goes on with a run that was cut off, or
trains it. `python -m helpers.runs` lists what is stored.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, distributed, nn
from tqdm.auto import tqdm

from helpers import config
from helpers.compression import fit_to, make_permanent, prune_network, stored_tensors
from helpers.config import Study, as_float, check, dataset_slug, is_whole
from helpers.data import SPLITS, Augmentation, Dataset, load_dataset
from helpers.evaluation import (
    Interval,
    metrics,
    multiply_adds,
    percent,
    predict,
    seeds_interval,
)
from helpers.models import MODELS, build_model, default_stem
from helpers.starts import (
    IMAGENET,
    Pruning,
    Transfer,
    check_fit,
    imagenet_weights,
    transfer,
)
from helpers.training import (
    RECIPES,
    EpochRecord,
    Progress,
    Recipe,
    Trained,
    TrainingDiverged,
    process_rank,
    train,
    write_atomically,
)

RESULT_FORMAT = 1


class RunError(RuntimeError):
    """A stored run that failed or is damaged; the message names the file and the remedy."""


@dataclass(frozen=True)
class Run:
    """Everything that decides a result.

    `dataset` is a name or a folder's path, `fingerprint` that of its pixels and labels; sizes are
    numbers of images (None: all), `image_size` pixels (None: the dataset's own). `stem` is "auto",
    "cifar" or "imagenet". `patience` (epochs) turns early stopping on. `start` is the trained
    network to start from; None means random weights.

    Raises ValueError for a setting outside what is allowed.
    """

    dataset: str
    fingerprint: str
    model: str
    recipe: Recipe
    epochs: int
    seed: int
    image_size: int | None = None
    train_size: int | None = None
    validation_size: int | None = None
    test_size: int | None = None
    width: float = 1.0
    stem: str = "auto"
    residual: bool = True
    dropout: float = 0.0
    patience: int | None = None
    start: Transfer | Pruning | None = None

    def __post_init__(self) -> None:
        for name in ("dataset", "fingerprint"):
            value = getattr(self, name)
            check(name, value, isinstance(value, str) and value != "", "text")
        check("model", self.model, self.model in MODELS, f"one of {', '.join(MODELS)}")
        check("recipe", self.recipe, isinstance(self.recipe, Recipe), "a Recipe")
        for name in ("width", "dropout"):
            object.__setattr__(self, name, as_float(name, getattr(self, name)))
        check("epochs", self.epochs, is_whole(self.epochs), "a positive whole number")
        is_seed = is_whole(self.seed, 0) and self.seed < 2**32
        check("seed", self.seed, is_seed, "a whole number from 0 to 2**32 - 1")
        check("width", self.width, 0 < self.width <= 16, "above 0 and at most 16")
        stems = ("auto", "cifar", "imagenet")
        check("stem", self.stem, self.stem in stems, f"one of {', '.join(stems)}")
        check("dropout", self.dropout, 0 <= self.dropout < 1, "0 to below 1")
        patience = self.patience
        allowed = patience is None or is_whole(patience)
        check("patience", patience, allowed, "a positive whole number of epochs, or None for off")
        check("residual", self.residual, isinstance(self.residual, bool), "True or False")
        size = self.image_size
        allowed = size is None or (is_whole(size, 8) and size <= 4096)
        check("image_size", size, allowed, "8 to 4096 pixels, or None for the dataset's own")
        for name in ("train_size", "validation_size", "test_size"):
            size = getattr(self, name)
            allowed = size is None or is_whole(size)
            check(name, size, allowed, "a positive whole number, or None for all")
        if self.train_size is not None and self.recipe.batch_size > self.train_size:
            raise ValueError(
                f"batch_size is {self.recipe.batch_size}, but train_size is {self.train_size}; "
                "use a smaller batch or more images"
            )
        allowed = self.start is None or isinstance(self.start, (Transfer, Pruning))
        check("start", self.start, allowed, "a Transfer, a Pruning, or None for random weights")
        if self.start is not None:
            source = self.start.source
            from_run = isinstance(source, Run)
            allowed = from_run or (source == IMAGENET and isinstance(self.start, Transfer))
            check("start's source", source, allowed, f"a Run, or {IMAGENET!r} for a Transfer")
            check_fit(self)

    def identity(self) -> dict[str, Any]:
        """Return what the key is made of: all fields, with a folder known by its name alone.

        A scaled learning rate is added, so that another rule of scaling gives other keys. Fields
        that came later are left out where they have no effect, so that older keys stay.
        """
        values = asdict(self) | {"dataset": dataset_slug(self.dataset)}
        if self.recipe.reference_batch_size is not None:
            values["recipe"]["peak_learning_rate"] = self.recipe.peak_learning_rate
        augmentation = values["recipe"]["augmentation"]
        for name in ("colour_jitter", "trivial_augment", "mixup"):
            if not augmentation[name]:
                del augmentation[name]
        if self.start is None:
            del values["start"]
        elif isinstance(self.start.source, Run):
            values["start"]["source"] = self.start.source.key
        return values

    @property
    def key(self) -> str:
        """A readable name and a hash of all settings: the run's folder under runs/."""
        text = json.dumps(self.identity(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        parts = [dataset_slug(self.dataset), self.model, self.recipe.name, f"seed{self.seed}"]
        if not self.residual:
            parts[1] += "-plain"
        if self.start is not None:
            parts[1] += "-pruned" if isinstance(self.start, Pruning) else "-transferred"
        return "-".join([*parts, digest])

    def label(self) -> str:
        """Return a short name for progress displays, with what a study mostly varies."""
        kind = "" if self.residual else " plain"
        if self.start is not None:
            kind += " pruned" if isinstance(self.start, Pruning) else " transferred"
        recipe, named = self.recipe, RECIPES.get(self.recipe.name, self.recipe)
        parts = {
            f"{self.model}{kind}, recipe {recipe.name}": True,
            f"learning rate {recipe.learning_rate:g}": recipe.learning_rate != named.learning_rate,
            f"weight decay {recipe.weight_decay:g}": recipe.weight_decay != named.weight_decay,
            "augmentation changed": recipe.augmentation != named.augmentation,
            f"dropout {self.dropout:g}": self.dropout,
            f"patience {self.patience}": self.patience,
            f"seed {self.seed}": True,
        }
        return ", ".join(text for text, said in parts.items() if said)

    def build(self, num_classes: int, image_size: int) -> nn.Module:
        """Return the untrained network, its weights drawn from the run's seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return build_model(
                self.model,
                num_classes=num_classes,
                image_size=image_size,
                width=self.width,
                stem=default_stem(image_size) if self.stem == "auto" else self.stem,
                residual=self.residual,
                dropout=self.dropout,
            )

    def load_data(self, data_dir: Path | str) -> Dataset:
        """Return the run's dataset; raise RunError if it isn't the one the run was made for."""
        dataset = load_dataset(
            self.dataset,
            image_size=self.image_size,
            train_size=self.train_size,
            validation_size=self.validation_size,
            test_size=self.test_size,
            data_dir=data_dir,
        )
        if dataset.fingerprint != self.fingerprint:
            raise RunError(
                f"{dataset.title} has fingerprint {dataset.fingerprint}, but the run was made for "
                f"{self.fingerprint}: its images or labels have changed. Make the run anew from "
                "the dataset as it is now."
            )
        return dataset


def study_data(study: Study, dataset: str | None = None, **sizes: int | None) -> Dataset:
    """Return the study's dataset (or another one) at the profile's sizes, capped by what exists.

    A size in `sizes` replaces the profile's.
    """
    profile = study.profile
    wanted = {
        "image_size": profile.image_size,
        "train_size": profile.train_size,
        "validation_size": profile.validation_size,
        "test_size": profile.test_size,
    } | sizes
    name = dataset or study.dataset
    if not name.startswith("shapes"):
        whole = load_dataset(name, image_size=wanted["image_size"], data_dir=study.data_dir)
        for split in ("train", "validation", "test"):
            size = wanted[f"{split}_size"]
            if size is not None:
                wanted[f"{split}_size"] = min(size, len(getattr(whole, split)))
    return load_dataset(name, data_dir=study.data_dir, **wanted)


def make_run(study: Study, dataset: Dataset, model: str, *, seed: int, **changes: Any) -> Run:
    """Return the Run of a model on a dataset in a study: the profile's width and epochs.

    The recipe is `fast`, its batch capped by the profile's and by the training images there are.
    `changes` replaces fields of the Run.
    """
    profile = study.profile
    recipe = changes.pop("recipe", RECIPES["fast"])
    check("recipe", recipe, isinstance(recipe, Recipe), "a Recipe, such as RECIPES['fast']")
    batch_size = min(recipe.batch_size, profile.batch_size, len(dataset.train))
    fields = {
        "epochs": profile.epochs,
        "width": profile.width,
        "image_size": profile.image_size,
        **{f"{split}_size": len(getattr(dataset, split)) for split in SPLITS},
        **changes,
    }
    return Run(
        dataset=dataset.name,
        fingerprint=dataset.fingerprint,
        model=model,
        recipe=replace(recipe, batch_size=batch_size),
        seed=seed,
        **fields,
    )


def read_run(path: Path) -> Run:
    """Read a Run from a JSON file such as the run.json of a stored run.

    Raises OSError if the file can't be read, and ValueError, naming it, if it holds no Run.
    """
    try:
        return run_from_dict(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} can't be read as a run ({error!r}); expected what a run.json under runs/ holds"
        ) from error


def run_from_dict(values: dict[str, Any]) -> Run:
    """Return the Run that `asdict` turned into `values` (as in run.json)."""
    recipe = values["recipe"]
    recipe = Recipe(**recipe | {"augmentation": Augmentation(**recipe["augmentation"])})
    start = values.get("start")
    if start is not None:
        source = start["source"]
        source = source if isinstance(source, str) else run_from_dict(source)
        start = (Pruning if "kind" in start else Transfer)(**start | {"source": source})
    return Run(**values | {"recipe": recipe, "start": start})


# --- Results -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A finished run, read from its folder.

    `metrics` maps "train", "validation" and "test" (all without augmentation, final weights) to
    those of `evaluation.metrics`; `machine` says on what it ran, in how many seconds. Logits are
    float32 N x K, in the order of the split.
    """

    run: Run
    folder: Path
    history: pd.DataFrame = field(repr=False)
    metrics: dict[str, dict[str, float]] = field(repr=False)
    best_epoch: int
    stopped_early: bool
    seconds: float
    machine: dict[str, str] = field(repr=False)
    test_logits: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    validation_logits: Tensor = field(repr=False)
    validation_labels: Tensor = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)
    image_size: int = 32

    @property
    def test_accuracy(self) -> float:
        """Top-1 accuracy on the test split, in [0, 1]."""
        return self.metrics["test"]["accuracy"]

    @property
    def correct(self) -> np.ndarray:
        """Whether each test image was classified rightly: N floats of 0 or 1."""
        return (self.test_logits.argmax(1) == self.test_labels).double().numpy()

    def load_model(self, device: torch.device | str = "cpu") -> nn.Module:
        """Return the trained network in evaluation mode."""
        model = self.run.build(len(self.classes), self.image_size)
        path = self.folder / "model.safetensors"
        model = fit_to(model, load_safetensors(path.read_bytes()))
        return model.to(device).eval()


def machine(device: torch.device) -> dict[str, str]:
    """Return what a result depends on apart from the Run: device and versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    if process_rank()[1] > 1:
        name = f"{process_rank()[1]} processes, each on {name}"
    return {
        "device": name,
        "dtype": str(config.compute_dtype(device)).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _save_result(
    run: Run,
    folder: Path,
    dataset: Dataset,
    model: nn.Module,
    trained: Trained,
    device: torch.device,
) -> None:
    """Evaluate a trained network and write its files, result.json last."""
    statistics = dataset.channel_statistics
    logits = {
        split: predict(model, getattr(dataset, split), *statistics)
        for split in ("train", "validation", "test")
    }
    scores = {split: metrics(logits[split], getattr(dataset, split).labels) for split in logits}
    arrays = io.BytesIO()
    np.savez_compressed(
        arrays,
        test_logits=logits["test"].numpy(),
        test_labels=dataset.test.labels.numpy(),
        validation_logits=logits["validation"].numpy(),
        validation_labels=dataset.validation.labels.numpy(),
    )
    files = {
        "predictions.npz": arrays.getvalue(),
        "model.safetensors": save_safetensors(stored_tensors(model)),
        "history.csv": (folder / "history.csv").read_bytes(),
    }
    for name, content in files.items():
        write_atomically(folder / name, content)
    summary = {
        "format": RESULT_FORMAT,
        "key": run.key,
        "classes": list(dataset.classes),
        "image_size": dataset.image_size,
        "metrics": scores,
        "best_epoch": trained.best_epoch,
        "stopped_early": trained.stopped_early,
        "seconds": trained.seconds,
        "machine": machine(device),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    summary["checksum"] = _checksum(summary)
    write_atomically(folder / "result.json", json.dumps(summary, indent=1).encode())
    (folder / "resume.pt").unlink(missing_ok=True)


def _checksum(summary: dict[str, Any]) -> str:
    rest = {name: value for name, value in summary.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load_result(run: Run, folder: Path) -> Result:
    """Read a finished run. Every file is checked against its checksum.

    Raises FileNotFoundError for a run that isn't finished, and RunError, naming the file and the
    remedy, for one that is damaged or of another format.
    """
    remedy = f"Delete the folder {folder} to train this run again."
    path = folder / "result.json"
    try:
        summary = json.loads(path.read_bytes())
        if summary["format"] != RESULT_FORMAT:
            raise RunError(
                f"{path} has format {summary['format']}, expected {RESULT_FORMAT}. {remedy}"
            )
        if summary["checksum"] != _checksum(summary):
            raise RunError(f"{path} is damaged: its checksum doesn't fit. {remedy}")
        if summary["key"] != run.key:
            raise RunError(
                f"{path} belongs to the run {summary['key']}, expected {run.key}. {remedy}"
            )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error!r}). {remedy}") from error
    contents = {}
    for name, digest in summary["files"].items():
        try:
            contents[name] = (folder / name).read_bytes()
        except FileNotFoundError as error:
            raise RunError(f"{folder / name} is missing. {remedy}") from error
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise RunError(f"{folder / name} is damaged: its checksum doesn't fit. {remedy}")
    arrays = np.load(io.BytesIO(contents["predictions.npz"]), allow_pickle=False)
    return Result(
        run=run,
        folder=folder,
        history=_read_history(contents["history.csv"]),
        metrics=summary["metrics"],
        best_epoch=summary["best_epoch"],
        stopped_early=summary["stopped_early"],
        seconds=summary["seconds"],
        machine=summary["machine"],
        classes=tuple(summary["classes"]),
        image_size=summary["image_size"],
        **{name: torch.from_numpy(arrays[name]) for name in arrays.files},
    )


def _read_history(content: bytes) -> pd.DataFrame:
    """Return history.csv as it was recorded: Python's float() restores every bit."""
    rows = list(csv.DictReader(io.StringIO(content.decode())))
    table = pd.DataFrame([{name: float(text) for name, text in row.items()} for row in rows])
    return table.astype({"epoch": int})


# --- Load or train -----------------------------------------------------------------------------


def load_or_train(
    run: Run,
    study: Study | None = None,
    *,
    on_progress: Any = None,
    checkpoint_seconds: float = 30.0,
) -> Result:
    """Return a run's Result: stored if it's there and whole, resumed or trained otherwise.

    Two processes that ask for the same run share it: one trains, the other waits and loads (a
    lock of the operating system, which dies with its process). A run that failed for its own
    reasons (a loss that isn't finite) is marked, and raises RunError until its folder is deleted.

    Raises RunError for a damaged or failed run, and what `training.train` raises.
    """
    study = study or config.study()
    folder = study.runs_dir / run.key
    if (folder / "result.json").exists():
        return load_result(run, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire()
    except OSError as error:
        raise OSError(
            error.errno,
            f"{folder} can't be written ({error.strerror}). Make it writable, or set RUNS_DIR to "
            "another folder",
        ) from error
    try:
        if (folder / "result.json").exists():  # another process finished it meanwhile
            return load_result(run, folder)
        for unfinished in folder.glob(".*.tmp"):  # of a process that was killed while writing
            unfinished.unlink()
        failed = folder / "failed.json"
        if failed.exists():
            try:
                reason = json.loads(failed.read_bytes())["error"]
            except (ValueError, KeyError, TypeError) as error:
                reason = f"{failed} can't be read ({error!r})."
            raise RunError(
                f"this run failed before: {reason} Change a setting, or delete {folder} to try the "
                "same again."
            )
        write_atomically(folder / "run.json", json.dumps(asdict(run), indent=1).encode())
        try:
            dataset, model, trained = _train(run, study, folder, checkpoint_seconds, on_progress)
        except TrainingDiverged as error:
            write_atomically(failed, json.dumps({"error": str(error)}).encode())
            raise
        make_permanent(model)
        _save_result(run, folder, dataset, model, trained, study.device)
        return load_result(run, folder)
    finally:
        lock.release()


def _train(
    run: Run,
    study: Study,
    folder: Path,
    checkpoint_seconds: float = 30.0,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[Dataset, nn.Module, Trained]:
    """Train a run's network; return its data, the network and what `training.train` returns."""
    dataset = run.load_data(study.data_dir)
    model = _starting_network(run, dataset, study)
    trained = train(
        model,
        dataset,
        run.recipe,
        epochs=run.epochs,
        seed=run.seed,
        patience=run.patience,
        rate_factor=run.start.rate_factor if isinstance(run.start, Transfer) else 1.0,
        device=study.device,
        folder=folder,
        identity=run.key,
        checkpoint_seconds=checkpoint_seconds,
        on_progress=on_progress,
        on_epoch=_tensorboard(folder) if study.tensorboard else None,
    )
    return dataset, model, trained


def _starting_network(run: Run, dataset: Dataset, study: Study) -> nn.Module:
    """Return the network that a run trains: random, transferred or pruned.

    The run that it starts from is loaded, or trained first.
    """
    model = run.build(len(dataset.classes), dataset.image_size)
    if isinstance(run.start, Transfer):
        if run.start.source == IMAGENET:
            weights = imagenet_weights(run.model, study.data_dir / "weights")
        else:
            weights = load_or_train(run.start.source, study).load_model().state_dict()
        transfer(model, weights, run.start.frozen)
    elif isinstance(run.start, Pruning):
        model = load_or_train(run.start.source, study).load_model()
        prune_network(model, run.start.kind, run.start.share, dataset.image_size)
    return model


def _tensorboard(folder: Path) -> Callable[[EpochRecord], None]:
    """Return what writes an epoch's record into the run's TensorBoard log."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TENSORBOARD is set, but the package tensorboard isn't installed: pip install "
            "tensorboard, or unset it"
        ) from error
    writer = SummaryWriter(folder / "tensorboard")

    def write(record: EpochRecord) -> None:
        for name, value in asdict(record).items():
            if name != "epoch":
                writer.add_scalar(name, value, record.epoch)
        writer.flush()

    return write


def train_all(
    runs: Sequence[Run],
    study: Study | None = None,
    *,
    title: str = "runs",
    executor: str | None = None,
) -> dict[Run, Result]:
    """Load or train runs, showing progress; return their Results by Run.

    `executor` (None: the study's) is "local", one after the other in this process, or "ray", see
    `helpers.executors`.
    """
    check("runs", runs, not isinstance(runs, Run), "a list of Runs")
    study = study or config.study()
    executor = executor or study.executor
    check("executor", executor, executor in config.EXECUTORS, " or ".join(config.EXECUTORS))
    results = {}
    with _Display(runs, study, title) as display:
        if executor == "ray" and display.todo:
            from helpers.executors import train_with_ray  # Ray is optional

            longest_first = sorted(display.todo, key=cost, reverse=True)
            train_with_ray(longest_first, study, display)
        for run in dict.fromkeys(runs):
            display.begin(run)
            shown = functools.partial(display.update, run)
            results[run] = load_or_train(run, study, on_progress=shown)
            display.finish(run)
    return results


def train_together(run: Run, study: Study) -> Result | None:
    """Train one run in all the processes that torchrun started; the first returns the Result.

    Each process has a GPU of its own, or its share of the CPU. All need the same RUNS_DIR. A run
    that this one starts from is trained first. For what differs from training in one process see
    `training.train`.
    """
    on_gpu = study.device.type == "cuda"
    if on_gpu:
        study = replace(study, device=torch.device("cuda", distributed.get_node_local_rank()))
        torch.cuda.set_device(study.device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        for each in (*_sources(run), run):
            folder = study.runs_dir / each.key
            finished = [(folder / "result.json").exists()]
            distributed.broadcast_object_list(finished, 0)
            if not finished[0] and distributed.get_rank():
                _train(each, study, folder)
            elif not finished[0]:
                train_all([each], study, executor="local")
            distributed.barrier()
        return load_or_train(run, study) if distributed.get_rank() == 0 else None
    finally:
        distributed.destroy_process_group()


def _sources(run: Run) -> list[Run]:
    """Return the runs that a run starts from, the first one first."""
    source = getattr(run.start, "source", None)
    return [*_sources(source), source] if isinstance(source, Run) else []


SECONDS_BETWEEN_LINES = 30


def _can_redraw() -> bool:
    """Tell whether bars can be redrawn in place: in a terminal, and in a notebook's kernel."""
    if sys.stderr.isatty():
        return True
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class _Display:
    """Progress of several runs: a bar of runs, one of each that is trained now, and the time left.

    Where nothing can be redrawn (a log file, a pipe), a plain line for each run and one every half
    minute. Time left comes from the measured speed of this call's runs: a run's cost is mostly its
    multiply-adds times images times epochs.
    """

    def __init__(self, runs: Sequence[Run], study: Study, title: str) -> None:
        self.study, self.title = study, title
        unique = list(dict.fromkeys(runs))
        self.todo = [r for r in unique if not (study.runs_dir / r.key / "result.json").exists()]
        self.count, self.done = len(self.todo), 0
        self.costs = {run: cost(run) for run in self.todo} if study.progress != "none" else {}
        self.spent_cost, self.begun = 0.0, time.monotonic()
        self.shares: dict[Run, float] = {}  # how much of each run in training is done
        self.finished: set[Run] = set()
        self.bars: dict[Run, Any] = {}
        self.outer: Any = None
        self.lines = study.progress == "bar" and not _can_redraw()
        self.last_line = 0.0

    def __enter__(self) -> _Display:
        if self.study.progress == "bar" and self.count and not self.lines:
            self.outer = tqdm(total=self.count, desc=self.title, unit="run", leave=False)
        return self

    def __exit__(self, *exc: object) -> None:
        for bar in (*self.bars.values(), self.outer):
            if bar is not None:
                bar.close()
        if self.study.progress.startswith("file:"):
            Path(self.study.progress.removeprefix("file:")).unlink(missing_ok=True)

    def begin(self, run: Run) -> None:
        if run not in self.todo or run in self.finished or run in self.shares:
            return
        self.shares[run] = 0.0
        if self.outer is not None:
            self.bars[run] = tqdm(total=run.epochs, desc=run.label(), unit="epoch", leave=False)
        elif self.lines:
            self._line(run, f"{run.epochs} epochs")

    def _line(self, run: Run, text: str) -> None:
        number = f"{self.title} {self.done + 1}/{self.count}"
        print(f"{number}: {run.label()}, {text}", file=sys.stderr, flush=True)
        self.last_line = time.monotonic()

    def update(self, run: Run, progress: Progress) -> None:
        if run not in self.shares or self.study.progress == "none":
            return
        share = (progress.epoch - 1 + progress.step / progress.steps) / progress.epochs
        self.shares[run] = share
        left = self._seconds_left()
        state = (
            f"loss {progress.loss:.3f}, accuracy {100 * progress.accuracy:.1f} %, "
            f"{progress.images_per_second:,.0f} images/s"
        )
        if run in self.bars:
            self.bars[run].n = round(share * progress.epochs, 1)
            self.bars[run].set_postfix_str(state)
            self.outer.set_postfix_str(f"{left:.0f} s left" if left is not None else "")
        elif self.lines:
            if time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
                remaining = f", {left:.0f} s left" if left is not None else ""
                self._line(run, f"epoch {progress.epoch}/{progress.epochs}, {state}{remaining}")
        elif self.study.progress.startswith("file:"):
            others = len(self.shares) - 1
            text = {
                "title": self.title,
                "run": run.label() + (f" (and {others} more at a time)" if others else ""),
                "number": self.done + 1,
                "count": self.count,
                "epoch": progress.epoch,
                "epochs": progress.epochs,
                "state": state,
                "seconds_left": left,
            }
            path = Path(self.study.progress.removeprefix("file:"))
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(text))
            temporary.replace(path)

    def finish(self, run: Run) -> None:
        if self.shares.pop(run, None) is None:
            return
        self.done += 1
        self.finished.add(run)
        self.spent_cost += self.costs.get(run, 0.0)
        if run in self.bars:
            self.bars.pop(run).close()
            self.outer.update()

    def _seconds_left(self) -> float | None:
        spent = self.spent_cost + sum(s * self.costs[run] for run, s in self.shares.items())
        elapsed = time.monotonic() - self.begun
        if not spent or elapsed < 2:
            return None
        return elapsed / spent * (sum(self.costs.values()) - spent)


# What an image costs besides its network's multiply-adds, expressed in multiply-adds: on two cores
# SimpleCNN (0.8 million) trains on 8,000 images/s, ResNet-18 (35 million) on 1,000.
OTHER_COST = 4e6


def cost(run: Run) -> float:
    """Return multiply-adds x images x epochs, and some more, to weigh runs against each other."""
    size = run.image_size or 32
    with torch.device("meta"):
        model = run.build(10, size)
    return (multiply_adds(model, size) + OTHER_COST) * (run.train_size or 50_000) * run.epochs


# --- Tables ------------------------------------------------------------------------------------


def stored_runs(runs_dir: Path) -> pd.DataFrame:
    """Return one row for each folder under runs/: key, state, settings and headline metrics.

    States: finished, failed, resumable (a checkpoint is there), begun.
    """
    rows = []
    folders = sorted(runs_dir.iterdir()) if runs_dir.is_dir() else []
    for folder in folders:
        if not (folder / "run.json").exists():
            continue
        row: dict[str, Any] = {"run": folder.name, "state": "begun"}
        finished = (folder / "result.json").exists()
        try:
            run = read_run(folder / "run.json")
            row |= {
                "images": run.train_size or "all",
                "width": run.width,
                "dropout": run.dropout,
                "weight decay": run.recipe.weight_decay,
            }
            if finished:
                result = load_result(run, folder)
                row |= {
                    "state": "finished",
                    "epochs": len(result.history),
                    "test accuracy": f"{100 * result.test_accuracy:.2f} %",
                    "gap": f"{100 * gap(result):.2f}",
                    "seconds": f"{result.seconds:.1f}",
                    "device": result.machine["device"],
                }
        except (RunError, OSError, ValueError) as error:
            if finished:
                row["state"] = f"damaged: {error}"
        if not finished and (folder / "failed.json").exists():
            row["state"] = "failed"
        elif not finished and (folder / "resume.pt").exists():
            row["state"] = "resumable"
            row["epochs"] = _epochs_recorded(folder)
        rows.append(row)
    columns = dict.fromkeys(name for row in rows for name in row)
    return pd.DataFrame([{name: row.get(name, "") for name in columns} for row in rows])


def _epochs_recorded(folder: Path) -> int:
    try:
        with open(folder / "history.csv", newline="") as file:
            return len(list(csv.DictReader(file)))
    except OSError:
        return 0


def gap(result: Result) -> float:
    """Return the generalization gap: training accuracy (no augmentation) minus test accuracy."""
    return result.metrics["train"]["accuracy"] - result.metrics["test"]["accuracy"]


def by_name(results: dict[Run, Result], runs: dict[str, list[Run]]) -> dict[str, list[Result]]:
    """Regroup the Results of `train_all` under the names of a study's variants."""
    return {name: [results[run] for run in variant] for name, variant in runs.items()}


def accuracy_interval(results: Sequence[Result]) -> Interval:
    """Return test accuracy over seeds with an interval over seeds and test images."""
    return seeds_interval(np.stack([result.correct for result in results]))


def paired_difference(results: Sequence[Result], reference: Sequence[Result]) -> Interval:
    """Return how much more accurate `results` are than `reference`, paired by seed and image.

    Raises ValueError unless both have the same seeds and test images.
    """
    pairs = list(zip(results, reference, strict=True))
    for one, other in pairs:
        same_images = torch.equal(one.test_labels, other.test_labels)
        if one.run.seed != other.run.seed or not same_images:
            raise ValueError(
                f"{one.run.key} and {other.run.key} differ in seed or test images; only runs that "
                "share both can be compared in pairs"
            )
    return seeds_interval(np.stack([one.correct - other.correct for one, other in pairs]))


def difference_sentence(name: str, reference: str, difference: Interval) -> str:
    """Say what an interval of a difference in accuracy allows to say, in points of per cent."""
    size = f"{percent(abs(difference.mean))} points"
    bounds = f"{percent(difference.low, '+')} to {percent(difference.high, '+')}"
    if difference.low > 0:
        text = f"{name} is {size} more accurate than {reference}"
    elif difference.high < 0:
        text = f"{name} is {size} less accurate than {reference}"
    else:
        text = f"between {name} and {reference} no difference is shown"
    return f"{text[0].upper()}{text[1:]} (95 % interval {bounds})."


def mean_metrics(results: Sequence[Result], split: str = "test") -> dict[str, float]:
    """Return each metric of a split as its mean over seeds."""
    names = results[0].metrics[split]
    return {name: float(np.mean([r.metrics[split][name] for r in results])) for name in names}


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """Return what a result file says of its dataset."""
    return {
        "name": dataset_slug(dataset.name),
        "title": dataset.title,
        "classes": list(dataset.classes),
        "image_size": dataset.image_size,
        "fingerprint": dataset.fingerprint,
        **{f"{split}_size": len(getattr(dataset, split)) for split in SPLITS},
    }


def save_results(study: Study, name: str, values: dict[str, Any]) -> Path:
    """Write a notebook's results as JSON into the study's set, with profile and machine.

    Only finite numbers are allowed: a NaN raises ValueError, so that it can't reach the report.
    """
    content = {
        "profile": asdict(study.profile),
        "machine": machine(study.device),
        **values,
    }
    path = study.results_dir / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, allow_nan=False, default=_plain)
    write_atomically(path, text.encode())
    return path


def _plain(value: Any) -> Any:
    """Turn what json doesn't know (intervals, NumPy scalars and arrays) into what it does."""
    if isinstance(value, Interval):
        return asdict(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} can't be written as JSON")


def main() -> int:
    """List the stored runs of the study that the environment asks for; return the exit code."""
    try:
        runs_dir = config.study().runs_dir
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    table = stored_runs(runs_dir)
    if table.empty:
        print(f"no runs in {runs_dir}")
        return 0
    print(table.to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
