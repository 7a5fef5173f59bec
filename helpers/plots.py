"""The study's figures: one function a figure, each of which returns a matplotlib Figure.

Colours are seaborn's colour-blind palette, in an order that every figure keeps for the same thing.
`save_figure` writes the PNG that the report takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter
from torch import Tensor

from helpers import evaluation
from helpers.config import Study
from helpers.evaluation import Interval, Timing
from helpers.gradcam import colourbar

PALETTE = sns.color_palette("colorblind")
FIGURE_DPI = 110
LARGEST_FIGURE = 300_000  # bytes: figures are committed, so they stay small

# How the networks are called and coloured in every figure.
MODEL_TITLES = {"simple_cnn": "SimpleCNN"} | {
    f"resnet{depth}": f"ResNet-{depth}" for depth in (18, 20, 32, 34, 44, 50, 56, 101, 110, 152)
}


def use_style() -> None:
    """Set seaborn's quiet style for all figures that follow."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.85)
    plt.rcParams.update({"figure.dpi": 90, "axes.titlesize": 11, "axes.titleweight": "bold"})


def save_figure(figure: Figure, study: Study, name: str) -> Path:
    """Write a figure as PNG into the study's set and return its path.

    Photographs in a grid make large files; above 300 kB the resolution is lowered until it fits.
    """
    path = study.figures_dir / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    dpi = FIGURE_DPI
    while True:
        figure.savefig(path, dpi=dpi, bbox_inches="tight", metadata={"Software": None})
        if path.stat().st_size <= LARGEST_FIGURE or dpi < 40:
            return path
        dpi = int(dpi * 0.85)


def _panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a grid of `count` panels of width x height inches; spare ones are hidden."""
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(columns * width, rows * height),
        squeeze=False,
        layout="constrained",
    )
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_visible(False)
    return figure, flat[:count]


def to_rgb(image: Tensor | np.ndarray) -> np.ndarray:
    """Return H x W x 3 from a 3 x H x W tensor; arrays pass."""
    return image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else image


def _literal(text: str) -> str:
    """Return a class's name as matplotlib shows it: dollar signs would begin a formula."""
    return text.replace("$", r"\$")


def _show(axes: Axes, image: Tensor | np.ndarray, title: str) -> None:
    axes.imshow(to_rgb(image), interpolation="nearest")
    axes.set_title(_literal(title), fontsize=8, fontweight="normal", pad=3)
    axes.set_axis_off()


def _errorbar(
    axes: Axes, x: object, values: Iterable[Interval], factor: float = 100, **style: object
) -> None:
    """Draw intervals at the places `x`: the means as points, whiskers over the intervals."""
    mean, low, high = factor * np.array([(v.mean, v.low, v.high) for v in values]).T
    axes.errorbar(x, mean, yerr=np.maximum([mean - low, high - mean], 0), **style)


def _legend_above(figure: Figure, axes: Axes, columns: int | None = None) -> None:
    """Put one legend, that of `axes`, above all panels."""
    handles, names = axes.get_legend_handles_labels()
    columns = columns or len(names)
    figure.legend(handles, names, loc="outside upper center", ncols=columns, fontsize=9)


# --- Data --------------------------------------------------------------------------------------


