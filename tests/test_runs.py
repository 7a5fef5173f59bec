"""Runs: keys, stored results, one trainer at a time, and the table of what is stored."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

from benchmarks.soak import make_study
from helpers import config, data, runs, shapes, training
from helpers.config import Study
from helpers.data import NO_AUGMENTATION, Augmentation
from helpers.evaluation import Interval, metrics, predict
from helpers.runs import (
    Result,
    Run,
    RunError,
    load_or_train,
    load_result,
    run_from_dict,
    stored_runs,
)
from helpers.starts import Transfer
from helpers.training import RECIPES, Progress, Recipe, TrainingDiverged

RECIPE = Recipe("test", "sgd", 0.05, "triangular", batch_size=16, epochs=2)


SIZES = {"image_size": 16, "train_size": 80, "validation_size": 40, "test_size": 40}


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run()


def make_run(**changes: Any) -> Run:
    fingerprint = data.load_dataset("shapes", **SIZES).fingerprint
    settings = {"recipe": RECIPE, "epochs": 2, "seed": 0, "width": 0.25, "dropout": 0.2, **SIZES}
    return Run("shapes", fingerprint, "simple_cnn", **settings | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of a study in which the run is finished."""
    study = make_study(tmp_path_factory.mktemp("finished"))
    load_or_train(make_run(), study)
    return study.runs_dir


@pytest.fixture
def stored(finished: Path, study: Study) -> Study:
    """A study of one's own with a finished run in it."""
    shutil.copytree(finished, study.runs_dir)
    return study


def refuse_to_train(patch: pytest.MonkeyPatch) -> None:
    def train(*_: object, **__: object) -> None:
        raise AssertionError("it trained")

    patch.setattr(runs, "train", train)


# --- Keys and validation -----------------------------------------------------------------------

OTHER = {
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
    "stem": "imagenet",
    "residual": False,
    "dropout": 0.25,
    "patience": 5,
    "start": Transfer(Run("shapes", "0" * 16, "simple_cnn", RECIPE, epochs=2, seed=0, width=0.25)),
}
OTHER_RECIPE = {
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
    "augmentation": Augmentation(flip=False, crop_padding=0, cutout=4),
}


def test_equal_runs_have_equal_keys(run: Run) -> None:
    again = make_run()
    assert again is not run and again == run and again.key == run.key
    assert hash(again) == hash(run)


def test_the_key_is_readable_and_fit_for_a_folder(run: Run) -> None:
    assert run.key.startswith("shapes-simple_cnn-test-seed0-")
    plain = replace(run, model="resnet20", residual=False, seed=3)
    assert plain.key.startswith("shapes-resnet20-plain-test-seed3-")
    assert Path(run.key).name == run.key


def test_the_key_does_not_change_between_versions() -> None:
    """Stored runs would be lost. A change of what decides a result needs a new key, though."""
    fixed = Run("digits", "0123456789abcdef", "resnet18", RECIPES["fast"], epochs=12, seed=1)
    assert fixed.key == "digits-resnet18-fast-seed1-d3ff83b8b2b7"


@pytest.mark.parametrize("name", [field.name for field in fields(Run)])
def test_each_field_changes_the_key(run: Run, name: str) -> None:
    other = replace(run, **{name: OTHER[name]})
    assert other != run
    assert other.key.rsplit("-", 1)[1] != run.key.rsplit("-", 1)[1]


@pytest.mark.parametrize("name", [field.name for field in fields(Recipe)])
def test_each_field_of_the_recipe_changes_the_key(run: Run, name: str) -> None:
    other = replace(run, recipe=replace(RECIPE, **{name: OTHER_RECIPE[name]}))
    assert other.key.rsplit("-", 1)[1] != run.key.rsplit("-", 1)[1]


