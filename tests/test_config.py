"""What comes from outside: variables, paths, the device; and how settings refuse bad values."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pytest
import torch
from pydantic import Field

from helpers import config
from helpers.config import PROFILES, choose_device, dataset_slug, is_path, settings, study

VARIABLES = (
    *("PROFILE", "DATASET", "BATCH_SIZE", "RUNS_DIR", "DATA_DIR", "ANALYSIS_DIR"),
    *("DEVICE", "PROGRESS", "EXECUTOR", "CORES_PER_RUN"),
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    study.cache_clear()
    yield
    study.cache_clear()


@pytest.mark.parametrize("empty", [False, True])
def test_defaults_are_those_of_the_readme(monkeypatch: pytest.MonkeyPatch, empty: bool) -> None:
    for variable in VARIABLES if empty else ():
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv("DEVICE", "cpu")
    found, root = study(), config.ROOT
    assert (found.set_name, found.progress, found.executor) == ("shapes-quick", "bar", "processes")
    assert (found.runs_dir, found.data_dir) == (root / "runs", root / "data")
    assert found.folder == root / "analysis" / "shapes-quick"


def test_every_variable_is_heeded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values = {"PROFILE": "smoke", "DATASET": "digits", "DEVICE": "cpu", "CORES_PER_RUN": "12"}
    values |= {"PROGRESS": "file:/some/where", "EXECUTOR": "processes", "BATCH_SIZE": "8"}
    # Folders become absolute and may start with a tilde.
    values |= {"RUNS_DIR": "~/my runs", "DATA_DIR": "elsewhere", "ANALYSIS_DIR": f"{tmp_path}/a"}
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for variable, value in values.items():
        monkeypatch.setenv(variable, value)
    found = study()
    assert found.profile == replace(PROFILES["smoke"], batch_size=8)
    assert (found.runs_dir, found.data_dir) == (tmp_path / "my runs", tmp_path / "elsewhere")
    assert found.folder == tmp_path / "a" / "digits-smoke"
    assert (found.device, found.progress) == (CPU, "file:/some/where")
    assert (found.executor, found.cores_per_run) == ("processes", 12)
    monkeypatch.setenv("PROFILE", "full")
    assert study() is found, "the environment is read once"


@pytest.mark.parametrize(
    ("variable", "values", "expected"),
    [
        ("PROFILE", ["huge", "Quick", "smoke|quick"], "smoke, quick, long, full"),
        ("PROGRESS", ["bars", "file:"], "bar, none or file:PATH"),
        ("DEVICE", ["gpu", "meta:x", "cuda:99"], "auto, cpu, cuda or mps"),
        ("EXECUTOR", ["dask", "LOCAL"], "local, processes or ray"),
        ("CORES_PER_RUN", ["0", "-1", "1.5", "two", "1\n"], "a whole number of CPU cores"),
        ("BATCH_SIZE", ["0", "1e3"], "a whole number of images"),
    ],
)
def test_a_bad_value_is_shown_with_the_good_ones(
    monkeypatch: pytest.MonkeyPatch, variable: str, values: list[str], expected: str
) -> None:
    for value in values:
        monkeypatch.setenv(variable, value)
        with pytest.raises(ValueError) as caught:
            study()
        assert f"{variable}={value!r}" in str(caught.value)
        assert expected in str(caught.value)


def test_tests_run_in_smoke_whatever_is_exported() -> None:
    exported = {"PROFILE": "full", "EXECUTOR": "ray"}
    own = {name: value for name, value in os.environ.items() if name != "RESNET_STUDY_TEST_FOLDER"}
    script = "import os, conftest; e = os.environ; os.rmdir(e['RESNET_STUDY_TEST_FOLDER']); "
    command = [sys.executable, "-c", script + "print(e['PROFILE'], e['EXECUTOR'])"]
    printed = subprocess.check_output(command, cwd=config.ROOT, env=own | exported, text=True)
    assert printed.split() == ["smoke", "local"]


def a_machine(patch: pytest.MonkeyPatch, *, works: bool, gpu: str = "") -> list[str]:
    """Play a machine with a GPU or none, which works in torch or not; list the devices tried."""
    ones, tried = torch.ones, []

    def make(*shape: int, device: str) -> torch.Tensor:
        tried.append(device)
        if device == "cuda" and not works:
            raise RuntimeError("the driver is too old\nand so on")
        return ones(*shape)

    patch.setattr(config, "nvidia_gpu", lambda: gpu)
    patch.setattr(torch.cuda, "is_available", lambda: works)
    patch.setattr(torch.backends.mps, "is_available", lambda: True)
    patch.setattr(torch, "ones", make)
    return tried


@pytest.mark.parametrize(("works", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_a_gpu_or_the_cpu_and_never_apples(
    monkeypatch: pytest.MonkeyPatch, works: bool, device: str
) -> None:
    tried = a_machine(monkeypatch, works=works)
    choose_device("auto")
    assert tried == [device]


@pytest.mark.parametrize("variable", ["DEVICE=", "DEVICE=cuda", "PROFILE=full"])
@pytest.mark.parametrize("gpu", ["Tesla T4, 535.104.05", ""])
def test_a_gpu_that_is_needed_but_cannot_be_used_stops_with_driver_and_advice(
    monkeypatch: pytest.MonkeyPatch, variable: str, gpu: str
) -> None:
    a_machine(monkeypatch, works=False, gpu=gpu)
    monkeypatch.setenv(*variable.split("="))
    if not gpu and variable == "DEVICE=":
        assert study().device == CPU
        return
    with pytest.raises(ValueError, match="'cuda' can't be used .the driver is too old.;") as caught:
        study()
    for part in (gpu or "none", torch.__version__, "--index-url https://", "DEVICE=cpu"):
        assert part in str(caught.value)
    monkeypatch.setenv("DEVICE", "cpu")
    assert study().device == CPU


def test_the_driver_is_asked_for_its_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho Tesla T4, 535.104.05\necho Tesla T4, 535.104.05\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert config.nvidia_gpu() == "Tesla T4, 535.104.05"
    tool.write_text("#!/bin/sh\nexit 9\n")  # the tool is here, a driver isn't
    assert config.nvidia_gpu() in ("", "/dev/nvidia0")


def test_number_format_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, dtype in (((9, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert config.compute_dtype(torch.device("cuda")) is dtype
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, check, lambda native=native: native, raising=False)
        assert config.compute_dtype(CPU) is dtype


def test_every_process_asks_for_repeatable_kernels_before_cuda_is_used() -> None:
    names = ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC")
    code = f"import os; from helpers import config; print(*map(os.environ.get, {names}))"
    for own, expected in (({}, ":4096:8 1"), ({names[0]: ":16:8"}, ":16:8 1")):
        environment = {k: v for k, v in os.environ.items() if k not in names} | own
        command = [sys.executable, "-c", code]
        said = subprocess.check_output(command, text=True, cwd=config.ROOT, env=environment)
        assert said.strip() == expected


def test_a_cpu_takes_as_many_images_at_once_as_its_cache_holds() -> None:
    for side, expected in ((8, 500), (16, 256), (32, 64), (64, 16), (96, 28), (224, 5), (1024, 4)):
        assert config.images_at_once(CPU, side, side, 500) == expected
        assert config.images_at_once(torch.device("cuda"), side, side, 500) == 500


@pytest.mark.parametrize(
    ("dataset", "path", "slug"),
    [
        ("cifar10", False, "cifar10"),
        ("fashion-mnist:Bag,T-shirt/top", False, "fashion-mnist-bag-t-shirt-top"),
        ("/data/My Photos (ä)/", True, "my-photos"),
        ("./写真", True, "folder"),
        (".", True, "birds"),
        ("~/birds", True, "birds"),
        ("~nobody-of-that-name", True, "nobody-of-that-name"),
    ],
)
def test_slugs_are_fit_for_file_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dataset: str, path: bool, slug: str
) -> None:
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path / "birds")
    assert is_path(dataset) is path
    assert dataset_slug(dataset) == slug


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for content in (b"old", b"new"):
        config.write_atomically(path, content)
        assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]
    for place in (path / "inside a file", path.parent):  # neither can be a file
        with pytest.raises(OSError, match=f"{place} can't be written .*set RUNS_DIR"):
            config.write_atomically(place, b"content")
    assert not list(tmp_path.glob(".*")), "nothing is left behind"


@settings
class Outer:
    count: int
    rate: Annotated[float, Field(gt=0)] = 1.0
    name: str = "n"
    inner: Inner | None = None  # a class that comes later


@settings
class Inner:
    flag: bool = False


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": True}, "count is True: expected a valid integer"),
        ({"count": 1, "rate": float("nan")}, "rate is nan: expected a finite number"),
        ({"count": 1, "rate": -1}, "rate is -1: expected greater than 0"),
        ({"count": 1, "name": b"n"}, "name is b'n': expected a valid string"),
        ({"count": 1, "inner": {"flag": True}}, "inner is {'flag': True}: expected an instance of"),
        ({"count": 1, "colour": 3}, "colour is 3: Unexpected keyword argument"),
        ({}, "count is missing"),
        ({"count": "1", "name": 3}, "count is '1': expected a valid integer; name is 3: expected"),
    ],
)
def test_a_bad_setting_is_named_with_what_was_found_and_expected(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        Outer(**values)
    assert str(caught.value).startswith(f"Outer: {message}")
    assert type(caught.value) is ValueError


def test_settings_are_frozen_take_positions_and_make_floats() -> None:
    made = Outer(2, 1, inner=Inner(True))
    assert made == Outer(count=2, rate=1.0, inner=Inner(flag=True))
    assert type(made.rate) is float
    with pytest.raises(AttributeError):
        made.count = 3
    with pytest.raises(ValueError, match="Outer: rate is 'x': expected a valid number"):
        Outer(2, "x")
