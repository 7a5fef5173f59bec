"""Runs and their results: describe once, train once, read for ever.

A `Run` holds everything that decides a result; equal Runs share one, which is kept in runs/<key>/.
Those of a published set are also kept beside its figures, each as one small file, and are read from
there before anything is trained.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
import zipfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from pydantic import Field, model_validator
from torch import Tensor, nn

from helpers import config, finetuning
from helpers.config import Study, dataset_slug, settings, write_atomically
from helpers.data import SPLITS, Dataset, load_dataset
from helpers.evaluation import metrics, predict
from helpers.finetuning import IMAGENET
from helpers.models import CIFAR_RESNETS, IMAGENET_RESNETS, MODELS, build_model, check_stem
from helpers.recipes import RECIPES, Recipe
from helpers.training import train

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


@settings
class Transfer:
    """Start from trained weights, with a new last layer for the run's own classes.

    `source` is a Run, or IMAGENET for torchvision's weights. With `frozen` the new layer alone is
    trained; batch-norm statistics stay, too. `rate_factor` gives every part of the network that
    many times the learning rate of the part after it (Howard and Ruder, ACL 2018, section 3.2).
    """

    source: Run | Literal["IMAGENET1K_V1"]
    frozen: bool = False
    rate_factor: Annotated[float, Field(gt=0, le=1)] = 1.0


@settings
class Pruning:
    """Start from a trained network from which a share, the `sparsity`, is taken away.

    Either of all "weights", which are zero from then on, or of the "channels" of every layer.
    """

    source: Run
    kind: Literal["weights", "channels"]
    sparsity: Share


@settings
class Run:
    """Everything that decides a result.

    `dataset` is a name or a folder's path, `fingerprint` that of its pixels and labels; sizes are
    numbers of images (None: all), `image_size` pixels (None: the dataset's own). `stem` is "auto",
    "cifar" or "imagenet". `patience` (epochs) turns early stopping on. `start` is the trained
    network to start from; None means random weights.
    """

    dataset: Text
    fingerprint: Text
    model: Literal[MODELS]
    recipe: Recipe
    epochs: Count
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    train_size: Count | None = None
    validation_size: Count | None = None
    test_size: Count | None = None
    width: Annotated[float, Field(gt=0, le=16)] = 1.0
    stem: Literal["auto", "cifar", "imagenet"] = "auto"
    residual: bool = True
    dropout: Share = 0.0
    patience: Count | None = None
    start: Transfer | Pruning | None = None

    @model_validator(mode="after")
    def _fits(self) -> Run:
        batch, most = self.recipe.batch_size, self.train_size
        if most is not None and batch > most:
            raise ValueError(f"batch_size is {batch}; expected at most {most}")
        if self.image_size is not None and self.model != "simple_cnn":
            check_stem(self.stem, self.image_size)
        if self.start is not None:
            check_source(self, self.start)
        return self

    @property
    def key(self) -> str:
        """A readable name and a hash of all settings: the run's folder under runs/."""
        slug = dataset_slug(self.dataset)  # a folder is known by its name, wherever it lies
        values = asdict(self) | {"dataset": slug}
        if self.start is not None and self.start.source != IMAGENET:
            values["start"]["source"] = self.start.source.key
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
        return "-".join([slug, self.kind, self.recipe.name, f"seed{self.seed}", digest])

    @property
    def kind(self) -> str:
        """The network in a word, such as resnet18-pruned."""
        kind = self.model if self.residual else f"{self.model}-plain"
        if self.start is not None:
            kind += "-pruned" if isinstance(self.start, Pruning) else "-transferred"
        return kind

    def build(self, num_classes: int, image_size: int) -> nn.Module:
        """Return the untrained network, its weights drawn from the run's seed alone."""
        options = {n: getattr(self, n) for n in ("width", "stem", "residual", "dropout")}
        options |= {"num_classes": num_classes, "image_size": image_size}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # and leave those of GPUs alone
            return build_model(self.model, **options)

    def load_data(self, data_dir: Path | str) -> Dataset:
        """Return the run's dataset; RunError if it isn't the one the run was made for."""
        sizes = {f"{split}_size": getattr(self, f"{split}_size") for split in SPLITS}
        dataset = load_dataset(self.dataset, image_size=self.image_size, data_dir=data_dir, **sizes)
        if dataset.fingerprint != self.fingerprint:
            raise RunError(
                f"{dataset.title} has fingerprint {dataset.fingerprint}, the run was made for "
                f"{self.fingerprint}: its images have changed. Make the run anew from the dataset."
            )
        return dataset


def check_source(run: Run, start: Transfer | Pruning) -> None:
    """Raise ValueError unless a run's network is that of its source."""
    expected = {"stem": "imagenet", "width": 1.0, "residual": True}
    if start.source != IMAGENET:
        names = ["model", "width", "stem", "residual"]
        names += ["dataset", "fingerprint"] if isinstance(start, Pruning) else []
        if isinstance(start, Transfer) and getattr(start.source.start, "kind", "") == "channels":
            raise ValueError(f"{start.source.key} has lost channels; start from an unpruned run")
        if getattr(start, "kind", "") == "channels" and run.model in CIFAR_RESNETS and run.residual:
            raise ValueError(f"shortcuts of {run.model} pad channels; prune its weights instead")
        expected = {name: getattr(start.source, name) for name in names}
    elif run.model not in IMAGENET_RESNETS:
        raise ValueError(f"torchvision has no weights for {run.model}; choose a resnet18 to 152")
    for name, value in expected.items():
        if getattr(run, name) != value:
            raise ValueError(
                f"{name} is {getattr(run, name)!r}; the network to start from has {value!r}"
            )


def make_run(study: Study, dataset: Dataset, model: str, *, seed: int, **changes: Any) -> Run:
    """Return the Run of a model on a dataset with the profile's width, epochs and recipe.

    `changes` replaces its fields. The profile and the number of training images cap the batch.
    """
    fields = {name: getattr(dataset, name) for name in ("fingerprint", "image_size")}
    fields |= {f"{split}_size": len(getattr(dataset, split)) for split in SPLITS}
    fields |= {name: getattr(study.profile, name) for name in ("width", "epochs")} | changes
    recipe = fields.pop("recipe", RECIPES[study.profile.recipe])
    most = min(study.profile.batch_size, fields["train_size"] or len(dataset.train))
    recipe = replace(recipe, batch_size=min(recipe.batch_size, most))
    return Run(dataset=dataset.name, model=model, recipe=recipe, seed=seed, **fields)


class RunError(RuntimeError):
    """A stored run that is damaged, or of other data; the message names the remedy."""


@dataclass(frozen=True)
class Result:
    """A finished run, read from its folder.

    `metrics` maps "train", "validation" and "test" (all without augmentation, final weights) to
    those of `evaluation.metrics`. Logits are float32 N x K, in the order of the split.
    """

    run: Run
    study: Study = field(repr=False)
    history: pd.DataFrame = field(repr=False)
    metrics: dict[str, dict[str, float]] = field(repr=False)
    best_epoch: int
    stopped_early: bool
    seconds: float
    machine: dict[str, str] = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)
    image_size: int
    test_logits: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    validation_logits: Tensor = field(repr=False)
    validation_labels: Tensor = field(repr=False)

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.study.runs_dir / self.run.key

    @property
    def test_accuracy(self) -> float:
        """Top-1 accuracy on the test split, in [0, 1]."""
        return self.metrics["test"]["accuracy"]

    @property
    def correct(self) -> np.ndarray:
        """Whether each test image was classified rightly: N floats of 0 or 1."""
        return (self.test_logits.argmax(1) == self.test_labels).double().numpy()

    def load_model(self, device: torch.device | str = "cpu") -> nn.Module:
        """Return the trained network in evaluation mode.

        A published run that lacks its weights is trained for them, and says so.
        """
        weights = self.folder / "model.safetensors"
        if not weights.exists():
            print(f"{self.run.key} was published without weights: training it")
            with FileLock(self.folder / "lock"):
                if not weights.exists():
                    _train(self.run, self.study, again := self.folder / "again")
                    (again / "model.safetensors").rename(weights)  # the rest stays as published
        model = self.run.build(len(self.classes), self.image_size)
        finetuning.load_weights(model, weights.read_bytes())
        return model.to(device).eval()


