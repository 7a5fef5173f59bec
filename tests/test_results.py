"""Comparisons of results, and result files."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import evaluation, results
from helpers.config import Study
from helpers.data import Dataset
from helpers.evaluation import Interval, percent, seeds_intervals, verdict
from helpers.runs import Result, Run, load_or_train, machine


@pytest.fixture
def result(small_run: Callable[..., Run], small_study: Study) -> Result:
    return load_or_train(small_run(), small_study)


def with_correct(result: Result, seed: int, correct: list[int]) -> Result:
    """The result of another seed that classified these images rightly (1) or not (0)."""
    labels = torch.zeros(len(correct), dtype=torch.int64)
    logits = torch.tensor([[1.0, 0.0] if right else [0.0, 1.0] for right in correct])
    run = replace(result.run, seed=seed)
    return replace(result, run=run, test_logits=logits, test_labels=labels)


def test_intervals_are_pooled_over_names_and_differences_are_paired(result: Result) -> None:
    rights = {
        "good": ([1, 1, 1, 0] * 30, [1, 1, 1, 1, 1, 1, 1, 0] * 15),
        "poor": ([1, 0, 0, 0] * 30, [1, 0, 0, 1, 1, 0, 0, 0] * 15),
        "best": ([1] * 120, [1] * 120),
    }
    made = {
        name: [with_correct(result, seed, right) for seed, right in enumerate(both)]
        for name, both in rights.items()
    }
    tables = {name: np.array(both, dtype=float) for name, both in rights.items()}
    found, expected = results.accuracies(made), seeds_intervals(tables)
    assert found["good"] == expected["good"] and found["good"].mean == pytest.approx(0.8125)
    # Pooled: a configuration whose seeds agree has an interval, cut off where accuracy ends.
    assert expected["best"].high > 1 and found["best"] == replace(expected["best"], high=1)
    contrasts = {name: {name: 1, "poor": -1} for name in ("good", "best")}
    found = results.differences(made, "poor")
    assert list(found) == ["good", "best"] and found == seeds_intervals(tables, contrasts)


def test_results_of_other_seeds_or_images_are_not_compared(result: Result) -> None:
    good, poor = ([with_correct(result, s, [right, 1]) for s in (0, 1)] for right in (1, 0))
    other_images = [poor[0], replace(poor[1], test_labels=1 - poor[1].test_labels)]
    for others, message in (
        (poor[::-1], "differ in seed or test images"),
        (other_images, "differ in seed or test images"),
        (poor[:1], "longer"),
    ):
        with pytest.raises(ValueError, match=message):
            results.differences({"good": good, "poor": others}, "good")


def test_means_and_networks_that_were_trained_out(result: Result) -> None:
    made = [
        replace(result, metrics={"train": {"accuracy": train}, "test": {"accuracy": test, "f1": 1}})
        for train, test in ((0.95, 0.5), (0.99, 0.7))
    ]
    assert results.mean_metrics(made) == pytest.approx({"accuracy": 0.6, "f1": 1})
    assert results.mean_metrics(made, "train") == pytest.approx({"accuracy": 0.97})
    assert results.trained_out(made)
    made[1].metrics["train"]["accuracy"] = 0.949
    assert not results.trained_out(made)


def test_a_result_file_holds_what_is_shown_as_text(study: Study, small_shapes: Dataset) -> None:
    interval = Interval(0.5, 0.4, 0.6, 2)
    judged = verdict("A is better", interval, source="A wins")
    table = pd.DataFrame({"accuracy": ["50.0"], "n": [2]}, index=pd.Index(["a"], name="network"))
    values = {"interval": interval, "claims": [judged], "table": table, "counts": np.arange(2)}
    values |= {"data": results.describe_data(small_shapes), "share": np.float32(0.5)}
    path = results.save_results(study, "04_depth", values)
    assert path == study.folder / "results" / "04_depth.json"
    found = json.loads(path.read_text())
    assert found["interval"] == asdict(interval) | {"text": "50.0 [40.0, 60.0]"}
    text = "**Holds.** A is better: +50.0 points [+40.0, +60.0]."
    expected = {"claim": "A is better", "verdict": "holds", "text": text, "source": "A wins"}
    expected |= {"effect": "+50.0 points [+40.0, +60.0]", "effects": {"": asdict(interval)}}
    expected |= {"word": "holds", "unit": "points", "trained_out": None, "seeds": 2}
    assert found["claims"] == [expected]
    assert found["table"] == {"columns": ["network", "accuracy", "n"], "rows": [["a", "50.0", "2"]]}
    assert (found["counts"], found["share"]) == ([0, 1], 0.5)
    assert (found["profile"]["name"], found["machine"]) == ("smoke", machine(study.device))


def test_what_needs_a_network_is_computed_once(study: Study, result: Result) -> None:
    calls = []

    def times(result: Result, factor: int) -> dict[str, np.ndarray]:
        calls.append((result.run.seed, factor))
        return {"values": factor * np.arange(3)}

    other = replace(result, run=replace(result.run, seed=7))
    for given in [(result, 2), (result, 2), (result, 3), (other, 2), (result, 2)]:
        assert list(results.computed(study, times, *given)["values"]) == [0, given[1], 2 * given[1]]
    assert calls == [(0, 2), (0, 3), (7, 2)]

    def times(result: Result, factor: int) -> dict[str, np.ndarray]:
        return {"values": 1 + factor * np.arange(3)}

    assert list(results.computed(study, times, result, 2)["values"]) == [1, 3, 5]


def beside(logits: torch.Tensor) -> float:
    return percent(float(logits.mean()))


def stands_on(result: Result) -> dict[str, str]:
    return {"share": beside(result.test_logits)}


def test_code_behind_a_function_is_all_it_stands_on_but_what_runs_are() -> None:
    code = results.code_behind(stands_on)
    for part in (stands_on, beside, evaluation, evaluation.Split, evaluation.normalise):
        assert inspect.getsource(part) in code  # evaluation builds on data and loader
    for part in (load_or_train, results, Result):
        assert inspect.getsource(part) not in code


@pytest.mark.parametrize("bad", [math.nan, np.float64("inf"), np.array([math.nan]), torch.ones(1)])
def test_a_refused_value_leaves_the_last_result(study: Study, bad: Any) -> None:
    path = results.save_results(study, "04_depth", {"accuracy": 0.5})
    before = path.read_bytes()
    with pytest.raises((ValueError, TypeError), match="not JSON compliant|Tensor can't be written"):
        results.save_results(study, "04_depth", {"accuracy": bad})
    assert path.read_bytes() == before


def test_data_is_described_with_its_role(small_shapes: Dataset) -> None:
    about = results.describe_data(small_shapes)
    assert about == {
        **{"role": "study", "name": "shapes", "title": "Shapes", "image_size": 16},
        **{"classes": small_shapes.classes, "fingerprint": small_shapes.fingerprint},
        **{"train_size": 80, "validation_size": 40, "test_size": 40},
    }
    second = results.describe_data(replace(small_shapes, name="/there/My Birds"), role="second")
    assert (second["role"], second["name"]) == ("second", "my-birds")
