"""What comes from outside: variables, paths, the device, and who may read them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers import config
from helpers.config import PROFILES, choose_device, dataset_slug, is_path, study

VARIABLES = ("PROFILE", "DATASET", "RUNS_DIR", "DATA_DIR", "ANALYSIS_DIR", "DEVICE", "PROGRESS")
MODULES = sorted((config.ROOT / "helpers").glob("*.py"))


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    study.cache_clear()
    yield
    study.cache_clear()


# --- Variables ---------------------------------------------------------------------------------


def test_defaults_are_the_quick_profile_on_shapes_in_the_repository() -> None:
    found = study()
    assert (found.profile.name, found.dataset, found.progress) == ("quick", "shapes", "bar")
    assert found.runs_dir == config.ROOT / "runs"
    assert found.data_dir == config.ROOT / "data"
    assert found.figures_dir == config.ROOT / "analysis" / "shapes-quick" / "figures"
    assert found.results_dir == config.ROOT / "analysis" / "shapes-quick" / "results"


@pytest.mark.parametrize(
    ("profile", "dataset"),
    [("smoke", "shapes"), ("quick", "shapes"), ("long", "cifar10"), ("full", "cifar10")],
)
def test_each_profile_brings_its_dataset(
    monkeypatch: pytest.MonkeyPatch, profile: str, dataset: str
) -> None:
    monkeypatch.setenv("PROFILE", profile)
    assert study().set_name == f"{dataset}-{profile}"


def test_every_variable_is_heeded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROFILE", "smoke")
    monkeypatch.setenv("DATASET", "digits")
    for variable in ("RUNS_DIR", "DATA_DIR", "ANALYSIS_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("PROGRESS", "file:/some/where")
    found = study()
    assert found.profile is PROFILES["smoke"]
    assert found.runs_dir == tmp_path / "RUNS_DIR"
    assert found.data_dir == tmp_path / "DATA_DIR"
    assert found.analysis_dir == tmp_path / "ANALYSIS_DIR"
    assert found.figures_dir == tmp_path / "ANALYSIS_DIR" / "digits-smoke" / "figures"
    assert found.device == torch.device("cpu")
    assert found.progress == "file:/some/where"


def test_folders_become_absolute_and_may_start_with_a_tilde(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS_DIR", "~/my runs")
    monkeypatch.setenv("DATA_DIR", "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert study().runs_dir == tmp_path / "my runs"
    assert study().data_dir == tmp_path / "elsewhere"


def test_an_empty_dataset_or_folder_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATASET", "")
    monkeypatch.setenv("RUNS_DIR", "")
    assert study().dataset == "shapes"
    assert study().runs_dir == config.ROOT / "runs"


def test_the_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = study()
    monkeypatch.setenv("PROFILE", "smoke")
    assert study() is first


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("PROFILE", "huge", "smoke, quick, long, full"),
        ("PROFILE", "Quick", "smoke, quick, long, full"),
        ("PROGRESS", "bars", "bar, none or file:PATH"),
        ("PROGRESS", "file:", "bar, none or file:PATH"),
        ("DEVICE", "gpu", "auto, cpu, cuda or mps"),
        ("DEVICE", "meta", "auto, cpu, cuda or mps"),
    ],
)
def test_a_bad_value_is_shown_with_the_good_ones(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError) as caught:
        study()
    assert f"{variable}={value!r}" in str(caught.value)
    assert expected in str(caught.value)


# --- Device ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "mps", "expected"), [(1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")]
)
def test_auto_takes_the_best_device(
    monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto").type == expected


def test_a_device_that_this_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("cuda:0") == torch.device("cuda:0")
    assert choose_device("cuda") == torch.device("cuda")
    for wanted, kind in (("cuda:1", "1 cuda"), ("mps", "0 mps")):
        with pytest.raises(ValueError, match=f"DEVICE='{wanted}', but torch sees {kind} devices"):
            choose_device(wanted)


def test_number_format_follows_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, dtype in (((9, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert config.compute_dtype(torch.device("cuda")) is dtype
    assert config.compute_dtype(torch.device("mps")) is torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_number_format_follows_the_processor(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: native, raising=False)
    expected = torch.bfloat16 if native else torch.float32
    assert config.compute_dtype(torch.device("cpu")) is expected


# --- Names and paths ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "path", "slug"),
    [
        ("cifar10", False, "cifar10"),
        ("fashion-mnist", False, "fashion-mnist"),
        ("/data/My Photos (2024)/", True, "my-photos-2024"),
        ("photos/-x-", True, "x"),
        ("photos/Ärzte", True, "rzte"),
        ("photos/写真", True, "folder"),
        ("/", True, "folder"),
    ],
)
def test_slugs_are_fit_for_file_names(dataset: str, path: bool, slug: str) -> None:
    assert is_path(dataset) is path
    assert dataset_slug(dataset) == slug


def test_slug_of_a_relative_folder_is_that_of_the_absolute_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "birds").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "birds")
    assert [dataset_slug(d) for d in (".", "../birds", "~/birds")] == ["birds"] * 3


# --- Profiles ----------------------------------------------------------------------------------


def test_profiles_grow_and_repeat_enough() -> None:
    smoke, quick, long, full = PROFILES.values()
    assert smoke.train_size < quick.train_size < long.train_size
    assert full.train_size is None and full.test_size is None and full.width == 1
    assert smoke.epochs < quick.epochs < long.epochs < full.epochs
    assert len(quick.seeds) >= 2 and len(full.seeds) >= 3
    assert all(p.seeds == tuple(range(len(p.seeds))) for p in PROFILES.values())


# --- Rules of the package ----------------------------------------------------------------------


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return names


def environment_reads(tree: ast.AST) -> list[int]:
    """Lines that read a variable; setting one, or passing the whole environment on, is none."""
    allowed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            allowed.add(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            allowed.add(node.left)
    words = ("environ", "getenv", "environb")
    reads = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in words]
    lines = [node.lineno for node in reads if node not in allowed]
    return lines + [0 for name in imported(tree) if name in {f"os.{word}" for word in words}]


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("os.environ['A']", 1),
        ("os.environ.get('A')", 1),
        ("os.getenv('A')", 1),
        ("'A' in os.environ", 1),
        ("from os import environ", 1),
        ("os.environ['A'] = 'b'", 0),
        ("env = os.environ | {'A': 'b'}", 0),
    ],
)
def test_the_check_for_reads_finds_them(source: str, count: int) -> None:
    assert len(environment_reads(ast.parse(source))) == count


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_only_config_reads_the_environment_and_only_plots_imports_matplotlib(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    assert bool(environment_reads(tree)) == (module.stem == "config")
    drawing = {name.split(".")[0] for name in imported(tree)} & {"matplotlib", "seaborn"}
    assert bool(drawing) == (module.stem == "plots")


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("config", set()),
        ("shapes", set()),
        ("models", {"config"}),
        ("data", {"shapes", "config"}),
        ("evaluation", {"config", "data"}),
    ],
)
def test_dependencies_point_one_way(module: str, allowed: set[str]) -> None:
    source = (config.ROOT / "helpers" / f"{module}.py").read_text(encoding="utf-8")
    names = {name.split(".")[1] for name in imported(ast.parse(source)) if "helpers." in name}
    assert names == allowed


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PROFILE", "DATASET", "DEVICE", "PROGRESS", "RUNS_DIR"):
        monkeypatch.setenv(variable, "")
    study.cache_clear()
    found = study()
    study.cache_clear()
    assert (found.profile.name, found.dataset, found.progress) == ("quick", "shapes", "bar")
    assert found.runs_dir == config.ROOT / "runs"


@pytest.mark.parametrize(
    ("side", "expected"), [(8, 500), (16, 256), (32, 64), (64, 16), (96, 28), (224, 5), (1024, 4)]
)
def test_a_cpu_takes_as_many_images_at_once_as_its_cache_holds(side: int, expected: int) -> None:
    assert config.images_at_once(torch.device("cpu"), side, side, 500) == expected
    assert config.images_at_once(torch.device("cpu"), side, side, 2) == 2
    assert config.images_at_once(torch.device("cuda"), side, side, 500) == 500


def test_a_home_that_does_not_exist_is_a_folder_like_any_other() -> None:
    assert config.dataset_slug("~nobody-of-that-name/My Images") == "my-images"
    assert config.dataset_slug("~nobody-of-that-name") == "nobody-of-that-name"


def test_tests_run_in_smoke_whatever_is_exported() -> None:
    exported = {"PROFILE": "full", "EXECUTOR": "ray"}
    own = {name: value for name, value in os.environ.items() if name != "RESNET_STUDY_TEST_FOLDER"}
    script = (
        "import os, conftest; print(os.environ['PROFILE'], os.environ['EXECUTOR']); "
        "os.rmdir(os.environ['RESNET_STUDY_TEST_FOLDER'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=config.ROOT,
        env=own | exported,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["smoke", "local"]