def image_grid(
    images: Sequence[Tensor | np.ndarray],
    titles: Sequence[str],
    *,
    columns: int,
    size: float = 1.0,
    row_labels: Sequence[str] = (),
) -> Figure:
    """Show images in rows of `columns`; `row_labels` stand to the left of each row."""
    figure, panels = _panels(len(images), columns, size, size + 0.08)
    for axes, image, title in zip(panels, images, titles, strict=True):
        _show(axes, image, title)
    for row, label in enumerate(row_labels):
        panels[row * columns].annotate(
            _literal(label),
            (0, 0.5),
            xytext=(-6, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=9,
        )
    return figure


def class_balance(counts: pd.DataFrame) -> Figure:
    """Show images a class (rows) in each split (columns) as grouped bars."""
    figure, axes = plt.subplots(figsize=(8, 2.8), layout="constrained")
    turned = 30 if len(counts) <= 20 else 90
    counts.rename(index=_literal).plot.bar(ax=axes, width=0.8, rot=turned, legend=False)
    axes.set(xlabel="", ylabel="images", title="Images a class")
    _legend_above(figure, axes)
    axes.grid(axis="x", visible=False)
    return figure


def timings(times: Mapping[str, Timing], unit: str, scale: float, title: str) -> Figure:
    """Show medians as bars on a logarithmic scale, whiskers from fastest to slowest repeat."""
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(times) + 1.1), layout="constrained")
    medians = np.array([t.median for t in times.values()]) * scale
    lows = np.array([t.low for t in times.values()]) * scale
    highs = np.array([t.high for t in times.values()]) * scale
    axes.barh(list(times), medians, xerr=[medians - lows, highs - medians], color=PALETTE[0])
    for y, (median, high) in enumerate(zip(medians, highs, strict=True)):
        axes.annotate(
            f"{median:.3g}", (high, y), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axes.set(xscale="log", xlabel=unit, title=title)
    axes.set_xlim(right=highs.max() * 2)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure


# --- Architectures -----------------------------------------------------------------------------


def gradient_norms(
    norms: Mapping[str, Mapping[int, Sequence[float]]], shared_from: int = 1
) -> Figure:
    """Show gradient norms by relative depth: a panel a kind of network, a line a depth.

    The panels from number `shared_from` on share their scale.
    `norms[kind][depth]` lists the norms from the first convolution to the last.
    """
    figure, panels = _panels(len(norms), len(norms), 3.2, 3.0)
    for axes, (kind, by_depth) in zip(panels, norms.items(), strict=True):
        colours = sns.color_palette("viridis", len(by_depth))
        for colour, (depth, values) in zip(colours, by_depth.items(), strict=True):
            position = np.linspace(0, 1, len(values))
            axes.plot(position, values, color=colour, label=str(depth), linewidth=1.6)
        axes.set(yscale="log", xlabel="position (0 input, 1 output)", title=kind)
    # Without batch norm, the first kind in 02, norms can be smaller by forty powers of ten.
    _share_y(panels[shared_from:])
    panels[0].set_ylabel("norm of the loss's gradient\nfor a convolution's weights")
    panels[-1].legend(title="layers", fontsize=8)
    return figure


def parameters_and_cost(table: pd.DataFrame) -> Figure:
    """Show parameters and multiply-adds of each network (columns of `table`) as two bar panels."""
    figure, panels = _panels(2, 2, 4.2, 0.42 * len(table) + 1.1)
    for axes, column, unit in zip(
        panels, ("parameters", "multiply-adds"), ("millions", "millions an image"), strict=True
    ):
        values = table[column] / 1e6
        bars = axes.barh(table.index, values, color=PALETTE[: len(table)])
        axes.bar_label(bars, [f"{v:,.3g}" if v < 1000 else f"{v:,.0f}" for v in values], padding=3)
        axes.set(title=column.capitalize(), xlabel=unit)
        axes.set_xlim(right=values.max() * 1.2)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    return figure


# --- Training ----------------------------------------------------------------------------------


def learning_curves(
    histories: Mapping[str, Sequence[pd.DataFrame]],
    column: str,
    *,
    columns: int = 3,
    ends: Mapping[str, Sequence[int]] | None = None,
) -> Figure:
    """Show training and validation curves of `column` ("loss" or "accuracy"), a panel a method.

    Thin lines are seeds, thick ones their mean as far as all seeds got; `ends` marks epochs (those
    whose weights early stopping kept).
    """
    figure, panels = _panels(len(histories), columns, 2.9, 2.3)
    for axes, (name, seeds) in zip(panels, histories.items(), strict=True):
        for colour, part in zip(PALETTE[:2], ("train", "validation"), strict=True):
            curves = [h[f"{part}_{column}"].to_numpy() for h in seeds]
            for curve in curves:
                axes.plot(np.arange(1, len(curve) + 1), curve, color=colour, alpha=0.3, lw=0.8)
            shortest = min(map(len, curves))
            mean = np.mean([curve[:shortest] for curve in curves], axis=0)
            axes.plot(np.arange(1, shortest + 1), mean, color=colour, lw=2, label=part)
        for end in (ends or {}).get(name, ()):
            axes.axvline(end, color="0.4", lw=1, ls="--")
        axes.set_title(name)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if column == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
    _share_y(panels)
    for axes in panels[-columns:]:
        axes.set_xlabel("epoch")
    for axes in panels[::columns]:
        axes.set_ylabel(column if column == "accuracy" else "cross-entropy (nats)")
    panels[0].legend(fontsize=8)
    return figure


def _share_y(panels: Sequence[Axes]) -> None:
    limits = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def intervals(
    values: Mapping[str, Interval],
    *,
    title: str,
    label: str,
    percent: bool = True,
    zero: bool = False,
    reference: str | None = None,
) -> Figure:
    """Show means as points with their 95 % intervals, one row a name.

    `reference` names the row whose mean is drawn through as a line; `zero` draws the line at 0.
    """
    figure, axes = plt.subplots(figsize=(7, 0.36 * len(values) + 1.1), layout="constrained")
    factor = 100 if percent else 1
    for y, v in enumerate(values.values()):
        low, high = factor * (v.mean - v.low), factor * (v.high - v.mean)
        mean = factor * v.mean
        axes.errorbar(mean, y, xerr=[[low], [high]], fmt="o", color=PALETTE[0], capsize=3)
        axes.annotate(
            evaluation.percent(v.mean) if percent else f"{mean:.3g}",
            (mean, y),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.7)
    if reference is not None:
        axes.axvline(factor * values[reference].mean, color="0.5", lw=1, ls="--", zorder=0)
    if zero:
        axes.axvline(0, color="0.5", lw=1, ls="--", zorder=0)
    axes.set(title=title, xlabel=label)
    return figure


# --- Depth -------------------------------------------------------------------------------------


def accuracy_against_cost(
    accuracy: Mapping[str, Interval], costs: pd.DataFrame, labels: Mapping[str, str]
) -> Figure:
    """Show test accuracy against each cost (column of `costs`), a panel a cost, log scale."""
    figure, panels = _panels(len(costs.columns), 2, 4.2, 2.7)
    for axes, column in zip(panels, costs.columns, strict=True):
        for style, (name, v) in enumerate(accuracy.items()):
            _errorbar(
                axes,
                [costs.loc[name, column]],
                [v],
                fmt="osD^vP"[style % 6],
                color=PALETTE[style % len(PALETTE)],
                capsize=3,
                label=name,
            )
        axes.set(xscale="log", xlabel=labels[column])
        _label_log_x(axes)
    for axes in panels[::2]:
        axes.set_ylabel("test accuracy (%)")
    _legend_above(figure, panels[0])
    return figure


def _label_log_x(axes: Axes) -> None:
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    if high / low < 30:  # too narrow for powers of ten: round numbers instead
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.4g}")


