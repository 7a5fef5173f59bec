"""Fixtures that several test modules use."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import make_study
from helpers.config import Study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A smoke study on shapes, on the CPU, in a folder of the test's own."""
    return make_study(tmp_path / "study")
