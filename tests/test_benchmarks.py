"""Each benchmark runs, on next to nothing, and reports what it compares."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import estimate, executors, faults, gradcam, study, training
from helpers.config import PROFILES, ROOT
from helpers.runs import Run
from helpers.training import RECIPES


def test_training() -> None:
    text = training.markdown(tiny=True)
    assert text.startswith("## Training")
    for row in ("(a) training ResNet-18", "(b) augmentation", "(c) evaluation", "(d) epoch"):
        assert row in text


def test_gradcam() -> None:
    for peer in ("pytorch_grad_cam", "torchcam", "captum"):
        pytest.importorskip(peer, reason=f"peer library {peer} is not installed")
    text = gradcam.markdown(rounds=1, tiny=True)
    assert text.startswith("## Grad-CAM")
    for name in ("forward alone", "this package", "grad-cam", "torchcam", "captum"):
        assert f"| {name} |" in text


def test_executors() -> None:
    pytest.importorskip("ray", reason="Ray is not installed; make test-scale installs it")
    text = executors.markdown(tiny=True)
    assert text.startswith("## Executors")
    assert f"| {executors.LOCAL} |" in text and "| Ray, 1 core a run |" in text


def test_the_readme_tells_what_was_measured() -> None:
    readme = (ROOT / "README.md").read_text()
    results = Path(ROOT, "benchmarks", "RESULTS.md").read_text()
    for name, words in (
        ("1 core", "{} times as long as one"),
        ("2 cores", "{} times as long, since"),
    ):
        ratio = re.search(rf"\| Ray, {name} a run \| [^|]+ \| ([\d.]+) ", results)[1]
        assert words.format(ratio.removeprefix("0")) in readme
    assert f"plants {len(faults.FAULTS)} deliberate faults" in readme
    hours = json.loads(estimate.ESTIMATED.read_text())
    assert f"at least {hours['1']} hours on one such GPU and {hours['8']} hours on eight" in readme


def test_the_estimate_scales_runs_and_fills_the_gpus() -> None:
    quick, full = PROFILES["quick"], PROFILES["full"]
    sizes = {"train_size": quick.train_size, "width": quick.width, "epochs": quick.epochs}
    run = estimate.at_full_size(Run("shapes", "any", "resnet18", RECIPES["fast"], seed=0, **sizes))
    assert (run.width, run.epochs) == (full.width, full.epochs)
    assert run.train_size == estimate.FULL_TRAIN_SIZE
    assert estimate.seconds_on(1, [1, 2, 3, 6]) == 12
    assert estimate.seconds_on(2, [1, 2, 3, 6]) == 6
    assert estimate.seconds_on(8, [1, 2, 3, 6]) == 6


def test_a_study_is_timed_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {}

    def run(command: list[str], *, cwd: Path, env: dict[str, str]) -> object:
        places.update(env)
        results = Path(env["ANALYSIS_DIR"], "shapes-smoke", "results")
        results.mkdir(parents=True)
        (results / "run_times.json").write_text('{"01_data": 61.5, "02_architectures": 60.0}')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(study.subprocess, "run", run)
    monkeypatch.setattr(study, "MEASURED", tmp_path / "study.json")
    (tmp_path / "study.json").write_text('{"quick": "as it was"}')
    assert study.main("smoke", tmp_path / "new") == 0
    found = json.loads((tmp_path / "study.json").read_text())
    assert found["quick"] == "as it was"
    assert sum(found["smoke"]["seconds"].values()) == 121.5
    assert found["smoke"]["profile"]["name"] == places["PROFILE"] == "smoke"
    own = [places[f"{name}_DIR"] for name in ("RUNS", "DATA", "ANALYSIS")]
    assert all(Path(place).is_relative_to(tmp_path / "new") for place in own)
    with pytest.raises(FileExistsError):  # a study with stored runs isn't timed from nothing
        study.main("smoke", tmp_path / "new")
