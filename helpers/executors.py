"""Many runs: one after the other in this process, in several processes, or on machines by Ray.

Each run is a call of `load_or_train`, whoever makes it; how far it is is read from its folder.

EXECUTOR=processes trains several at a time on this machine: one network of this size keeps few
cores busy. EXECUTOR=ray needs `pip install .[ray]` and, on each machine of a cluster, this package
and the data at the same paths and the same RUNS_DIR, shared.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from typing import Any

import torch
from joblib import Parallel, cpu_count, delayed, parallel_config
from tqdm.auto import tqdm as notebook_or_terminal_bar
from tqdm.std import tqdm as plain_bar

from helpers.config import ROOT, Study
from helpers.data import Dataset
from helpers.evaluation import multiply_adds
from helpers.runs import Result, Run, RunError, is_finished, load_or_train, make_run

Settings = Mapping[str, Any] | Callable[[int], Mapping[str, Any]]


def train_variants(
    study: Study,
    dataset: Dataset,
    variants: Mapping[Any, Settings],
    *,
    title: str = "variants",
    seeds: Sequence[int] | None = None,
) -> dict[Any, list[Result]]:
    """Load or train variants once for each of `seeds` (else the profile's); Results by name.

    `variants` maps a name to arguments of `make_run`, "model" (else resnet18) and "data" (else
    `dataset`) among them, or to a function that returns these for a seed.
    """

    def run(given: Settings, seed: int) -> Run:
        own = given(seed) if callable(given) else given
        fields = {"model": "resnet18", "data": dataset, **own}
        return make_run(study, fields.pop("data"), fields.pop("model"), seed=seed, **fields)

    seeds = study.profile.seeds if seeds is None else seeds
    runs = {name: [run(given, seed) for seed in seeds] for name, given in variants.items()}
    results = train_all([r for variant in runs.values() for r in variant], study, title=title)
    return {name: [results[r] for r in variant] for name, variant in runs.items()}


def train_all(runs: Sequence[Run], study: Study, *, title: str = "runs") -> dict[Run, Result]:
    """Load or train runs, several at a time the longest first, and return Results by Run."""
    missing = [run for run in dict.fromkeys(runs) if not is_finished(run, study)]
    with show_progress(missing, study, title):
        if missing and study.executor != "local":
            train_in_processes(sorted(missing, key=cost, reverse=True), study)
        return {run: load_or_train(run, study) for run in runs}


def train_in_processes(runs: Sequence[Run], study: Study) -> None:
    """Train runs several at a time, in processes here or by Ray, a GPU each or so many CPU cores.

    One that fails doesn't stop the others: a RunError at the end names those that failed.
    """
    if study.executor == "processes":
        at_once, how = cpu_count() // study.cores_per_run, {"backend": "loky"}
    else:
        try:
            import ray
            from ray.util.joblib import register_ray
        except ImportError as error:
            raise ImportError("EXECUTOR is ray: pip install '.[ray]', or unset it") from error
        register_ray()
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
        where = {"env_vars": {"PYTHONPATH": str(ROOT)}}
        ray.init(ignore_reinit_error=True, runtime_env=where, **quiet)  # it stays for the next runs
        gpu = study.device.type == "cuda"
        need, each = ("GPU", 1) if gpu else ("CPU", study.cores_per_run)
        at_once = int(ray.cluster_resources().get(need, 0)) // each
        how = {"backend": "ray", "ray_remote_args": {f"num_{need.lower()}s": each}}
        # A fresh process for each run on a GPU: a CUDA error would fail the next ones, too.
        how["maxtasksperchild"] = 1 if gpu else None
    with parallel_config(n_jobs=max(1, min(at_once, len(runs))), **how):
        try:
            train = delayed(functools.partial(_train_in_worker, study=study, parent=os.getpid()))
            errors = Parallel(batch_size=1)(map(train, runs))
        except BrokenExecutor as error:  # a process was killed, as for want of memory
            errors = [str(error).splitlines()[0]] * len(runs)
    unseen = f"it was trained, but not into {study.runs_dir}: all machines have to share RUNS_DIR"
    ended = zip(runs, errors, strict=True)
    failed = [f"{run.key}: {e or unseen}" for run, e in ended if not is_finished(run, study)]
    if failed:
        raise RunError("\n".join([f"{len(failed)} of {len(runs)} runs failed:", *failed]))


def _train_in_worker(run: Run, study: Study, parent: int) -> str:
    """Train one run; return what went wrong. A process of our own ends with its parent."""

    def stop_if_orphaned(_record: object = None) -> None:  # as when a kernel is restarted
        if study.executor == "processes" and parent not in (os.getpid(), os.getppid()):
            os._exit(1)

    stop_if_orphaned()
    if study.device.type == "cuda" and study.executor == "ray":  # which shows it one GPU, number 0
        study = replace(study, device=torch.device("cuda"))
    threads = torch.get_num_threads()
    torch.set_num_threads(study.cores_per_run)
    try:
        load_or_train(run, study, on_epoch=stop_if_orphaned)
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.set_num_threads(threads)  # with one at a time this is the caller's process


@functools.cache
def cost(run: Run) -> float:
    """Return multiply-adds x images x epochs, to weigh runs against each other.

    An image costs 4 million more: on two cores SimpleCNN (0.8 million multiply-adds) trains on
    8,000 images/s, ResNet-18 (35 million) on 1,000.
    """
    size = run.image_size or (64 if run.stem == "imagenet" else 32)
    with torch.device("meta"):
        model = run.build(10, size)
    return (multiply_adds(model, size) + 4e6) * (run.train_size or 50_000) * run.epochs


@contextlib.contextmanager
def show_progress(runs: Sequence[Run], study: Study, title: str) -> Iterator[None]:
    """Show a bar of what all runs cost: in the notebook or terminal, in "file:PATH", or "none"."""
    kind, _, path = study.progress.partition(":")
    if kind == "none" or not runs:
        yield
        return
    text = "{desc}: {percentage:3.0f}% |{bar:10}| {remaining} left{postfix}"
    options = {"desc": title, "bar_format": text, "smoothing": 0, "leave": False}
    options |= {"total": sum(map(cost, runs)), "initial": _done(runs, study)[0]}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1):
            with contextlib.suppress(OSError, ValueError):  # a file that is being replaced
                bar.n, news = _done(runs, study)
                bar.set_postfix_str(news)

    with open(path or os.devnull, "w") as file:
        in_file = functools.partial(plain_bar, file=file, ncols=150)
        with (in_file if path else notebook_or_terminal_bar)(**options) as bar:
            watcher = threading.Thread(target=watch, daemon=True)
            watcher.start()
            try:
                yield
            finally:
                ended.set()
                watcher.join()


def _done(runs: Sequence[Run], study: Study) -> tuple[float, str]:
    """Return how much of the runs' cost is done, and a line about those in training."""
    spent, finished, news = 0.0, 0, []
    for run in runs:
        history = study.runs_dir / run.key / "history.csv"
        if is_finished(run, study):
            spent, finished = spent + cost(run), finished + 1
        elif history.exists():
            *earlier, last = history.read_text().splitlines()
            spent += cost(run) * len(earlier) / run.epochs
            name = f"{run.kind}, {run.recipe.name}, seed {run.seed}: epoch {len(earlier)}"
            accuracy = 100 * float(last.split(",")[-2])
            news.append(f"{name}/{run.epochs}, validation {accuracy:.1f} %")
    return spent, "; ".join([f"{finished} of {len(runs)} runs done", *news])
