"""What comparisons of finished runs need: means, intervals, differences and result files."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from helpers.config import Study, dataset_slug, write_atomically
from helpers.data import SPLITS, Dataset, cached
from helpers.evaluation import Interval, Verdict, seeds_intervals
from helpers.runs import Result, machine


def mean_metrics(results: Sequence[Result], split: str = "test") -> dict[str, float]:
    """Return each metric of a split as its mean over seeds."""
    names = results[0].metrics[split]
    return {name: float(np.mean([r.metrics[split][name] for r in results])) for name in names}


def trained_out(results: Sequence[Result]) -> bool:
    """Tell whether networks learnt 95 % of their training images: else they tell of speed alone."""
    return all(r.metrics["train"]["accuracy"] >= 0.95 for r in results)


def correct(results: Sequence[Result]) -> np.ndarray:
    """Return whether each test image was classified rightly: seeds x images of 0 or 1."""
    return np.stack([r.correct for r in results])


def accuracies(results: Mapping[str, Sequence[Result]], **how: Any) -> dict[str, Interval]:
    """Return each name's test accuracy, cut off at 0 and 1, by `evaluation.seeds_intervals`."""
    found = seeds_intervals({n: correct(rs) for n, rs in results.items()}, **how)
    return {n: replace(i, low=max(i.low, 0), high=min(i.high, 1)) for n, i in found.items()}


def differences(results: Mapping[str, Sequence[Result]], reference: str) -> dict[str, Interval]:
    """Return how much more accurate each is than `reference`, paired by seed and test image."""
    for own in results.values():
        for one, other in zip(own, results[reference], strict=True):
            same_images = torch.equal(one.test_labels, other.test_labels)
            if one.run.seed != other.run.seed or not same_images:
                differ = f"{one.run.key} and {other.run.key} differ in seed or test images"
                raise ValueError(f"{differ}; only runs that share both can be compared in pairs")
    contrasts = {name: {name: 1, reference: -1} for name in results if name != reference}
    return seeds_intervals({name: correct(rs) for name, rs in results.items()}, contrasts)


def code_behind(function: Callable) -> str:
    """Return the text of a function, of those beside it and of this package's modules it builds on.

    All but that of `helpers.runs`: what became of a run is known by its results.
    """
    texts, waiting = [], [function]
    for thing in waiting:
        texts.append(inspect.getsource(thing))
        around = vars(thing) if inspect.ismodule(thing) else thing.__globals__
        found = [around[name] for name in re.findall(r"\w+", texts[-1]) if name in around]
        used = [f for f in found if inspect.isfunction(f) and f.__module__ == function.__module__]
        for each in found:  # a module, or what one holds
            home = getattr(each, "__module__", getattr(each, "__name__", ""))
            used += [sys.modules[home]] if re.match(r"helpers\.(?!runs$)", str(home)) else []
        waiting += [each for each in dict.fromkeys(used) if each not in waiting]
    return "\n".join(sorted(texts))


def computed(
    study: Study, function: Callable[..., dict[str, np.ndarray]], result: Result, *arguments: Any
) -> dict[str, np.ndarray]:
    """Return function(result, *arguments), arrays by name, from the study's set if they are there.

    It is computed anew if the function's code (as `code_behind` has it), the run or an argument (by
    its `repr`) changes. For values that it takes from around it, delete the set's folder computed/.
    """
    trained = repr(result.metrics)  # trained on another machine, a run's weights are others
    about = "\n".join([code_behind(function), result.run.key, trained, *map(repr, arguments)])
    name = f"{function.__name__}-{hashlib.sha256(about.encode()).hexdigest()[:12]}.npz"
    path = study.folder / "computed" / name
    return cached(path, lambda: function(result, *arguments), np.savez_compressed)


def describe_data(dataset: Dataset, role: str = "study") -> dict[str, Any]:
    """Return what a result file says of a dataset; its role is "second" besides the study's own."""
    names = ("title", "classes", "image_size", "fingerprint")
    about = {name: getattr(dataset, name) for name in names}
    sizes = {f"{split}_size": len(getattr(dataset, split)) for split in SPLITS}
    return {"role": role, "name": dataset_slug(dataset.name)} | about | sizes


def save_results(study: Study, name: str, values: dict[str, Any]) -> Path:
    """Write a notebook's results as JSON into the study's set; ValueError for a NaN."""
    content = {"profile": asdict(study.profile), "machine": machine(study.device), **values}
    path = study.folder / "results" / f"{name}.json"
    text = json.dumps(content, indent=1, allow_nan=False, default=_plain)
    write_atomically(path, text.encode())
    return path


def _plain(value: Any) -> Any:
    """Turn what json doesn't know into what it does: intervals, verdicts, tables, NumPy's."""
    if isinstance(value, Interval):
        return asdict(value) | {"text": value.percent()}
    if isinstance(value, Verdict):
        about = {"verdict": value.word, "text": str(value), "effect": value.reason}
        about["effects"] = {name: asdict(effect) for name, effect in value.effects.items()}
        return vars(value) | about | {"seeds": min(e.n for e in value.effects.values())}
    if isinstance(value, pd.DataFrame):
        table = value.reset_index().astype(str)
        return {"columns": list(map(str, table.columns)), "rows": table.to_numpy().tolist()}
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} can't be written as JSON")