def accuracy_by_epoch(histories: Mapping[str, Sequence[pd.DataFrame]]) -> Figure:
    """Show validation accuracy by epoch and by training time, one line a network (seed mean)."""
    figure, panels = _panels(2, 2, 4.4, 3.0)
    for colour, (name, seeds) in zip(PALETTE, histories.items(), strict=False):
        shortest = min(map(len, seeds))
        accuracy = np.mean([h["validation_accuracy"][:shortest] for h in seeds], axis=0)
        seconds = np.mean([h["seconds"][:shortest].cumsum() for h in seeds], axis=0)
        panels[0].plot(np.arange(1, shortest + 1), 100 * accuracy, color=colour, label=name)
        panels[1].plot(seconds, 100 * accuracy, color=colour, label=name)
    panels[0].set(xlabel="epoch", ylabel="validation accuracy (%)", title="By epoch")
    panels[1].set(xlabel="training time (s)", title="By training time")
    panels[0].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    panels[0].legend(fontsize=8)
    return figure


def confusion_matrices(matrices: Mapping[str, np.ndarray], classes: Sequence[str]) -> Figure:
    """Show confusion matrices as shares of the true class (rows), a panel a network."""
    figure, panels = _panels(len(matrices), 2, 4.3, 3.9)
    few, classes = len(classes) <= 20, [_literal(name) for name in classes]
    for i, (axes, (name, counts)) in enumerate(zip(panels, matrices.items(), strict=True)):
        shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        sns.heatmap(
            shares,
            ax=axes,
            cmap="mako_r",
            vmin=0,
            vmax=100,
            square=True,
            annot=np.vectorize(lambda x: f"{x:.0f}" if x >= 0.5 else "")(shares) if few else False,
            fmt="",
            annot_kws={"fontsize": 7},
            cbar=False,
            xticklabels=classes if few else False,
            yticklabels=classes if few and i % 2 == 0 else False,
        )
        axes.set_title(name)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true" if i % 2 == 0 else "")
        axes.tick_params(labelsize=8, length=0)
    figure.suptitle("Share of each true class (%)", fontsize=10)
    return figure


