"""Runs: keys, stored results, and one trainer at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from pydantic import TypeAdapter

from helpers import config, data, runs, training
from helpers.config import Study
from helpers.evaluation import metrics, predict
from helpers.loader import NO_AUGMENTATION, Augmentation
from helpers.recipes import RECIPES, Recipe
from helpers.runs import (
    IMAGENET,
    Pruning,
    Run,
    RunError,
    Transfer,
    load_or_train,
    make_run,
)

MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def run(small_run: MakeRun) -> Run:
    return small_run()


@pytest.fixture(scope="module")
def finished(
    run: Run, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Where the run was trained."""
    folder = tmp_path_factory.mktemp("finished")
    places = {"runs_dir": folder / "runs", "data_dir": shared_data}
    load_or_train(run, replace(config.study(), **places, device=torch.device("cpu")))
    return places


@pytest.fixture
def stored(finished: dict[str, Path], small_study: Study) -> Study:
    """A study of one's own with the finished run in it."""
    shutil.copytree(finished["runs_dir"], small_study.runs_dir)
    return small_study


def refuse_to_train(patch: pytest.MonkeyPatch) -> None:
    def train(*_: object, **__: object) -> None:
        raise AssertionError("it trained")

    patch.setattr(runs, "train", train)


CHANGES = {
    "dataset": "shapes-marked",
    "fingerprint": "0123456789abcdef",
    "model": "resnet20",
    "recipe": RECIPES["adam"],
    "epochs": 3,
    "seed": 1,
    "image_size": 24,
    "train_size": 81,
    "validation_size": 41,
    "test_size": None,
    "width": 0.5,
    "stem": "cifar",
    "residual": False,
    "dropout": 0.25,
    "patience": 5,
}
RECIPE_CHANGES = {
    "name": "other",
    "optimizer": "adamw",
    "learning_rate": 0.06,
    "schedule": "step",
    "batch_size": 17,
    "epochs": 3,
    "reference_batch_size": 16,
    "momentum": 0.8,
    "nesterov": True,
    "weight_decay": 1e-4,
    "label_smoothing": 0.1,
    "augmentation": Augmentation(),
}
AUGMENTATION_CHANGES = {
    "flip": True,
    "crop_padding": 1,
    "cutout": 1,
    "colour_jitter": 0.1,
    "trivial_augment": True,
    "mixup": 0.2,
}


def variants(run: Run) -> dict[str, Run]:
    """Runs that differ from a run in one setting each, settings of settings included."""
    found = {name: replace(run, **{name: value}) for name, value in CHANGES.items()}
    for name, value in RECIPE_CHANGES.items():
        found[f"recipe.{name}"] = replace(run, recipe=replace(run.recipe, **{name: value}))
    for name, value in AUGMENTATION_CHANGES.items():
        augmentation = replace(NO_AUGMENTATION, **{name: value})
        changed = replace(run, recipe=replace(run.recipe, augmentation=augmentation))
        found[f"augmentation.{name}"] = changed
    starts = {
        "transfer": Transfer(run),
        "frozen": Transfer(run, frozen=True),
        "factor": Transfer(run, rate_factor=0.5),
        "another source": Transfer(replace(run, seed=1)),
        "weights": Pruning(run, "weights", 0.5),
        "more weights": Pruning(run, "weights", 0.6),
        "channels": Pruning(run, "channels", 0.5),
    }
    return found | {name: replace(run, start=start) for name, start in starts.items()}


def test_every_setting_has_a_variant(run: Run) -> None:
    for kind, changes in ((Run, CHANGES | {"start": None}), (Recipe, RECIPE_CHANGES)):
        assert set(changes) == {field.name for field in fields(kind)}
    assert set(AUGMENTATION_CHANGES) == {field.name for field in fields(Augmentation)}


def test_equal_runs_have_equal_keys_and_every_setting_changes_them(
    run: Run, small_run: MakeRun
) -> None:
    again = small_run()
    assert again is not run and again == run and hash(again) == hash(run) and again.key == run.key
    hashes = [other.key.rsplit("-", 1)[1] for other in (run, *variants(run).values())]
    assert len(set(hashes)) == len(hashes) == len(set(variants(run).values())) + 1


def test_run_json_holds_the_whole_run(run: Run) -> None:
    for name, original in variants(run).items():
        written = json.dumps(asdict(original))
        assert TypeAdapter(Run).validate_json(written) == original, name


def test_a_whole_number_is_the_same_setting_as_its_float(run: Run) -> None:
    recipe = replace(run.recipe, weight_decay=0, momentum=0)
    one = replace(run, width=1, dropout=0, recipe=recipe)
    other = replace(run, width=1.0, dropout=0.0, recipe=replace(run.recipe, momentum=0.0))
    assert one == other and one.key == other.key