@pytest.mark.parametrize(
    "change",
    [
        {"flip": True},
        {"crop_padding": 1},
        {"cutout": 1},
        {"colour_jitter": 0.1},
        {"trivial_augment": True},
        {"mixup": 0.2},
    ],
)
def test_each_field_of_the_augmentation_changes_the_key(run: Run, change: dict) -> None:
    other = replace(run, recipe=replace(RECIPE, augmentation=replace(NO_AUGMENTATION, **change)))
    assert other.key != run.key


def test_a_setting_is_the_same_as_whole_number_and_as_float(run: Run) -> None:
    one = replace(run, width=1, dropout=0, recipe=replace(RECIPE, weight_decay=0, momentum=0))
    other = replace(run, width=1.0, dropout=0.0, recipe=replace(RECIPE, momentum=0.0))
    assert one == other and one.key == other.key


def test_a_folders_place_does_not_enter_the_key_but_its_content_does(run: Run) -> None:
    here, there = (replace(run, dataset=f"/{place}/birds") for place in ("here", "there"))
    assert here.key == there.key
    assert replace(here, fingerprint="0" * 16).key != here.key
    assert replace(run, dataset="/here/fish").key != here.key


BAD_SETTINGS = [
    ("model", "resnet19"),
    ("recipe", "fast"),
    ("epochs", 0),
    ("epochs", 2.0),
    ("seed", -1),
    ("seed", 2**32),
    ("seed", 0.5),
    ("image_size", 7),
    ("image_size", 4097),
    ("train_size", 0),
    ("validation_size", 0),
    ("test_size", 10.0),
    ("width", 0),
    ("width", 17),
    ("width", "wide"),
    ("stem", "large"),
    ("residual", "yes"),
    ("dropout", 1),
    ("dropout", -0.1),
    ("patience", 0),
    ("patience", 1.5),
    ("start", "imagenet"),
]


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS)
def test_a_run_refuses_what_is_not_allowed(run: Run, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} is .*expected "):
        replace(run, **{name: value})


def test_every_setting_has_a_refusal() -> None:
    checked_with_the_data = {"dataset", "fingerprint"}
    names = {field.name for field in fields(Run)}
    assert {name for name, _ in BAD_SETTINGS} == names - checked_with_the_data


def test_a_batch_larger_than_the_training_set_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="batch_size is 81, but train_size is 80"):
        replace(run, recipe=replace(RECIPE, batch_size=81))


def test_round_trip_through_json(run: Run) -> None:
    for original in (run, *(replace(run, **{name: value}) for name, value in OTHER.items())):
        assert run_from_dict(json.loads(json.dumps(asdict(original)))) == original


def test_weights_come_from_the_seed_alone(run: Run) -> None:
    before = torch.get_rng_state()
    first = run.build(10, 16).state_dict()
    torch.rand(5)
    same, other = run.build(10, 16).state_dict(), replace(run, seed=1).build(10, 16).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    torch.set_rng_state(before)
    run.build(10, 16)
    assert torch.equal(torch.get_rng_state(), before)


# --- Load or train -----------------------------------------------------------------------------


def test_trains_once_and_then_loads(
    monkeypatch: pytest.MonkeyPatch, study: Study, run: Run
) -> None:
    trained = load_or_train(run, study)
    folder = study.runs_dir / run.key
    names = {"run.json", "history.csv", "result.json", "predictions.npz", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} - {"lock"} == names
    assert run_from_dict(json.loads((folder / "run.json").read_text())) == run
    refuse_to_train(monkeypatch)
    loaded = load_or_train(run, study)
    assert loaded.run == run and loaded.folder == folder
    assert (loaded.metrics, loaded.seconds) == (trained.metrics, trained.seconds)
    pd.testing.assert_frame_equal(loaded.history, trained.history)
    with pytest.raises(AssertionError, match="it trained"):
        load_or_train(replace(run, seed=1), study)


