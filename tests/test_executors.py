"""Many runs: variants, one after the other or several at a time, and how far they are."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from helpers import executors
from helpers.config import Study
from helpers.data import Dataset, study_data
from helpers.executors import cost, is_finished, train_all, train_variants
from helpers.recipes import RECIPES
from helpers.runs import Run, RunError, load_or_train, make_run


@pytest.fixture
def dataset(study: Study) -> Dataset:
    return study_data(study)


def small(study: Study, dataset: Dataset, seed: int = 0, **changes) -> Run:
    return make_run(study, dataset, "simple_cnn", seed=seed, **changes)


def test_variants_are_trained_once_a_seed(study: Study, dataset: Dataset) -> None:
    other = study_data(study, train_size=60)
    variants = {
        "as it is": {"model": "simple_cnn"},
        "dropout": {"model": "simple_cnn", "dropout": 0.5},
        ("other", 60): {"model": "simple_cnn", "data": other},
        "of the seed": lambda seed: {"model": "simple_cnn", "epochs": 1 + seed},
    }
    found = train_variants(study, dataset, variants)
    assert list(found) == list(variants)
    for results in found.values():
        assert [r.run.seed for r in results] == list(study.profile.seeds)
    assert found["as it is"][0].run == small(study, dataset)
    assert found["dropout"][1].run == small(study, dataset, seed=1, dropout=0.5)
    assert found["other", 60][0].run.train_size == 60
    assert [r.run.epochs for r in found["of the seed"]] == [1, 2]
    assert train_variants(study, dataset, {"default": {"epochs": 1}})["default"][0].run.model == (
        "resnet18"
    )


def test_stored_runs_are_not_trained_again(study: Study, dataset: Dataset, monkeypatch) -> None:
    run = small(study, dataset)
    first = train_all([run, run], study)
    assert list(first) == [run] and is_finished(run, study)
    monkeypatch.setattr("helpers.runs.train", lambda *_, **__: pytest.fail("trained again"))
    assert torch.equal(train_all([run], study)[run].test_logits, first[run].test_logits)


def diverging(study: Study, dataset: Dataset) -> Run:
    steep = replace(RECIPES["adam"], learning_rate=1e30)
    return small(study, dataset, recipe=steep)


def installed_executors() -> list[str]:
    try:
        import ray  # noqa: F401
    except ImportError:
        return ["processes"]
    return ["processes", "ray"]


@pytest.mark.parametrize("executor", installed_executors())
def test_several_at_a_time_give_the_same_and_failures_stop_nobody(
    study: Study, dataset: Dataset, executor: str, tmp_path, monkeypatch
) -> None:
    if executor == "ray":
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    good = [small(study, dataset, seed=seed) for seed in (0, 1)]
    elsewhere = replace(study, executor=executor, runs_dir=tmp_path / "elsewhere")
    with pytest.raises(RunError, match="1 of 3 runs failed:\n.*TrainingDiverged") as error:
        train_all([diverging(study, dataset), *good], elsewhere)
    assert all(run.key not in str(error.value) for run in good)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = train_all(good, study)
    finally:
        torch.set_num_threads(threads)
    for run in good:
        stored = load_or_train(run, elsewhere)
        assert torch.equal(stored.test_logits, here[run].test_logits)
        for name in ("model.safetensors", "predictions.npz"):
            assert (stored.folder / name).read_bytes() == (here[run].folder / name).read_bytes()
    if executor == "ray":
        import ray

        ray.shutdown()


def test_here_an_error_ends_the_list(study: Study, dataset: Dataset) -> None:
    with pytest.raises(RuntimeError, match="stopped being finite"):
        train_all([diverging(study, dataset), small(study, dataset)], study)
    assert not is_finished(small(study, dataset), study)


def test_ray_that_is_missing_is_named(study: Study, dataset: Dataset, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match="pip install"):
        train_all([small(study, dataset)], replace(study, executor="ray"))


def test_costs_order_runs(study: Study, dataset: Dataset) -> None:
    cheap = small(study, dataset)
    assert cost(replace(cheap, epochs=4)) == pytest.approx(2 * cost(cheap))
    deeper = [make_run(study, dataset, name, seed=0) for name in ("resnet18", "resnet34")]
    costs = [cost(run) for run in (cheap, *deeper)]
    assert costs == sorted(costs) and len(set(costs)) == 3
    assert cost(replace(cheap, train_size=None)) > cost(cheap)


def test_progress_is_written_where_the_study_says(study: Study, dataset: Dataset, tmp_path) -> None:
    path = tmp_path / "progress"
    runs = [small(study, dataset, seed=seed) for seed in (0, 1)]
    shown = replace(study, progress=f"file:{path}")
    load_or_train(runs[0], study)
    with executors.show_progress(runs, shown, "two runs"):
        folder = study.runs_dir / runs[1].key
        folder.mkdir(parents=True)
        row = "1,0.1,2.0,0.25,2.1,0.625,1.5\n"
        (folder / "history.csv").write_text(
            "epoch,learning_rate,train_loss,train_accuracy,validation_loss,validation_accuracy,"
            f"seconds\n{row}"
        )
        time.sleep(1.6)
        text = path.read_text()
    assert "two runs:  75%" in text and "1 of 2 runs done" in text
    assert "seed 1: epoch 1/2, validation 62.5 %" in text


def train_two(study: Study, runs: list[Run]) -> None:
    train_all(runs, study)


def test_an_interrupted_list_goes_on(study: Study, dataset: Dataset) -> None:
    runs = [small(study, dataset, seed=seed, epochs=40) for seed in (0, 1)]
    process = multiprocessing.get_context("spawn").Process(target=train_two, args=(study, runs))
    process.start()
    deadline = time.monotonic() + 60
    while not is_finished(runs[0], study) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode not in (None, 0) or is_finished(runs[1], study)
    undisturbed = replace(study, runs_dir=study.runs_dir.parent / "undisturbed")
    for run in runs:
        one, other = load_or_train(run, study), load_or_train(run, undisturbed)
        assert torch.equal(one.test_logits, other.test_logits)
        assert one.history.drop(columns="seconds").equals(other.history.drop(columns="seconds"))