def test_the_key_is_readable_and_a_folder_is_known_by_name_and_content(run: Run) -> None:
    assert run.key.startswith("shapes-simple_cnn-test-seed0-")
    plain = replace(run, model="resnet20", residual=False, seed=3)
    assert plain.key.startswith("shapes-resnet20-plain-test-seed3-")
    assert replace(run, start=Transfer(run)).kind == "simple_cnn-transferred"
    assert replace(run, start=Pruning(run, "weights", 0.5)).kind == "simple_cnn-pruned"
    here, there = (replace(run, dataset=f"/{place}/my birds") for place in ("here", "there"))
    assert here.key == there.key and here.key.startswith("my-birds-simple_cnn-")
    assert replace(here, fingerprint="0" * 16).key != here.key
    first, second = (replace(run, start=Transfer(source)) for source in (here, there))
    assert first.key == second.key  # nor does the place of a source's folder enter


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: replace(r, train_size=15), "batch_size is 16; expected at most 15"),
        (lambda r: replace(r, model="resnet18", stem="imagenet"), "at least 33"),
        (lambda r: replace(r, width=0.5, start=Transfer(r)), "width is 0.5; .* has 0.25"),
        (lambda r: replace(r, model="resnet34", start=Transfer(r)), "model is 'resnet34'"),
        (
            lambda r: replace(r, dataset="digits", start=Pruning(r, "weights", 0.5)),
            "dataset is 'digits'",
        ),
        (
            lambda r: replace(r, start=Transfer(replace(r, start=Pruning(r, "channels", 0.5)))),
            "has lost channels",
        ),
        (
            lambda r: replace(r := replace(r, model="resnet20"), start=Pruning(r, "channels", 0.5)),
            "pad channels",
        ),
        (lambda r: replace(r, start=Transfer(IMAGENET)), "no weights for simple_cnn"),
        (lambda r: replace(r, model="resnet18", start=Transfer(IMAGENET)), "stem is 'auto'"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(
    run: Run, make: Callable[[Run], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(run)


def test_weights_come_from_the_seed_alone(run: Run) -> None:
    before = torch.get_rng_state()
    first = run.build(10, 16).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    same, other = run.build(10, 16).state_dict(), replace(run, seed=1).build(10, 16).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("profile", ["smoke", "quick"])
def test_a_study_makes_runs_at_its_profiles_size(profile: str, small_study: Study) -> None:
    study = replace(small_study, profile=config.PROFILES[profile], dataset="digits")
    dataset = data.study_data(study, image_size=16)
    run = make_run(study, dataset, "resnet18", seed=1)
    own = study.profile
    assert (run.width, run.epochs, run.seed, run.dropout) == (own.width, own.epochs, 1, 0)
    assert run.recipe == replace(RECIPES[own.recipe], batch_size=own.batch_size)
    loaded = run.load_data(study.data_dir)
    for split in data.SPLITS:
        assert torch.equal(getattr(loaded, split).images, getattr(dataset, split).images)
    few = replace(dataset, train=dataset.train.first(7))
    assert make_run(study, few, "resnet18", seed=1).recipe.batch_size == 7
    assert make_run(study, dataset, "resnet18", seed=1, train_size=5).recipe.batch_size == 5
    changed = make_run(study, dataset, "resnet18", seed=1, patience=3, epochs=5, test_size=9)
    assert (changed.patience, changed.epochs, changed.test_size) == (3, 5, 9)


def test_trains_once_and_then_loads(
    monkeypatch: pytest.MonkeyPatch, small_study: Study, run: Run
) -> None:
    trained = load_or_train(run, small_study)
    folder = small_study.runs_dir / run.key
    names = {"run.json", "history.csv", "result.json", "predictions.npz", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} - {"lock"} == names
    assert json.loads((folder / "run.json").read_bytes()) == asdict(run)
    refuse_to_train(monkeypatch)
    loaded = load_or_train(run, small_study)
    assert loaded.run == run and loaded.folder == folder
    assert (loaded.metrics, loaded.seconds) == (trained.metrics, trained.seconds)
    pd.testing.assert_frame_equal(loaded.history, trained.history)
    with pytest.raises(AssertionError, match="it trained"):
        load_or_train(replace(run, seed=1), small_study)


def test_the_result_says_what_recomputing_says(stored: Study, run: Run) -> None:
    result = load_or_train(run, stored)
    dataset, model = run.load_data(stored.data_dir), result.load_model()
    assert result.classes == dataset.classes and result.image_size == 16 and not model.training
    for split in data.SPLITS:
        part = getattr(dataset, split)
        logits = predict(model, part, *dataset.channel_statistics)
        assert result.metrics[split] == pytest.approx(metrics(logits, part.labels), abs=1e-6)
        if split != "train":
            assert torch.equal(getattr(result, f"{split}_labels"), part.labels)
            torch.testing.assert_close(getattr(result, f"{split}_logits"), logits)
    assert result.test_accuracy == result.correct.mean() == result.metrics["test"]["accuracy"]
    assert list(result.history["epoch"]) == [1, 2]
    assert result.history["seconds"].sum() == pytest.approx(result.seconds)
    assert not result.stopped_early and result.best_epoch in (1, 2)
    assert result.machine["torch"] == torch.__version__


def test_a_published_run_is_read_in_place_of_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, stored: Study, run: Run
) -> None:
    as_the_profile_says = {"recipe": replace(RECIPES["fast"], batch_size=16), "width": 0.125}
    run = replace(run, model="resnet18", dropout=0.0, seed=2, **as_the_profile_says)
    made = [run, replace(run, dropout=0.1)]
    first, second = (load_or_train(each, replace(stored, publish=True)) for each in made)
    weights = [result.load_model().state_dict() for result in (first, second)]
    clone = replace(stored, runs_dir=stored.runs_dir / "clone")
    with monkeypatch.context() as patch:
        refuse_to_train(patch)
        assert all(runs.is_finished(each, clone) for each in made)
        read = [load_or_train(each, clone) for each in made]
        near = {"rtol": 1e-3, "atol": 1e-6}  # float16
        torch.testing.assert_close(read[0].load_model().state_dict(), weights[0], **near)
    for result, there in zip(read, (first, second), strict=True):
        assert result.metrics == there.metrics and result.history.equals(there.history)
        assert np.array_equal(result.correct, there.correct)
        own, other = (r.validation_logits.softmax(1) for r in (result, there))
        torch.testing.assert_close(own, other, rtol=1e-2, atol=1e-3)
    again = [read[1].load_model().state_dict() for _ in range(2)][1]  # trained for, once
    torch.testing.assert_close(again, weights[1], rtol=0, atol=0)
    said = f"{made[1].key} was published without weights: training it\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("whole", [slice(-30), slice(200, None)])
def test_a_damaged_published_run_is_named(whole: slice, stored: Study, run: Run) -> None:
    load_or_train(run, replace(stored, publish=True))
    path = stored.folder / "runs" / f"{run.key}.zip"
    damaged = b"x" + path.read_bytes()[whole]
    for content in (damaged, b"PK\5\6" + bytes(18)):  # and an archive with nothing in it
        path.write_bytes(content)
        with pytest.raises(RunError, match=f"{path.name} is damaged"):
            load_or_train(run, replace(stored, runs_dir=stored.runs_dir / "clone"))


def test_the_test_split_is_read_once_after_training(
    monkeypatch: pytest.MonkeyPatch, small_study: Study, run: Run
) -> None:
    run, train, order = replace(run, test_size=37), runs.train, []  # no other split has 37 images

    def note(*arguments: Any, **options: Any) -> Any:
        if len(arguments[1]) == 37:
            order.append("test")
        return predict(*arguments, **options)

    for module in (runs, training):
        monkeypatch.setattr(module, "predict", note)
    monkeypatch.setattr(runs, "train", lambda *a, **o: (train(*a, **o), order.append("trained"))[0])
    load_or_train(run, small_study)
    assert order == ["trained", "test"]


def test_images_that_have_changed_are_refused(
    drawn_folder: Path, small_study: Study, small_run: MakeRun, run: Run
) -> None:
    first = data.load_dataset(str(drawn_folder), data_dir=small_study.data_dir)
    sizes = dict.fromkeys(("image_size", *(f"{split}_size" for split in data.SPLITS)))
    mine = small_run(first, recipe=replace(run.recipe, batch_size=4), **sizes)
    assert len(load_or_train(mine, small_study).classes) == 2
    changed = next(drawn_folder.rglob("*.png"))
    cv2.imwrite(str(changed), np.zeros((24, 24, 3), np.uint8))
    with pytest.raises(RunError, match=f"made for {first.fingerprint}: its images have changed"):
        load_or_train(replace(mine, seed=1), small_study)
    assert load_or_train(mine, small_study).run == mine  # what is finished stays readable


processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["helpers.runs", "torch._dynamo"])


def slow_load_or_train(run: Run, study: Study, pipe: Any) -> None:
    """Load or train slowly; tell whether this process trained, and what it got."""
    trained = []
    result = load_or_train(run, study, on_epoch=lambda _: (trained.append(1), time.sleep(0.3)))
    pipe.send((bool(trained), result.metrics))


def hold_lock(path: Path, pipe: Any) -> None:
    path.parent.mkdir(parents=True)
    lock = FileLock(path)
    lock.acquire()
    pipe.send("held")
    time.sleep(600)


def test_two_processes_share_a_run(run: Run, small_study: Study) -> None:
    started = []
    for _ in range(2):
        here, there = processes.Pipe()
        process = processes.Process(target=slow_load_or_train, args=(run, small_study, there))
        process.start()
        there.close()  # so that a process that dies ends the waiting for its answer
        started.append((process, here))
    answers = [here.recv() for _, here in started]
    assert sorted(trained for trained, _ in answers) == [False, True]
    assert answers[0][1] == answers[1][1]
    for process, _ in started:
        process.join()
        assert process.exitcode == 0


def test_the_lock_of_a_dead_process_does_not_block(run: Run, small_study: Study) -> None:
    lock = small_study.runs_dir / run.key / "lock"
    here, there = processes.Pipe()
    process = processes.Process(target=hold_lock, args=(lock, there), daemon=True)
    process.start()
    there.close()
    assert here.recv() == "held"
    with pytest.raises(TimeoutError):
        FileLock(lock).acquire(timeout=0.2)  # it does block while its process lives
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert load_or_train(run, small_study).run == run