def test_the_result_says_what_recomputing_says(stored: Study, run: Run) -> None:
    result = load_or_train(run, stored)
    dataset = run.load_data(stored.data_dir)
    assert result.classes == dataset.classes and result.image_size == 16
    assert torch.equal(result.test_labels, dataset.test.labels)
    assert torch.equal(result.validation_labels, dataset.validation.labels)
    assert result.metrics["test"] == metrics(result.test_logits, result.test_labels)
    model = result.load_model()
    assert not model.training
    for split in ("train", "validation", "test"):
        part = getattr(dataset, split)
        logits = predict(model, part, *dataset.channel_statistics)
        if split != "train":
            kept = getattr(result, f"{split}_logits")
            torch.testing.assert_close(logits, kept, rtol=1e-4, atol=1e-4)
        recomputed = metrics(logits, part.labels)
        assert result.metrics[split] == pytest.approx(recomputed, abs=1e-3)
    assert result.test_accuracy == result.correct.mean() == result.metrics["test"]["accuracy"]
    difference = result.metrics["train"]["accuracy"] - result.metrics["test"]["accuracy"]
    assert runs.gap(result) == difference
    assert list(result.history["epoch"]) == [1, 2]
    assert result.history["seconds"].sum() == pytest.approx(result.seconds)
    assert result.machine["torch"] == torch.__version__


def test_training_that_was_cut_off_is_resumed(
    monkeypatch: pytest.MonkeyPatch, study: Study, stored: Study, run: Run, tmp_path: Path
) -> None:
    other = make_study(tmp_path / "other")

    def stop(progress: Progress) -> None:
        if progress.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_train(run, other, on_progress=stop, checkpoint_seconds=0.0)
    folder = other.runs_dir / run.key
    (folder / ".resume.pt.123.tmp").write_bytes(b"of a process that was killed while writing")
    resumed = load_or_train(run, other)
    straight = load_or_train(run, stored)
    assert torch.equal(resumed.test_logits, straight.test_logits)
    assert not (folder / "resume.pt").exists() and not list(folder.glob(".*"))


FILES = ("result.json", "history.csv", "predictions.npz", "model.safetensors")