# --- Training recipes --------------------------------------------------------------------------


def schedules(rates: Mapping[str, Sequence[float]]) -> Figure:
    """Show learning rates by step, as shares of the peak: a panel a recipe."""
    figure, panels = _panels(len(rates), len(rates), 2.3, 2.1)
    for axes, (name, values) in zip(panels, rates.items(), strict=True):
        axes.plot(np.linspace(0, 1, len(values)), values, color=PALETTE[0], lw=2)
        axes.set(title=name, xlabel="share of the steps", ylim=(-0.05, 1.1))
    panels[0].set_ylabel("learning rate / peak")
    return figure


def learning_rate_range(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], marks: Mapping[str, float]
) -> Figure:
    """Show training loss against a growing learning rate, one line a seed; `marks` names rates."""
    figure, axes = plt.subplots(figsize=(6.5, 3.0), layout="constrained")
    for colour, (name, (rates, losses)) in zip(PALETTE, curves.items(), strict=False):
        axes.plot(rates, losses, color=colour, label=name)
    for style, (name, rate) in zip(("--", ":", "-."), marks.items(), strict=False):
        axes.axvline(rate, color="0.3", ls=style, lw=1.4, label=name)
    highest = max(losses[0] for _, losses in curves.values())
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss (nats, smoothed)")
    axes.set_ylim(top=1.5 * highest)
    axes.set_title("Range test")
    axes.legend(fontsize=8)
    return figure


def grid(values: pd.DataFrame, columns: str, rows: str, title: str) -> Figure:
    """Show a table of shares as a heatmap in per cent, the largest one framed."""
    figure, axes = plt.subplots(
        figsize=(1.0 * values.shape[1] + 2.2, 0.55 * values.shape[0] + 1.3), layout="constrained"
    )
    written = values.map(evaluation.percent)
    sns.heatmap(
        100 * values,
        ax=axes,
        cmap="mako",
        annot=written,
        fmt="",
        cbar_kws={"label": "%"},
        linewidths=0.5,
    )
    row, column = np.unravel_index(int(values.to_numpy().argmax()), values.shape)
    frame = plt.Rectangle((column, row), 1, 1, fill=False, edgecolor=PALETTE[1], lw=3)
    axes.add_patch(frame)
    axes.set(title=title, xlabel=columns, ylabel=rows)
    axes.tick_params(axis="y", rotation=0)
    return figure


def accuracy_against_seconds(panels: Mapping[str, Mapping[str, tuple[float, Interval]]]) -> Figure:
    """Show test accuracy against training seconds, one panel a group, one marker a variant."""
    figure, axes_of = _panels(len(panels), 2, 4.6, 3.4)
    for axes, (title, points) in zip(axes_of, panels.items(), strict=True):
        for style, (name, (seconds, v)) in enumerate(points.items()):
            _errorbar(
                axes,
                [seconds],
                [v],
                fmt="osD^vP<>"[style % 8],
                color=PALETTE[style % len(PALETTE)],
                capsize=3,
                label=name,
            )
        axes.set(title=title, xlabel="training time (s)")
        axes.set_xlim(left=0)
        axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    axes_of[0].set_ylabel("test accuracy (%), 95 % interval")
    return figure


# --- Maps measured -----------------------------------------------------------------------------


