"""Many runs: in this process, in several, or by Ray, with the same results and one progress bar."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from filelock import FileLock
from joblib import cpu_count, register_parallel_backend
from joblib.parallel import SequentialBackend

from helpers import executors, runs
from helpers.config import ROOT, Study
from helpers.data import Dataset, load_dataset
from helpers.executors import cost, train_all, train_variants
from helpers.recipes import RECIPES
from helpers.runs import Pruning, Result, Run, RunError, load_or_train, load_result

MakeRun = Callable[..., Run]
Differing = Callable[[Result, Result], list[str]]


def test_variants_are_trained_once_a_seed(small_study: Study, small_shapes: Dataset) -> None:
    sizes = {"image_size": 16, "train_size": 60, "validation_size": 30, "test_size": 30}
    digits = load_dataset("digits", data_dir=small_study.data_dir, **sizes)
    adam = {"model": "simple_cnn", "recipe": RECIPES["adam"]}
    (plain,) = train_variants(small_study, small_shapes, {"plain": adam}).values()

    def pruned(seed: int) -> dict[str, Any]:
        return adam | {"start": Pruning(plain[seed].run, "weights", 0.5)}

    variants = {"plain": adam, ("pruned", 0.5): pruned, "digits": adam | {"data": digits}, "": {}}
    found = train_variants(small_study, small_shapes, variants, title="variants")
    assert list(found) == list(variants)
    for seed in (0, 1):
        made = runs.make_run(small_study, small_shapes, seed=seed, **adam)
        assert found["plain"][seed].run == plain[seed].run == made
        assert found["pruned", 0.5][seed].run.start.source == made
        resnet = runs.make_run(small_study, small_shapes, "resnet18", seed=seed)
        assert found[""][seed].run == resnet
        other = found["digits"][seed].run
        assert (other.fingerprint, other.train_size) == (digits.fingerprint, 60)
    assert len(list(small_study.runs_dir.glob("*/result.json"))) == 8
    assert adam == {"model": "simple_cnn", "recipe": RECIPES["adam"]}  # settings stay as given


def test_results_come_in_the_order_asked_for_and_each_run_is_trained_once(
    monkeypatch: pytest.MonkeyPatch, small_study: Study, small_run: MakeRun
) -> None:
    trained, train = [], runs.train

    def noted(*arguments: Any, **options: Any) -> Any:
        trained.append(options["seed"])
        return train(*arguments, **options)

    monkeypatch.setattr(runs, "train", noted)
    first, second, third = (small_run(seed=seed) for seed in range(3))
    load_or_train(second, small_study)
    results = train_all([third, second, third, first], small_study)
    assert list(results) == [third, second, first]
    assert all(result.run == run for run, result in results.items())
    assert trained == [1, 2, 0]


def test_costs_are_in_proportion_to_measured_times(small_run: MakeRun) -> None:
    small, large = (small_run(model=m, image_size=32) for m in ("simple_cnn", "resnet18"))
    # Images a second on two cores: 8,000 and 1,000.
    assert cost(large) / cost(small) == pytest.approx(8, rel=0.3)
    assert cost(replace(small, epochs=6)) == pytest.approx(3 * cost(small))
    assert cost(replace(small, train_size=160)) == pytest.approx(2 * cost(small))


def test_several_at_a_time_are_sent_the_longest_first(
    monkeypatch: pytest.MonkeyPatch, small_study: Study, small_run: MakeRun
) -> None:
    short, long, middle = small_run(), small_run(model="resnet18"), small_run(epochs=3)
    sent: list[Run] = []
    monkeypatch.setattr(executors, "train_in_processes", lambda rs, _: sent.extend(rs))
    results = train_all([short, long, middle, long], replace(small_study, executor="processes"))
    assert sent == [long, middle, short] and list(results) == [short, long, middle]


def test_progress_goes_into_a_file_and_tells_of_the_run_in_training(
    small_study: Study, small_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "progress"
    study = replace(small_study, progress=f"file:{path}")
    done, half, new = (small_run(seed=seed) for seed in range(3))
    load_or_train(done, study)

    def stop(record: object) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        load_or_train(half, study, on_epoch=stop, checkpoint_seconds=0.0)
    with executors.show_progress([done, half, new], study, "dropout"):
        deadline = time.monotonic() + 60
        while "runs done" not in path.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        line = path.read_text().splitlines()[-1]
    assert line.startswith("dropout:  50% |")
    assert "1 of 3 runs done; simple_cnn, test, seed 1: epoch 1/2, validation " in line
    train_all([done, half, new], study, title="again")
    assert path.read_text().split()[:2] == ["again:", "25%"]  # of the two that were missing
    path.write_text("as it was")
    train_all([done, half, new], study)  # nothing is missing: nothing is told
    assert path.read_text() == "as it was"
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


@pytest.mark.parametrize("progress", ["bar", "none"])
def test_a_bar_is_shown_on_the_terminal_only_if_wanted(
    small_study: Study, small_run: MakeRun, capsys: pytest.CaptureFixture[str], progress: str
) -> None:
    train_all([small_run()], replace(small_study, progress=progress), title="one run")
    printed = capsys.readouterr()
    assert printed.out == "" and ("one run:   0% |" in printed.err) == (progress == "bar")


@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_several_processes_give_the_results_of_one_and_a_failure_stops_no_other(
    request: pytest.FixtureRequest,
    small_study: Study,
    small_run: MakeRun,
    tmp_path: Path,
    differing: Differing,
    executor: str,
) -> None:
    if executor == "ray":
        ray = pytest.importorskip("ray", reason="Ray isn't installed: pip install '.[ray]'")
        request.addfinalizer(ray.shutdown)
    study = replace(small_study, executor=executor)
    good = small_run()
    diverging = replace(good, recipe=replace(good.recipe, learning_rate=1e30))
    with pytest.raises(RunError, match="^1 of 2 runs failed") as caught:
        train_all([diverging, good], study)
    said = f"{diverging.key}: TrainingDiverged: the training loss stopped being finite in epoch 1"
    assert said in str(caught.value)
    alone = load_or_train(good, replace(small_study, runs_dir=tmp_path / "alone"))
    assert differing(alone, load_result(good, study)) == []


def test_ray_trains_each_run_in_a_process_with_one_gpu_into_a_folder_that_is_shared(
    monkeypatch: pytest.MonkeyPatch, small_study: Study, small_run: MakeRun, tmp_path: Path
) -> None:
    """A stand-in for Ray runs here what it is given, as another machine would."""
    asked, place, made = [], small_study.runs_dir, [small_run(seed=seed) for seed in range(2)]

    class Backend(SequentialBackend):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            asked.append(options)

    def there(run: Run, study: Study, **_: Any) -> Result:
        assert study.device == torch.device("cuda")  # not the number that it has here
        return load_or_train(run, replace(small_study, runs_dir=place))

    ray = {name: ModuleType(name) for name in ("ray", "ray.util", "ray.util.joblib")}
    ray["ray"].init, ray["ray"].cluster_resources = (lambda **_: None), (lambda: {"GPU": 2.0})
    ray["ray.util.joblib"].register_ray = lambda: register_parallel_backend("ray", Backend)
    for name, module in ray.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(executors, "load_or_train", there)
    study = replace(small_study, executor="ray", device=torch.device("cuda:1"))
    executors.train_in_processes(made, study)
    assert all(load_result(run, replace(study, runs_dir=place)).run == run for run in made)
    assert asked == [{"ray_remote_args": {"num_gpus": 1}, "maxtasksperchild": 1}]
    place, other = tmp_path / "machine", small_run(seed=2)
    with pytest.raises(RunError, match=f"{other.key}: it was trained, but .* share RUNS_DIR"):
        executors.train_in_processes([other], study)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"EXECUTOR is ray: pip install '\.\[ray\]'"):
        executors.train_in_processes(made, study)


def test_workers_stop_when_the_process_that_asked_has_ended(
    small_study: Study, small_run: MakeRun, tmp_path: Path
) -> None:
    asked = [small_run(seed=seed, epochs=10**6) for seed in (0, 1)]
    given = replace(small_study, executor="processes", cores_per_run=1)
    (tmp_path / "asked.pkl").write_bytes(pickle.dumps((asked, given)))
    program = "import pickle, sys; from helpers import executors; executors.train_in_processes(*"
    program += "pickle.loads(open(sys.argv[1], 'rb').read()))"
    main = subprocess.Popen([sys.executable, "-c", program, tmp_path / "asked.pkl"], cwd=ROOT)
    folders = [given.runs_dir / run.key for run in asked[: cpu_count()]]  # those at work at once
    while not all((folder / "history.csv").exists() for folder in folders):
        assert main.poll() is None
        time.sleep(0.1)
    main.kill()
    for folder in folders:
        FileLock(folder / "lock").acquire(timeout=60).lock.release()  # by one who trains it
        assert not (folder / "result.json").exists()
    (tmp_path / "asked.pkl").write_bytes(pickle.dumps((asked[0], given, main.pid)))
    program = program.replace("train_in_processes", "_train_in_worker")  # as if begun too late
    late = subprocess.run([sys.executable, "-c", program, tmp_path / "asked.pkl"], cwd=ROOT)
    assert late.returncode == 1