DAMAGES = [
    (name, damage)
    for name in FILES
    for damage in ("flipped", "truncated", "empty", "missing")
    if (name, damage) != ("result.json", "missing")  # without it, a run isn't finished
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_file_is_named_and_not_retrained(
    monkeypatch: pytest.MonkeyPatch, stored: Study, run: Run, name: str, damage: str
) -> None:
    refuse_to_train(monkeypatch)
    path = stored.runs_dir / run.key / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        # The middle of result.json may be a float's last digit, which can leave it the same number.
        place = content.index(b"metrics") if name == "result.json" else len(content) // 2
        content[place] ^= 1
        path.write_bytes({"flipped": content, "truncated": content[:-9]}.get(damage, b""))
    with pytest.raises(RunError, match="is missing" if damage == "missing" else "is damaged") as e:
        load_or_train(run, stored)
    assert str(e.value).startswith(f"{path} ")
    assert f"Delete the folder {path.parent} to train this run again." in str(e.value)


def test_a_number_changed_by_hand_is_noticed(stored: Study, run: Run) -> None:
    path = stored.runs_dir / run.key / "result.json"
    summary = json.loads(path.read_text())
    summary["metrics"]["test"]["accuracy"] = 0.999
    path.write_text(json.dumps(summary))
    with pytest.raises(RunError, match="checksum doesn't fit"):
        load_or_train(run, stored)


def test_another_format_is_refused(stored: Study, run: Run) -> None:
    path = stored.runs_dir / run.key / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    with pytest.raises(RunError, match="has format 0, expected 1"):
        load_or_train(run, stored)


def test_the_result_of_another_run_is_refused(stored: Study, run: Run) -> None:
    other = replace(run, seed=1)
    shutil.copytree(stored.runs_dir / run.key, stored.runs_dir / other.key)
    with pytest.raises(RunError, match=f"belongs to the run {run.key}, expected {other.key}"):
        load_or_train(other, stored)


def test_a_run_that_diverged_is_marked_failed(
    monkeypatch: pytest.MonkeyPatch, study: Study, run: Run
) -> None:
    hopeless = replace(run, recipe=replace(RECIPE, learning_rate=1e30))
    with pytest.raises(TrainingDiverged, match="epoch 1, step"):
        load_or_train(hopeless, study)
    folder = study.runs_dir / hopeless.key
    assert not (folder / "result.json").exists()
    assert list(stored_runs(study.runs_dir)["state"]) == ["failed"]
    with monkeypatch.context() as patch:
        refuse_to_train(patch)
        with pytest.raises(RunError, match="failed before: the training loss .* or delete") as e:
            load_or_train(hopeless, study)
    assert str(folder) in str(e.value)
    shutil.rmtree(folder)
    with pytest.raises(TrainingDiverged):  # the remedy: it's tried again
        load_or_train(hopeless, study)


def test_the_test_split_is_read_once_after_training(
    monkeypatch: pytest.MonkeyPatch, study: Study, run: Run
) -> None:
    order = []

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if name == "train" or arguments[1] is dataset.test:
                order.append(name)
            return function(*arguments, **options)

        return call

    dataset = run.load_data(study.data_dir)
    monkeypatch.setattr(Run, "load_data", lambda *_: dataset)
    monkeypatch.setattr(runs, "train", noted("train", runs.train))
    for module in (runs, training):
        monkeypatch.setattr(module, "predict", noted("test", predict))
    load_or_train(run, study)
    assert order == ["train", "test"]


def test_changed_images_raise(tmp_path: Path, study: Study, run: Run) -> None:
    images = tmp_path / "pictures"
    labels = np.arange(60) % 3
    for number, image in enumerate(shapes.draw(labels, image_size=16, seed=0).images):
        path = images / "train" / "abc"[labels[number]] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image)
    first = data.load_dataset(str(images), data_dir=study.data_dir)
    sizes = dict.fromkeys(SIZES)
    mine = replace(run, dataset=str(images), fingerprint=first.fingerprint, **sizes)
    assert len(load_or_train(mine, study).classes) == 3
    cv2.imwrite(str(images / "train" / "a" / "0.png"), np.zeros((16, 16, 3), np.uint8))
    data._real_dataset.cache_clear()  # as a new process would
    with pytest.raises(RunError, match=f"but the run was made for {first.fingerprint}"):
        load_or_train(replace(mine, seed=1), study)
    assert load_or_train(mine, study).run == mine  # what is finished stays readable


