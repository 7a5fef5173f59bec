"""The study's figures: a few general functions, each of which returns a matplotlib Figure.

They take values by panel's title, then by name. A network has the same colour in every figure,
other names have theirs by their place. With `percent` shares are shown times 100. What is drawn
only once is drawn in its notebook.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from torch import Tensor

from helpers import evaluation
from helpers.config import Study
from helpers.evaluation import Interval
from helpers.models import MODELS

Picture = Tensor | np.ndarray
Points = Mapping[str, Mapping[str, Mapping[float, Interval]]]  # {title: {line: {x: Interval}}}
PALETTE = sns.color_palette("colorblind")
STEPS = (1, 2, 5, 10)  # between ticks, times a power of ten

# How the networks are called, and those that keep their colour in every figure.
MODEL_TITLES = {n: n.replace("resnet", "ResNet-") for n in MODELS} | {"simple_cnn": "SimpleCNN"}
MAIN_NETWORKS = ["SimpleCNN", *(f"ResNet-{depth}" for depth in (18, 34, 50, 101, 152))]


def use_style() -> None:
    """Set seaborn's quiet style for all figures that follow."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.85)
    plt.rcParams.update({"figure.dpi": 90, "axes.titlesize": 11, "axes.titleweight": "bold"})


def save_figure(figure: Figure, study: Study, name: str) -> Path:
    """Write a figure into the study's set: as PNG, and as SVG for the report, in its typeface."""
    path = study.folder / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, bbox_inches="tight", metadata={"Software": None})
    # Typst has the first font; the second, which is like it, tells how much room text needs.
    look = {"font.sans-serif": ["Libertinus Serif", "STIXGeneral"], "svg.fonttype": "none"}
    with plt.rc_context(look | {"svg.hashsalt": name}):
        figure.savefig(path.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
    return path


def panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a grid of `count` panels of width x height inches, at most `columns` in a row."""
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (columns * width, rows * height)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for spare in axes.flat[count:]:
        spare.remove()
    return figure, list(axes.flat[:count])


def literal(name: object) -> str:
    """Return a name as matplotlib shows it: dollar signs would begin a formula."""
    return str(name).replace("$", r"\$")


def _styles(groups: Iterable[Iterable[str]]) -> dict[str, dict[str, Any]]:
    """Return colour and marker for each name, in the order of all; "control" is grey."""
    names = list(dict.fromkeys(name for group in groups for name in group))
    fixed = MAIN_NETWORKS if set(names) <= set(MAIN_NETWORKS) else names
    looks = [{"color": PALETTE[i % 10], "marker": "osD^vP<>X"[i % 9]} for i in range(len(fixed))]
    styles = {name: looks[fixed.index(name)] for name in names}
    return styles | ({"control": {"color": "0.45", "marker": "s"}} if "control" in names else {})


def _whiskers(values: Iterable[Interval], percent: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return means (N) and how far the intervals reach below and above (2 x N)."""
    table = np.array([(v.mean, v.low, v.high) for v in values]).reshape(-1, 3)
    mean, low, high = table.T * (100 if percent else 1)
    return mean, np.maximum([mean - low, high - mean], 0)


def _finish(
    figure: Figure, titles: Iterable[str], xlabel: Any, ylabel: str, share_y: bool = False
) -> Figure:
    """Name panels and axes, the outer ones only where all are alike; a legend above all."""
    found, columns = {}, figure.axes[0].get_gridspec().ncols
    limits = np.array([axes.get_ylim() for axes in figure.axes])
    for number, (axes, title) in enumerate(zip(figure.axes, titles, strict=True)):
        below = xlabel if number + columns >= len(figure.axes) else ""
        axes.set_xlabel(below if isinstance(xlabel, str) else xlabel[title])
        axes.set(title=literal(title), ylabel="" if number % columns else ylabel)
        if share_y:
            axes.set_ylim(limits.min(), limits.max())
        found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if len(found) > 1:
        fitting = int(12 * figure.get_figwidth() / (max(map(len, found)) + 6))  # by characters
        columns = max(1, min(len(found), fitting))
        figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(found) // columns))
        where = {"loc": "outside upper center", "ncols": columns, "fontsize": 8.5}
        figure.legend(found.values(), found, **where)
    return figure


def intervals(
    values: Mapping[str, Mapping[str, Interval | Mapping[str, Interval]]],
    *,
    label: str,
    percent: bool = True,
    reference: float | None = None,
) -> Figure:
    """Show means as points with their 95 % intervals as whiskers, a panel a title, a row a name.

    `values` is {title: {name: Interval}} or {title: {name: {group: Interval}}}, where groups are
    colours ("control" is grey). `reference` is a value at which a dashed line is drawn.
    """
    grouped = {
        title: {n: {"": v} if isinstance(v, Interval) else v for n, v in rows.items()}
        for title, rows in values.items()
    }
    names = list(dict.fromkeys(name for rows in grouped.values() for name in rows))
    styles = _styles(groups for rows in grouped.values() for groups in rows.values())
    count, height = len(grouped), (0.32 + 0.08 * len(styles)) * len(names) + 1
    figure, axes_list = panels(count, count, max(2.4, 9 / (count + 0.3)), height)
    for axes, rows in zip(axes_list, grouped.values(), strict=True):
        for name, groups in rows.items():
            for i, (group, value) in enumerate(groups.items()):
                y = names.index(name) + 0.6 * ((i + 0.5) / len(groups) - 0.5)
                mean, reach = _whiskers([value], percent)
                look = {"ls": "", "capsize": 2.5, "label": literal(group), **styles[group]}
                axes.errorbar(mean, y, xerr=reach, **look)
                if count == len(styles) == 1:
                    text = evaluation.percent(value.mean) if percent else f"{value.mean:.2f}"
                    axes.annotate(text, (mean[0], y - 0.12), ha="center", va="bottom", fontsize=8)
        if reference is not None:
            axes.axvline(
                reference * (100 if percent else 1), color="0.35", lw=1.1, ls="--", zorder=1
            )
        shown = names if axes.get_subplotspec().is_first_col() else [""] * len(names)
        axes.set_yticks(range(len(names)), map(literal, shown))
        axes.set_ylim(len(names) - 0.4, -0.7)
        axes.xaxis.set_major_locator(MaxNLocator(7 if count == 1 else 5, steps=STEPS))
    figure.supxlabel(label, fontsize=10)
    return _finish(figure, grouped, "", "")


def interval_curves(
    values: Points,
    *,
    xlabel: str | Mapping[str, str],
    ylabel: str,
    percent: bool = True,
    log_x: bool = False,
    reference: float | Mapping[str, Interval] | None = None,
) -> Figure:
    """Show intervals against a number, {title: {line: {x: Interval}}}, a panel a title.

    `reference` is a value at which a dashed line is drawn, or an interval for each title, drawn as
    a band. A line without points keeps its colour for the figures in which it has some.
    """
    styles = _styles(values.values())
    figure, axes_list = panels(len(values), 2, 4.4, 2.8)
    for axes, (title, lines) in zip(axes_list, values.items(), strict=True):
        drawn = {name: line for name, line in lines.items() if line}
        for i, (name, line) in enumerate(drawn.items()):
            # Side by side, so that the whiskers of several lines can be told apart.
            beside, x = (i - (len(drawn) - 1) / 2) * (len(line) > 1), np.array(list(line), float)
            x = x * 1.03**beside if log_x else x + 0.012 * np.ptp(x) * beside
            mean, reach = _whiskers(line.values(), percent)
            look = {"ms": 4.5, "lw": 1.3, "elinewidth": 1, "capsize": 2, "label": literal(name)}
            axes.errorbar(x, mean, yerr=reach, **look, **styles[name])
        if reference is not None:
            by_title = isinstance(reference, Mapping)
            known = reference[title] if by_title else Interval(*[reference] * 3, 1)
            (at,), ((below,), (above,)) = _whiskers([known], percent)
            axes.axhspan(at - below, at + above, color="0.5", alpha=0.25, lw=0)
            axes.axhline(at, color="0.35", lw=1.1, ls="--", zorder=1)
        axes.set_xscale("log" if log_x else "linear")
        left, right = axes.get_xlim()
        by_factors = log_x and right > 10 * left  # in less there would be too few ticks
        ticks = LogLocator(subs=(1, 5)) if by_factors else MaxNLocator(5, steps=STEPS)
        if log_x and drawn and 1 < len(line) <= 5:  # few points: the numbers themselves
            ticks = FixedLocator(list(line))
        axes.xaxis.set_major_locator(ticks)
        axes.xaxis.set_major_formatter("{x:,.10g}")
        axes.xaxis.set_minor_locator(NullLocator())
    return _finish(figure, values, xlabel, ylabel, share_y=True)


def label_points(figure: Figure, values: Points) -> list[list[str]]:
    """Name the points of `interval_curves(values)` beside their panels, by height: no legend.

    Returns the names on each panel's frontier, from left to right: no other point is as far left
    and as high. They are bold, and joined by a dashed line.
    """
    figure.legends[0].remove()
    figure.set_size_inches(4.2 * min(len(values), 2), 3.0 * -(-len(values) // 2))
    frontiers = []
    for axes, lines in zip(figure.axes, values.values(), strict=True):
        places = {n: (x, 100 * v.mean) for n, line in lines.items() for x, v in line.items()}
        points = pd.DataFrame(places, ["x", "y"]).T.sort_values(["x", "y"], ascending=[True, False])
        best = points[points["y"] > points["y"].cummax().shift(fill_value=-1)]
        for i, (name, point) in enumerate(points.sort_values("y").iterrows()):
            look = {"fontsize": 8, "va": "center", "weight": "bold" if name in best.index else None}
            look["arrowprops"] = {"arrowstyle": "-", "color": "0.7", "lw": 0.6, "relpos": (0, 0.5)}
            label, height = literal(name).replace(", ", ",\n", 1), i / max(1, len(points) - 1)
            axes.annotate(label, point, (1.06, height), textcoords="axes fraction", **look)
        axes.plot(best["x"], best["y"], "--", color="0.4", lw=1, drawstyle="steps-post")
        frontiers.append(list(best.index))
    return frontiers


def curves(
    values: Mapping[str, Mapping[str, Sequence[pd.Series]]],
    *,
    xlabel: str | Mapping[str, str],
    ylabel: str,
    percent: bool = False,
    log_x: bool = False,
    log_y: bool = False,
    share_y: bool = True,
) -> Figure:
    """Show curves, {title: {line: [one Series a seed, its index is x]}}, a panel a title.

    Thin lines are seeds, thick ones their mean (over x, too) as far as all seeds got.
    """
    styles, count = _styles(values.values()), len(values)
    columns = 2 if count in (2, 4) else min(count, 3)
    width = 6.5 if count == 1 else 8.8 / columns
    figure, axes_list = panels(count, columns, width, 3.0 if count <= 2 else 2.4)
    for axes, lines in zip(axes_list, values.values(), strict=True):
        axes.set(xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
        for name, seeds in lines.items():
            colour, shortest = styles[name]["color"], min(map(len, seeds))
            for seed in seeds:
                axes.plot(seed.index, seed, color=colour, alpha=0.35, lw=0.8)
            x = np.mean([seed.index[:shortest] for seed in seeds], axis=0)
            y = np.mean([seed.iloc[:shortest] for seed in seeds], axis=0)
            axes.plot(x, y, color=colour, lw=1.8, label=literal(name))
        if not log_x:
            whole = all((s.index % 1 == 0).all() for seeds in lines.values() for s in seeds)
            axes.xaxis.set_major_locator(MaxNLocator(6 if count < 3 else 4, integer=whole))
        if percent:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    return _finish(figure, values, xlabel, ylabel, share_y)


def matrix(tables: Mapping[str, pd.DataFrame], *, xlabel: str, ylabel: str) -> Figure:
    """Show tables of shares, {title: DataFrame}, as heatmaps in per cent with one scale."""
    tables = {title: 100 * table for title, table in tables.items()}
    height, width = next(iter(tables.values())).shape
    few, digits = max(height, width) <= 20, 1 if width <= 10 else 0
    size = [1.2 + 0.36 * min(max(n, 5), 10) for n in (width, height)]
    figure, axes_list = panels(len(tables), 2, *size)
    low, high = (f([f(table) for table in tables.values()]) for f in (np.min, np.max))
    look = {"cmap": "mako_r", "vmin": low, "vmax": high, "cbar": False, "fmt": ""}
    look |= {"annot_kws": {"fontsize": 8.5}, "xticklabels": few, "yticklabels": few}
    for axes, table in zip(axes_list, tables.values(), strict=True):
        numbers = table.map(lambda x: f"{x:.{digits}f}" if x > 0 else "")
        named = table.rename(index=literal, columns=literal)
        sns.heatmap(named, annot=numbers if few else False, ax=axes, **look)
        axes.tick_params(labelsize=8, length=0)
        axes.tick_params(axis="y", rotation=0)
    _finish(figure, tables, xlabel, ylabel)
    bar = figure.colorbar(axes_list[0].collections[0], ax=axes_list, shrink=0.7, aspect=30)
    bar.ax.set_title("%", fontsize=8)
    return figure


def images(
    rows: Sequence[Sequence[Picture]],
    titles: Sequence[Sequence[str]] | None = None,
    *,
    row_labels: Sequence[str] = (),
    size: float = 1.0,
    heat: bool = False,
) -> Figure:
    """Show rows of pictures (uint8, or floats in [0, 1]) of `size` inches, with titles above.

    Rows may differ in length. With `heat` the colour scale of the maps stands on the right.
    """
    columns = max(map(len, rows))
    figure, axes_list = panels(len(rows) * columns, columns, size, size + 0.12)
    figure.set_figwidth(columns * size + 0.9 * bool(row_labels) + 0.9 * heat)
    for number, axes in enumerate(axes_list):
        i, j = divmod(number, columns)
        axes.set_axis_off()
        if j < len(rows[i]):
            axes.imshow(to_rgb(rows[i][j]), interpolation="nearest")
            text = literal(titles[i][j]) if titles else ""
            text = textwrap.fill(text, int(14 * size), max_lines=2, placeholder="…")
            axes.set_title(text, fontsize=8, fontweight="normal", pad=3)
        if j == 0 and row_labels:
            how = {"transform": axes.transAxes, "ha": "right", "va": "center", "fontsize": 8.5}
            axes.text(-0.06, 0.5, literal(row_labels[i]), **how)
    if heat:
        figure.set_figwidth(figure.get_figwidth() + 1)
        figure.set_layout_engine("compressed")
        scale = plt.cm.ScalarMappable(plt.Normalize(0, 1), "viridis")
        bar = figure.colorbar(scale, ax=axes_list, fraction=0.1, shrink=min(1, 2.4 / len(rows)))
        bar.set_label("share of the map's maximum", fontsize=8)
    return figure


def to_rgb(image: Picture) -> np.ndarray:
    """Return H x W x 3 from a 3 x H x W tensor; arrays pass."""
    return image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else image


def enlarge(image: Picture, side: int = 128) -> np.ndarray:
    """Enlarge a uint8 image to `side` pixels without smoothing, so that overlays look crisp."""
    return cv2.resize(to_rgb(image).copy(), (side, side), interpolation=cv2.INTER_NEAREST)


def overlays(pictures: Iterable[Picture], maps: Iterable[Picture]) -> list[np.ndarray]:
    """Return images, enlarged, each with its map over it."""
    return [overlay(enlarge(picture), heat) for picture, heat in zip(pictures, maps, strict=True)]


def overlay(image: Picture, heat: Picture, alpha: float = 0.5) -> np.ndarray:
    """The map, enlarged, in viridis, over a grey image of half its contrast; `alpha`: its share."""
    picture, heat = to_rgb(image), np.asarray(heat.cpu() if isinstance(heat, Tensor) else heat)
    within = heat.ndim == 2 and heat.min() >= 0 and heat.max() <= 1 and 0 <= alpha <= 1
    if not within or picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        found = f"{picture.dtype} {picture.shape}, a map {heat.shape} and alpha {alpha}"
        raise ValueError(f"expected uint8 H x W x 3, a map and alpha in [0, 1]; got {found}.")
    heat = cv2.resize(heat.astype(np.float32), picture.shape[1::-1])
    levels = np.rint(255 * heat).astype(np.uint8)
    colours = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) // 2 + 64, cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(colours, alpha, grey, 1 - alpha, 0)