def method_panels(table: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Show each method's and control's mean with its interval, a panel a metric, a colour a layer.

    `table` is that of `cam_metrics.compare` with a column `layer`; `titles` maps the metrics shown
    to their panels' titles. Controls stand below the line, in grey.
    """
    names = table[["method", "control"]].drop_duplicates()
    layers = list(table.loc[~table["control"], "layer"].unique())
    width = max(2.3, 6 / len(titles))
    figure, panels = _panels(len(titles), len(titles), width, 0.34 * len(names) + 1.2)
    places = {name: y for y, name in enumerate(names["method"])}
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        for row in table[(table["metric"] == metric) & (table["n"] > 0)].itertuples():
            at = layers.index(row.layer) if row.layer in layers else (len(layers) - 1) / 2
            axes.errorbar(
                row.mean,
                places[row.method] + 0.5 * ((at + 0.5) / len(layers) - 0.5),
                xerr=[[max(0, row.mean - row.low)], [max(0, row.high - row.mean)]],
                fmt="s" if row.control else "o",
                color="0.45" if row.control else PALETTE[layers.index(row.layer)],
                markersize=4,
                capsize=2,
            )
        axes.axhline(len(names) - names["control"].sum() - 0.5, color="0.6", lw=1)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), list(names["method"]) if axes is panels[0] else [])
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(title, fontsize=9)
    if len(layers) > 1:
        points = [plt.Line2D([], [], marker="o", ls="", color=c) for c in PALETTE[: len(layers)]]
        points.append(plt.Line2D([], [], marker="s", ls="", color="0.45"))
        figure.legend(points, [*layers, "control"], loc="outside upper center", ncols=len(points))
    return figure


# --- Dataset size ------------------------------------------------------------------------------


def curves_by_size(
    panels: Mapping[str, Mapping[str, Mapping[int, Interval]]],
    labels: Sequence[str],
    *,
    line: float,
    first_colour: int = 0,
) -> Figure:
    """Show intervals (as percentages) against the number of training images, on a log scale.

    `panels[title][network][size]`, two panels a row; `labels` are the rows' y labels. `line` is a
    share drawn through (chance, or 0 for differences). The first network has the colour number
    `first_colour`, so that it keeps its colour where others are left out.
    """
    figure, axes_list = _panels(len(panels), 2, 4.4, 2.7)
    for axes, (title, networks) in zip(axes_list, panels.items(), strict=True):
        for i, (network, by_size) in enumerate(networks.items()):
            style = first_colour + i
            sizes = np.array(list(by_size))
            _errorbar(
                axes,
                sizes * 1.04 ** (i - (len(networks) - 1) / 2),  # side by side, not on each other
                by_size.values(),
                fmt="osD^"[style] + "-",
                color=PALETTE[style],
                markersize=4,
                linewidth=1.2,
                elinewidth=1,
                capsize=2,
                label=network,
            )
        axes.axhline(100 * line, color="0.3", lw=1.2, ls="--", zorder=1)
        axes.set(xscale="log", title=title)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
    for row, label in enumerate(labels):
        pair = axes_list[2 * row : 2 * row + 2]
        _share_y(pair)
        pair[0].set_ylabel(label)
    for axes in axes_list[-2:]:
        axes.set_xlabel("training images")
    _legend_above(figure, axes_list[0])
    return figure


def beside_published(
    panels: Mapping[str, Mapping[str, Interval]], published: Mapping[str, float]
) -> Figure:
    """Show a panel of measured shares for each quantity, in the last beside published ones.

    `panels[title][network]`; whiskers are 95 % intervals.
    """
    figure, axes_list = _panels(len(panels), len(panels), 3.6, 2.6)
    for axes, (title, values) in zip(axes_list, panels.items(), strict=True):
        _errorbar(
            axes,
            np.arange(len(values)) - 0.08,
            values.values(),
            fmt="o",
            color=PALETTE[0],
            capsize=3,
            label="measured here",
        )
        axes.set_xticks(range(len(values)), list(values))
        axes.set_xlim(-0.5, len(values) - 0.5)
        axes.set_ylim(0, 105)
        axes.set_title(title)
    axes_list[-1].plot(
        np.arange(len(published)) + 0.08,
        [100 * share for share in published.values()],
        "D",
        color="0.35",
        markerfacecolor="white",
        label="published, on other images",
    )
    axes_list[0].set_ylabel("%")
    _legend_above(figure, axes_list[-1])
    return figure


# --- Calibration, robustness and degradation ---------------------------------------------------


def reliability_diagrams(tables: Mapping[str, Mapping[str, pd.DataFrame]]) -> Figure:
    """Show accuracy against confidence: a panel a network, a line for each of its tables.

    `tables[network][name]` comes from `evaluation.reliability`. The larger a point, the more
    images have that confidence; on the dashed diagonal a network is as right as it is sure.
    """
    figure, panels = _panels(len(tables), len(tables), 3.7, 3.4)
    for axes, (network, by_name) in zip(panels, tables.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="0.5", lw=1, ls="--", zorder=0)
        for style, (name, table) in enumerate(by_name.items()):
            filled = table[table["images"] > 0]
            colour = PALETTE[style]
            axes.plot(filled["confidence"], filled["accuracy"], color=colour, lw=1, label=name)
            share = filled["images"] / filled["images"].sum()
            axes.scatter(
                filled["confidence"],
                filled["accuracy"],
                s=8 + 500 * share,
                color=colour,
                marker="os"[style % 2],
                alpha=0.6,
            )
        axes.set(title=network, xlabel="confidence", xlim=(0, 1.03), ylim=(-0.03, 1.03))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
    panels[0].set_ylabel("accuracy")
    panels[0].legend(fontsize=8)
    return figure


def corruption_curves(curves: Mapping[str, Mapping[str, Sequence[Interval]]]) -> Figure:
    """Show accuracy against severity with 95 % intervals: a panel a corruption, a line a network.

    `curves[corruption][network]` lists the intervals from severity 0, the image as it is.
    """
    figure, panels = _panels(len(curves), 2, 4.2, 2.6)
    for axes, (corruption, by_network) in zip(panels, curves.items(), strict=True):
        for i, (network, values) in enumerate(by_network.items()):
            # Side by side, so that the bars of several networks can be told apart.
            severity = np.arange(len(values)) + 0.09 * (i - (len(by_network) - 1) / 2)
            _errorbar(
                axes,
                severity,
                values,
                color=PALETTE[i % len(PALETTE)],
                fmt="-" + "osD^vP"[i % 6],
                markersize=4,
                lw=1.4,
                elinewidth=0.8,
                label=network,
            )
        axes.set_title(corruption)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _share_y(panels)
    for axes in panels[-2:]:
        axes.set_xlabel("severity (0: the image as it is)")
    for axes in panels[::2]:
        axes.set_ylabel("accuracy (%)")
    _legend_above(figure, panels[0], columns=min(4, len(next(iter(curves.values())))))
    return figure


def class_errors(errors: pd.DataFrame) -> Figure:
    """Show the share of each class (rows of `errors`) that a network (columns) gets wrong.

    Classes stand in the order of their mean error; of more than 20, the 20 worst are shown.
    """
    worst = errors.loc[errors.mean(axis=1).sort_values(ascending=False).index[:20]]
    figure, axes = plt.subplots(figsize=(7, 0.27 * len(worst) + 1.2), layout="constrained")
    for i, network in enumerate(worst):
        marker = "osD^vP"[i % 6]
        axes.scatter(
            100 * worst[network],
            range(len(worst)),
            color=PALETTE[i % len(PALETTE)],
            marker=marker,
            alpha=0.85,
            label=network,
        )
    axes.set_yticks(range(len(worst)), [_literal(name) for name in worst.index])
    axes.set_ylim(len(worst) - 0.5, -0.5)
    axes.set(xlabel="wrongly classified test images of the class (%)", title="Errors by class")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def degradation(histories: Mapping[str, Mapping[int, Sequence[pd.DataFrame]]]) -> Figure:
    """Show training and validation error by epoch: a panel a kind of network, a colour a depth.

    In the form of He et al. (2016), figure 6. `histories[kind][depth]` lists the histories of the
    seeds: lines are their means, bands reach from the lowest to the highest.
    """
    figure, panels = _panels(len(histories), len(histories), 4.4, 3.2)
    styles = {"train": {"lw": 1.2, "ls": "--"}, "validation": {"lw": 2.4}}
    for axes, (kind, by_depth) in zip(panels, histories.items(), strict=True):
        for colour, (depth, seeds) in zip(PALETTE, by_depth.items(), strict=False):
            for part, style in styles.items():
                errors = np.stack([100 * (1 - h[f"{part}_accuracy"]) for h in seeds])
                epochs = np.arange(1, errors.shape[1] + 1)
                label = f"{depth} layers, {part}"
                axes.plot(epochs, errors.mean(axis=0), color=colour, label=label, **style)
                axes.fill_between(epochs, errors.min(0), errors.max(0), color=colour, alpha=0.12)
        axes.set(title=kind, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _share_y(panels)
    panels[0].set_ylabel("error (%)")
    panels[-1].legend(fontsize=8)
    return figure


# --- Pruning -----------------------------------------------------------------------------------


def against_share(
    panels: Mapping[str, Mapping[str, Mapping[float, Interval]]],
    references: Mapping[str, Interval],
    *,
    label: str,
    reference: str,
    percent: bool = True,
) -> Figure:
    """Show intervals against the share that was pruned: two panels a row, a line a variant.

    `panels[title][variant]` maps shares in [0, 1] to intervals; `references[title]` is drawn as a
    band called `reference`. With `percent` the values are shown in per cent.
    """
    figure, axes_list = _panels(len(panels), 2, 4.3, 2.7)
    factor = 100 if percent else 1
    for axes, (title, variants) in zip(axes_list, panels.items(), strict=True):
        known = references[title]
        axes.axhspan(factor * known.low, factor * known.high, color="0.5", alpha=0.25, lw=0)
        axes.axhline(factor * known.mean, color="0.4", lw=1, ls="--", label=reference)
        for colour, marker, (name, points) in zip(PALETTE, "os^", variants.items(), strict=False):
            _errorbar(
                axes,
                [100 * share for share in points],
                points.values(),
                factor,
                fmt=f"{marker}-",
                markersize=5,
                color=colour,
                capsize=3,
                label=name,
            )
        axes.set(title=title, xlim=(-3, 103))
    _share_y(axes_list)
    for axes in axes_list[::2]:
        axes.set_ylabel(label)
    for axes in axes_list[-2:]:
        axes.set_xlabel("share removed (%)")
    _legend_above(figure, axes_list[0])
    return figure


def accuracy_against_size(
    accuracy: Mapping[str, Mapping[str, Interval]],
    costs: Mapping[str, pd.DataFrame],
    labels: Mapping[str, str],
) -> Figure:
    """Show test accuracy against each cost, a panel a cost on a log scale, a line a way to prune.

    `accuracy[way]` maps a point's short name, which is written beside it, to its interval; the
    rows of `costs[way]` have these names, its columns are those of `labels`.
    """
    figure, panels = _panels(len(labels), 2, 4.4, 3.0)
    for axes, (column, label) in zip(panels, labels.items(), strict=True):
        for style, (way, points) in enumerate(accuracy.items()):
            x = costs[way].loc[list(points), column].to_numpy(float)
            _errorbar(
                axes,
                x,
                points.values(),
                fmt="*osD"[style] + "-",
                markersize=10 if style == 0 else 5,
                color=PALETTE[(3, 0, 1, 2)[style]],
                capsize=2,
                lw=1,
                label=way,
            )
            place = {"xytext": (5, -9)} if style % 2 else {"xytext": (-5, 3), "ha": "right"}
            for (name, v), at in zip(points.items(), x, strict=True):
                axes.annotate(
                    name,
                    (at, 100 * v.mean),
                    **place,
                    textcoords="offset points",
                    fontsize=7,
                    color="0.3",
                )
        axes.set(xscale="log", xlabel=label)
        _label_log_x(axes)
    for axes in panels[::2]:
        axes.set_ylabel("test accuracy (%)")
    _legend_above(figure, panels[0])
    return figure


# --- Grad-CAM ----------------------------------------------------------------------------------


def heat_panels(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[Sequence[str]],
    *,
    row_labels: Sequence[str] = (),
    size: float = 1.35,
) -> Figure:
    """Show rows of pictures with titles, and the colour scale of the maps on the right."""
    columns = max(map(len, rows))
    height = size + 0.3
    figure, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(columns * size + 1.2, len(rows) * height),
        squeeze=False,
        layout="constrained",
    )
    for i, row in enumerate(rows):
        for j in range(columns):
            if j < len(row):
                _show(axes[i][j], row[j], titles[i][j])
            else:
                axes[i][j].set_visible(False)
        if row_labels:
            axes[i][0].annotate(
                _literal(row_labels[i]),
                (0, 0.5),
                xytext=(-6, 0),
                xycoords="axes fraction",
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
            )
    bar = colourbar(height=320)
    side = figure.add_axes((1.0, 0.5 - min(0.4, 1.0 / len(rows) / height), 0.09, 0), frameon=False)
    share = min(0.9, 2.2 / (len(rows) * height))
    side.set_position((1.0, 0.5 - share / 2, 0.7 / (columns * size + 1.2), share))
    side.imshow(bar)
    side.set_axis_off()
    return figure


def enlarge(image: Tensor | np.ndarray, side: int = 128) -> np.ndarray:
    """Enlarge a uint8 image to `side` pixels without smoothing, so that overlays look crisp."""
    return cv2.resize(to_rgb(image).copy(), (side, side), interpolation=cv2.INTER_NEAREST)
