"""Figures: every kind is drawn from what notebooks have, is small, and shows what it is given."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from helpers import plots
from helpers.config import Study
from helpers.evaluation import Interval

NETWORKS = ["SimpleCNN", "ResNet-18", "ResNet-34"]
MANY = [f"class {i} for 5$ or 6$" for i in range(25)]
GENERATOR = np.random.default_rng(0)


def interval(mean: float = 0.5) -> Interval:
    return Interval(mean, mean - 0.1, mean + 0.2, 2)


def seeds(*lengths: int) -> list[pd.Series]:
    return [pd.Series(np.linspace(1, 0.1, n), index=range(1, n + 1)) for n in lengths]


def square(names: list[str]) -> pd.DataFrame:
    return pd.DataFrame(GENERATOR.random((len(names),) * 2), index=names, columns=names)


@pytest.fixture(autouse=True)
def close() -> Iterator[None]:
    plots.use_style()
    yield
    plt.close("all")


ROWS = {name: interval() for name in MANY}
CURVES = {t: {n: {10: interval(), 100: interval()} for n in NETWORKS} for t in ("few", "many")}
POINTS = {"a": {n: {i + 1.0: interval()} for i, n in enumerate(MANY[:9])}, "b": {"x": {}}}
PICTURE = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
FIGURES = {
    "rows": lambda: plots.intervals({"Test": ROWS}, label="accuracy (%)", reference=0.4),
    "row panels": lambda: plots.intervals({t: ROWS for t in "abcd"}, label="r", percent=False),
    "groups": lambda: plots.intervals(
        {"IoU": {"cam": {"layer3": interval()}, "edges": {"control": interval()}}}, label="share"
    ),
    "lines": lambda: plots.interval_curves(
        CURVES, xlabel="images", ylabel="accuracy (%)", log_x=True, reference=0.1
    ),
    "band": lambda: plots.interval_curves(
        CURVES, xlabel="x", ylabel="y", reference=dict.fromkeys(CURVES, interval())
    ),
    "points": lambda: plots.interval_curves(
        POINTS, xlabel={"a": "ms", "b": "MB"}, ylabel="%", log_x=True
    ),
    "curves": lambda: plots.curves(
        {t: {"train": seeds(3, 5), "validation": seeds(4)} for t in MANY[:4]},
        xlabel="epoch",
        ylabel="loss",
        log_y=True,
    ),
    "matrices": lambda: plots.matrix(
        {n: square(MANY[:2]) for n in NETWORKS}, xlabel="x", ylabel="y"
    ),
    "large matrix": lambda: plots.matrix({"one": square(MANY)}, xlabel="x", ylabel="y"),
    "pictures": lambda: plots.images(
        [[PICTURE] * 3, [plots.enlarge(PICTURE)]], [MANY[:3], [""]], row_labels=MANY[:2], heat=True
    ),
}


@pytest.mark.parametrize("kind", FIGURES)
def test_every_kind_is_drawn_legible_and_small(kind: str, study: Study) -> None:
    figure = FIGURES[kind]()
    path = plots.save_figure(figure, study, "00_figure")
    assert path == study.folder / "figures" / "00_figure.png"
    assert 1_000 < path.stat().st_size <= 300_000
    drawing = path.with_suffix(".svg").read_text()
    assert drawing.count("<text") >= drawing.count("Libertinus Serif") > 0
    texts = [t for t in figure.findobj(plt.Text) if t.get_visible() and t.get_text()]
    assert min(text.get_fontsize() for text in texts) >= 7
    assert all(text.get_text().count(r"\$") == 2 for text in texts if "class" in text.get_text())


def colours(figure: Figure) -> dict[str, tuple[float, ...]]:
    handles, names = figure.axes[0].get_legend_handles_labels()
    return {n: h.lines[0].get_color() for h, n in zip(handles, names, strict=True)}


def test_a_thing_keeps_its_colour() -> None:
    labels = {"xlabel": "x", "ylabel": "y"}
    whole = colours(plots.interval_curves(CURVES, **labels))
    part = {t: {n: line for n, line in CURVES[t].items() if n != "SimpleCNN"} for t in CURVES}
    assert colours(plots.interval_curves(part, **labels)).items() < whole.items()
    without = {"all": {"a": {}, "b": {1: interval(), 2: interval()}}}  # a is the reference
    assert colours(plots.interval_curves(without, **labels)) == {"b": plots.PALETTE[1]}


def test_points_are_named_beside_the_panel_those_of_the_frontier_in_bold() -> None:
    places = {"a": (1, 0.3), "b": (3, 0.2), "c": (2, 0.5)}
    values = {"": {name: {x: interval(y)} for name, (x, y) in places.items()}}
    figure = plots.interval_curves(values, xlabel="s", ylabel="%")
    assert plots.label_points(figure, values) == [["a", "c"]] and not figure.legends
    bold = {text.get_text(): text.get_weight() == "bold" for text in figure.axes[0].texts}
    assert list(bold.items()) == [("b", False), ("a", True), ("c", True)]


def test_the_mean_of_curves_goes_as_far_as_all_seeds() -> None:
    figure = plots.curves({"": {"loss": seeds(3, 5)}}, xlabel="epoch", ylabel="loss")
    *single, mean = figure.axes[0].lines
    assert [list(line.get_xdata()) for line in single] == [[1, 2, 3], [1, 2, 3, 4, 5]]
    assert list(mean.get_xdata()) == [1, 2, 3]
    assert np.allclose(mean.get_ydata(), np.mean([s[:3] for s in seeds(3, 5)], axis=0))