def test_progress_outside_a_terminal_is_plain_lines(
    study: Study, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(runs, "SECONDS_BETWEEN_LINES", 0)
    both = [run, make_run(seed=1)]
    runs.train_all(both, replace(study, progress="bar"), title="seeds")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "\r" not in printed.err and "\x1b" not in printed.err
    lines = printed.err.splitlines()
    assert lines[0] == f"seeds 1/2: {run.label()}, 2 epochs"
    assert f"seeds 2/2: {both[1].label()}, 2 epochs" in lines
    assert any(line.startswith(f"seeds 1/2: {run.label()}, epoch 2/2, loss ") for line in lines)
    # What is stored already needs no line.
    runs.train_all(both, replace(study, progress="bar"), title="seeds")
    assert capsys.readouterr().err == ""


def test_train_all_keeps_the_order_and_trains_each_once(
    monkeypatch: pytest.MonkeyPatch, stored: Study, run: Run
) -> None:
    other = replace(run, seed=1, epochs=1)
    trained = []
    train = runs.train
    monkeypatch.setattr(
        runs, "train", lambda *a, **o: (trained.append(o["identity"]), train(*a, **o))[1]
    )
    results = runs.train_all([other, run, other], stored)
    assert list(results) == [other, run]
    assert trained == [other.key]
    assert results[run].run == run


# --- Several processes -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.runs", "torch._dynamo"])
    return context


def slow_load_or_train(run: Run, folder: Path, place: Any) -> None:
    """Load or train slowly; tell whether this process trained, and what it got."""
    torch.set_num_threads(1)
    trained = False
    step = training._Loop._train_step

    def slow(self: Any, *rest: Any) -> None:
        nonlocal trained
        trained = True
        place.send("training")
        step(self, *rest)
        time.sleep(0.05)

    training._Loop._train_step = slow
    result = load_or_train(run, make_study(folder))
    place.send((trained, result.metrics))


def hold_lock(path: Path, place: Any) -> None:
    path.parent.mkdir(parents=True)
    lock = FileLock(path)
    lock.acquire()
    place.send("held")
    time.sleep(600)


def test_two_processes_share_a_run(processes: Any, run: Run, tmp_path: Path) -> None:
    ends, started = [], []
    for _ in range(2):
        mine, theirs = processes.Pipe()
        arguments = (run, tmp_path, theirs)
        process = processes.Process(target=slow_load_or_train, args=arguments, daemon=True)
        process.start()
        theirs.close()  # so that a process that dies ends the waiting for its answer
        started.append(process)
        ends.append(mine)
    answers = []
    for process, end in zip(started, ends, strict=True):
        while (answer := end.recv()) == "training":
            pass
        answers.append(answer)
        process.join()
        assert process.exitcode == 0
    assert sorted(trained for trained, _ in answers) == [False, True]
    assert answers[0][1] == answers[1][1]


def test_the_lock_of_a_dead_process_does_not_block(
    processes: Any, run: Run, tmp_path: Path
) -> None:
    study = make_study(tmp_path)
    lock = study.runs_dir / run.key / "lock"
    mine, theirs = processes.Pipe()
    process = processes.Process(target=hold_lock, args=(lock, theirs), daemon=True)
    process.start()
    theirs.close()
    assert mine.recv() == "held"
    assert lock.exists()
    with pytest.raises(TimeoutError):
        FileLock(lock).acquire(timeout=0.2)  # it does block while its process lives
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert load_or_train(run, study).run == run


# --- The table ---------------------------------------------------------------------------------


def test_the_table_shows_every_state(stored: Study, run: Run) -> None:
    variants = {seed: replace(run, seed=seed) for seed in range(1, 5)}
    for variant in variants.values():
        folder = stored.runs_dir / variant.key
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(asdict(variant)))
    (stored.runs_dir / variants[1].key / "failed.json").write_text('{"error": "x"}')
    resumable = stored.runs_dir / variants[2].key
    (resumable / "resume.pt").write_bytes(b"")
    (resumable / "history.csv").write_text("epoch,seconds\n1,2.0\n")
    damaged = stored.runs_dir / variants[3].key
    shutil.copytree(stored.runs_dir / run.key, damaged, dirs_exist_ok=True)
    (damaged / "run.json").write_text(json.dumps(asdict(variants[3])))
    (damaged / "model.safetensors").write_bytes(b"")
    (stored.runs_dir / "not-a-run").mkdir()
    table = stored_runs(stored.runs_dir).set_index("run")
    states = table["state"]
    assert states[run.key] == "finished"
    assert states[variants[1].key] == "failed"
    assert states[variants[2].key] == "resumable"
    assert states[variants[3].key].startswith("damaged: ")
    assert states[variants[4].key] == "begun"
    assert len(table) == 5
    assert list(table.loc[[run.key, variants[2].key, variants[1].key], "epochs"]) == [2, 1, ""]
    result = load_result(run, stored.runs_dir / run.key)
    assert table.loc[run.key, "test accuracy"] == f"{100 * result.test_accuracy:.2f} %"
    assert table.loc[run.key, "gap"] == f"{100 * runs.gap(result):.2f}"


def list_runs(patch: pytest.MonkeyPatch, runs_dir: Path) -> None:
    """Do what `python -m helpers.runs` does."""
    patch.setenv("RUNS_DIR", str(runs_dir))
    config.study.cache_clear()
    try:
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(runs.__file__, run_name="__main__")
    finally:
        config.study.cache_clear()
    assert caught.value.code == 0