def machine(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Return what a result depends on apart from the Run: device, number format and versions."""
    about = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", about.read_text() if about.exists() else "")
    name = found[1] if found else platform.processor() or platform.machine()
    name = f"{name}, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "dtype": str(dtype or config.compute_dtype(device)).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def load_result(run: Run, study: Study) -> Result:
    """Read a finished run, each file checked against its SHA-256; RunError if it is damaged."""
    folder = study.runs_dir / run.key
    if not (folder / "result.json").exists():
        raise FileNotFoundError(f"there is no finished run in {folder}")
    try:
        summary = json.loads((folder / "result.json").read_bytes())
        for name, digest in summary.pop("files").items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                raise ValueError(f"{name} doesn't fit its checksum")
        arrays = np.load(folder / "predictions.npz", allow_pickle=False)
        history = pd.read_csv(folder / "history.csv", dtype=str)  # whose own floats aren't exact
        history = history.astype(float).astype({"epoch": int})
        summary["classes"] = tuple(summary["classes"])
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        tensors = {n: t.float() if "logits" in n else t.long() for n, t in tensors.items()}
        return Result(run, study, history, **summary, **tensors)
    except Exception as error:  # damaged JSON or arrays raise nearly anything
        advice = "Delete the folder to train this run again."
        raise RunError(f"the result in {folder} is damaged ({error}). {advice}") from None


def load_or_train(run: Run, study: Study, **options: Any) -> Result:
    """Return a run's Result: stored or published if it's there, else resumed or trained.

    Of two processes that ask for the same run, one trains, the other waits and loads (a lock of
    the operating system, which dies with its process). `on_epoch` and `checkpoint_seconds` are
    those of `training.train`. Raises RunError for a damaged run, and what `train` raises.
    """
    folder, published = study.runs_dir / run.key, published_file(run, study)
    if not (folder / "result.json").exists():
        content = json.dumps(asdict(run), indent=1).encode()
        try:
            lock = FileLock(folder / "lock").acquire()
        except OSError:
            write_atomically(folder / "run.json", content)  # fails, and says what to do
            raise
        with lock:
            for unfinished in folder.glob(".*.tmp"):  # of a process that was killed while writing
                unfinished.unlink()
            write_atomically(folder / "run.json", content)
            stored = (folder / "result.json").exists()  # by another process, meanwhile
            if published.exists() and not stored:
                unpack(published, folder)
            elif not stored:
                _train(run, study, folder, **options)
    result = load_result(run, study)
    if study.publish and not published.exists():
        publish(result, published)
    return result


def published_file(run: Run, study: Study) -> Path:
    """Return where the study's set keeps a run, if it is published."""
    return study.folder / "runs" / f"{run.key}.zip"


def is_finished(run: Run, study: Study) -> bool:
    """Tell whether a run's result is stored or published."""
    stored = study.runs_dir / run.key / "result.json"
    return stored.exists() or published_file(run, study).exists()


def publish(result: Result, path: Path) -> None:
    """Write a finished run as one small file: history, metrics, and predictions in float16.

    With it go, in float16, the weights of networks trained as the profile says on the study's data
    (three seeds of ResNet-18, one of others) or pruned (one): more would fill a repository. From
    each image's logits their largest is subtracted, so that rounding changes hardly a prediction.
    """
    run, profile = result.run, result.study.profile
    recipe = replace(RECIPES[profile.recipe], batch_size=run.recipe.batch_size)
    own = {"recipe": recipe, "dataset": result.study.dataset}
    own |= {"width": profile.width, "epochs": profile.epochs, "dropout": 0.0, "patience": None}
    own |= {"stem": "auto", "residual": True, "start": None}
    arrays, files = {}, {"history.csv": (result.folder / "history.csv").read_bytes()}
    for split in SPLITS[1:]:
        logits, labels = (getattr(result, f"{split}_{what}") for what in ("logits", "labels"))
        arrays[f"{split}_logits"] = (logits - logits.amax(1, keepdim=True)).half().numpy()
        arrays[f"{split}_labels"] = labels.to(torch.int16).numpy()
    files["predictions.npz"] = _compressed(arrays)
    as_is, pruned = replace(run, **own) == run, isinstance(run.start, Pruning)
    if run.seed < (3 if as_is and run.model == "resnet18" else as_is or pruned):
        files["model.safetensors"] = finetuning.weights_file(result.load_model().half())
    summary, packed = json.loads((result.folder / "result.json").read_bytes()), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in _sealed(files, summary).items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    write_atomically(path, packed.getvalue())


def unpack(published: Path, folder: Path) -> None:
    """Write a published run's files as if it had been trained here; RunError if it is damaged."""
    try:
        with zipfile.ZipFile(published) as archive:
            names = {*archive.namelist(), "result.json"}  # without which nothing counts
            files = {n: archive.read(n) for n in RESULT_FILES if n in names}
    except Exception as error:  # a damaged archive raises nearly anything
        raise RunError(f"{published} is damaged ({error}); delete it to train the run") from None
    for name, content in files.items():
        write_atomically(folder / name, content)


# In the order in which they are written: a folder that has the last one is complete.
RESULT_FILES = ("history.csv", "predictions.npz", "model.safetensors", "result.json")


def _sealed(files: dict[str, bytes], summary: dict[str, Any]) -> dict[str, bytes]:
    """Return a run's files and, last, result.json with the SHA-256 of each."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    result = json.dumps(summary | {"files": digests}, indent=1).encode()
    return files | {"result.json": result}


def _compressed(arrays: dict[str, np.ndarray]) -> bytes:
    """Return arrays as the content of an npz file."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def _train(run: Run, study: Study, folder: Path, **options: Any) -> None:
    """Train and evaluate a run and write its files, result.json last."""
    dataset = run.load_data(study.data_dir)
    network = _starting_network(run, dataset, study)
    options |= {name: getattr(run, name) for name in ("epochs", "seed", "patience")}
    options |= {"rate_factor": getattr(run.start, "rate_factor", 1.0), "device": study.device}
    trained = train(network, dataset, run.recipe, folder=folder, **options)
    finetuning.make_permanent(trained.model)
    scores, arrays = {}, {}
    for name in SPLITS:
        split = getattr(dataset, name)
        logits = predict(trained.model, split, *dataset.channel_statistics)
        scores[name] = metrics(logits, split.labels)
        if name != "train":
            arrays |= {f"{name}_logits": logits.numpy(), f"{name}_labels": split.labels.numpy()}
    files = {
        "history.csv": (folder / "history.csv").read_bytes(),
        "predictions.npz": _compressed(arrays),
        "model.safetensors": finetuning.weights_file(trained.model),
    }
    summary = {
        "classes": list(dataset.classes),
        "image_size": dataset.image_size,
        "metrics": scores,
        "best_epoch": trained.best_epoch,
        "stopped_early": len(trained.history) < run.epochs,
        "seconds": sum(record.seconds for record in trained.history),
        "machine": machine(study.device, trained.dtype),
    }
    for name, content in _sealed(files, summary).items():
        write_atomically(folder / name, content)
    (folder / "resume.pt").unlink(missing_ok=True)


def _starting_network(run: Run, dataset: Dataset, study: Study) -> nn.Module:
    """Return the network that a run trains; the run that it starts from may be trained first."""
    model, start = run.build(len(dataset.classes), dataset.image_size), run.start
    if isinstance(start, Transfer):
        if start.source == IMAGENET:
            weights = finetuning.imagenet_weights(run.model, study.data_dir / "weights")
        else:
            weights = load_or_train(start.source, study).load_model().state_dict()
        finetuning.transfer(model, weights, start.frozen)
    elif isinstance(start, Pruning):
        model = load_or_train(start.source, study).load_model()
        if start.kind == "weights":
            finetuning.prune_weights(model, start.sparsity)
        else:
            finetuning.prune_channels(model, start.sparsity, dataset.image_size)
    return model
