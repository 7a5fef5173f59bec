"""The list of deliberate faults fits the code as it is (`make faults` plants them)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks import faults
from helpers.config import ROOT


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.breaks)
def test_a_fault_can_be_planted_and_is_python(fault: faults.Fault) -> None:
    source = (ROOT / "helpers" / f"{fault.module}.py").read_text()
    planted = fault.planted(source)
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(source))


def test_there_are_many_and_each_has_tests() -> None:
    names = [fault.breaks for fault in faults.FAULTS]
    assert len(names) >= 60 and len(set(names)) == len(names)
    for fault in faults.FAULTS:
        assert all((ROOT / path).exists() for path in faults.tests_of(fault.module))
        assert not set(faults.tests_of(fault.module)) & set(faults.other_tests(fault.module))


def test_a_fault_that_no_longer_fits_is_an_error() -> None:
    fault = faults.Fault("models", "a test", "not in the code", "whatever")
    with pytest.raises(ValueError, match="is 0 times in helpers/models.py"):
        fault.planted("x = 1\n")


def test_a_failing_test_is_named_and_a_passing_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_right():\n    pass\n")
    assert faults.notices(tmp_path, ["test_a.py"]) is None
    (tmp_path / "test_a.py").write_text("def test_wrong():\n    assert False\n")
    assert faults.notices(tmp_path, ["test_a.py"]) == "FAILED test_a.py::test_wrong"


def test_a_copy_holds_the_code_and_nothing_installed(tmp_path: Path) -> None:
    copy = faults.copy_repository(tmp_path / "copy")
    name = Path("helpers", "models.py")
    assert (copy / name).read_bytes() == (ROOT / name).read_bytes()
    assert (copy / "notebooks" / "01_data.ipynb").exists()
    assert not (copy / ".venv").exists()


def test_notebook_faults_are_in_the_list() -> None:
    chosen = faults.chosen(["notebooks"])
    assert len(chosen) >= 8
    for _, rounds in chosen:
        assert all((ROOT / path).exists() for paths in rounds for path in paths)