def test_the_command_lists_stored_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stored: Study, run: Run
) -> None:
    (stored.runs_dir / "half").mkdir()
    (stored.runs_dir / "half" / "run.json").write_text("{}")
    list_runs(monkeypatch, stored.runs_dir)
    shown = capsys.readouterr()
    assert shown.err == ""
    header, *rows = shown.out.splitlines()
    names = "run state images width dropout weight decay epochs test accuracy gap seconds device"
    assert header.split() == names.split()
    assert [row.split()[:2] for row in rows] == [["half", "begun"], [run.key, "finished"]]
    assert rows[1].split()[2:7] == ["80", "0.25", "0.2", "0.0", "2"]


def test_the_command_says_what_is_wrong_with_a_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROFILE", "huge")
    config.study.cache_clear()
    assert runs.main() == 2
    assert "PROFILE='huge' is unknown" in capsys.readouterr().err


def test_a_label_says_what_differs_from_the_recipe(run: Run) -> None:
    fast = replace(run, recipe=RECIPES["fast"], train_size=None, dropout=0.0)
    assert fast.label() == "simple_cnn, recipe fast, seed 0"
    recipe = replace(fast.recipe, learning_rate=0.1, weight_decay=0.0, augmentation=NO_AUGMENTATION)
    changed = replace(fast, recipe=recipe, dropout=0.5, patience=3, seed=1)
    assert changed.label() == (
        "simple_cnn, recipe fast, learning rate 0.1, weight decay 0, augmentation changed, "
        "dropout 0.5, patience 3, seed 1"
    )


def test_what_isnt_a_recipe_or_a_list_of_runs_is_named(stored: Study, run: Run) -> None:
    dataset = run.load_data(stored.data_dir)
    with pytest.raises(ValueError, match="recipe is 'fast'; expected a Recipe"):
        runs.make_run(stored, dataset, "resnet18", seed=0, recipe="fast")
    with pytest.raises(ValueError, match="expected a list of Runs"):
        runs.train_all(run, stored)


def test_the_command_says_when_there_is_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    list_runs(monkeypatch, tmp_path / "nothing")
    assert capsys.readouterr().out == f"no runs in {tmp_path / 'nothing'}\n"


def test_a_run_made_from_a_subset_is_of_that_subset_in_every_profile(tmp_path: Path) -> None:
    for profile in config.PROFILES.values():
        study = replace(config.study(), profile=profile, dataset="digits", data_dir=tmp_path)
        subset = runs.study_data(study, train_size=100)
        run = runs.make_run(study, subset, "simple_cnn", seed=0)
        assert len(run.load_data(tmp_path).train) == 100, profile.name


# --- What the notebooks say of several results --------------------------------------------------


@pytest.fixture
def result(run: Run, stored: Study) -> Result:
    return load_result(run, stored.runs_dir / run.key)


def with_correct(result: Result, seed: int, correct: list[int]) -> Result:
    """Return the result of another seed that classified these images rightly (1) or not (0)."""
    labels = torch.zeros(len(correct), dtype=torch.int64)
    logits = torch.tensor([[1.0, 0.0] if right else [0.0, 1.0] for right in correct])
    run = replace(result.run, seed=seed)
    return replace(result, run=run, test_logits=logits, test_labels=labels)


def test_a_paired_difference_is_that_of_the_first_over_the_reference(result: Result) -> None:
    good = [with_correct(result, seed, [1, 1, 1, 0] * 30) for seed in (0, 1)]
    poor = [with_correct(result, seed, [1, 0, 0, 0] * 30) for seed in (0, 1)]
    more, less = runs.paired_difference(good, poor), runs.paired_difference(poor, good)
    assert more.mean == pytest.approx(0.5) and 0 < more.low < 0.5 < more.high
    assert (less.mean, less.low) == pytest.approx((-more.mean, -more.high), abs=0.02)
    assert runs.accuracy_interval(good).mean == pytest.approx(0.75)
    with pytest.raises(ValueError, match="differ in seed or test images"):
        runs.paired_difference(good, poor[::-1])
    other_images = replace(poor[1], test_labels=1 - poor[1].test_labels)
    with pytest.raises(ValueError, match="differ in seed or test images"):
        runs.paired_difference(good, [poor[0], other_images])
    with pytest.raises(ValueError, match="shorter"):
        runs.paired_difference(good, poor[:1])


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.03, "A is 2.0 points more accurate than b (95 % interval +1.0 to +3.0)."),
        (-0.03, -0.01, "A is 2.0 points less accurate than b (95 % interval -3.0 to -1.0)."),
        (-0.01, 0.05, "Between a and b no difference is shown (95 % interval -1.0 to +5.0)."),
    ],
)
def test_a_sentence_says_no_more_than_the_interval(low: float, high: float, words: str) -> None:
    found = runs.difference_sentence("a", "b", Interval((low + high) / 2, low, high, 100))
    assert found.replace("\N{MINUS SIGN}", "-") == words


def test_results_are_regrouped_and_averaged_over_seeds(result: Result) -> None:
    results = [
        replace(
            result,
            run=replace(result.run, seed=seed),
            metrics={
                "train": {"accuracy": 0.9},
                "test": {"accuracy": accuracy, "loss": 1 - accuracy},
            },
        )
        for seed, accuracy in enumerate((0.5, 0.7))
    ]
    found = runs.mean_metrics(results)
    assert found == pytest.approx({"accuracy": 0.6, "loss": 0.4})
    assert runs.gap(results[0]) == pytest.approx(0.4)
    trained = {r.run: r for r in results}
    wanted = {"b": [results[1].run, results[0].run], "a": [results[0].run]}
    assert runs.by_name(trained, wanted) == {"b": results[::-1], "a": results[:1]}
    assert list(runs.by_name(trained, wanted)) == ["b", "a"]


@pytest.mark.parametrize("profile", ["smoke", "quick"])
def test_a_study_makes_runs_at_its_profiles_size(profile: str, tmp_path: Path) -> None:
    study = replace(make_study(tmp_path), profile=config.PROFILES[profile], dataset="digits")
    own = study.profile
    dataset = runs.study_data(study, image_size=16)
    there = data.load_dataset("digits", image_size=16)  # fewer than quick asks for
    assert len(dataset.train) == min(own.train_size, len(there.train))
    assert len(dataset.test) == min(own.test_size, len(there.test))
    made = runs.make_run(study, dataset, "resnet18", seed=1, image_size=16)
    assert (made.width, made.epochs, made.seed) == (own.width, own.epochs, 1)
    assert made.train_size == len(dataset.train) and made.fingerprint == dataset.fingerprint
    assert made.recipe == replace(RECIPES["fast"], batch_size=own.batch_size)
    few = replace(dataset, train=dataset.train.first(7))
    assert runs.make_run(study, few, "resnet18", seed=1).recipe.batch_size == 7
    patient = runs.make_run(study, dataset, "resnet18", seed=1, patience=3, epochs=5)
    assert (patient.patience, patient.epochs) == (3, 5)


def test_a_result_file_describes_its_data_and_holds_finite_numbers_alone(tmp_path: Path) -> None:
    study = replace(make_study(tmp_path), analysis_dir=tmp_path / "analysis")
    about = runs.describe_data(data.load_dataset("shapes", **SIZES))
    assert (about["name"], about["image_size"], about["train_size"]) == ("shapes", 16, 80)
    values = {"data": about, "interval": Interval(0.5, 0.4, 0.6, 10), "counts": np.arange(3)}
    path = runs.save_results(study, "04_depth", values)
    found = json.loads(path.read_text())
    assert path == study.results_dir / "04_depth.json"
    assert found["interval"] == {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    assert found["counts"] == [0, 1, 2] and found["profile"]["name"] == study.profile.name
    for bad in (float("nan"), np.float64("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            runs.save_results(study, "04_depth", {"accuracy": bad})
    with pytest.raises(TypeError, match="Tensor can't be written"):
        runs.save_results(study, "04_depth", {"accuracy": torch.zeros(1)})
    assert json.loads(path.read_text()) == found, "a refused result leaves the last one"
