"""Figures, drawn from records, as PNG or for the caller to keep. The only page that imports matplotlib."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.cbook import get_sample_data
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, PercentFormatter

from plainconv.timing import duration

OURS, TORCH, LOSS, OTHER = "#1f6feb", "#d9730d", "#cf222e", "#8c959f"
INK, FAINT = "#24292f", "#d8dee4"
DPI = 200
LABELS = {"seconds": "seconds of training", "step": "steps", "loss": "loss", "accuracy": "test accuracy"}


def sample_photograph() -> Path:
    """The photograph that matplotlib ships: Grace Hopper, 512x600, in the public domain (US Navy)."""
    return Path(str(get_sample_data("grace_hopper.jpg", asfileobj=False)))


def training(runs: Mapping[str, Sequence[Mapping[str, float]]], against: str) -> bytes:
    """Accuracy and loss of each training, side by side.

    Args:
        runs: name -> its points, each with step, seconds, loss and accuracy.
        against: "seconds" or "step".

    Returns:
        a PNG.
    """
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for name, points in runs.items():
            xs, ys = ([point[key] for point in points] for key in (against, what))
            axes.plot(xs, ys, color=_colour(name), label=name, linewidth=1.6, alpha=0.9)
            axes.plot(xs[-1:], ys[-1:], "o", color=_colour(name), markersize=4.5)
        axes.set(xlabel=LABELS[against], title=LABELS[what], xlim=(0, None))
        _plain(axes)
    left, right = figure.axes
    left.set_ylim(0, 1)
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.set_ylim(0, None)
    left.legend(frameon=False, loc="lower right")
    return _png(figure)


def times(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A bar for the median time of each algorithm, on a logarithmic axis; a line in it from quartile to quartile.

    Args:
        rows: each with name, timing (median_s, low_s, high_s) or None, and scale; in the order to draw, from the top.

    Returns:
        a PNG.
    """
    drawn = [row for row in rows if row["timing"]]
    figure = Figure(figsize=(9.6, 0.9 + 0.42 * len(drawn)), layout="constrained")
    axes = figure.subplots()
    medians = [row["timing"]["median_s"] for row in drawn]
    for place, (row, median) in enumerate(zip(drawn, medians, strict=True)):
        scaled = row["scale"] != 1
        fill, edge = ("white", OTHER) if scaled else (_colour(row["name"]),) * 2
        axes.barh(place, median, height=0.62, facecolor=fill, edgecolor=edge, hatch="////" if scaled else None)
        axes.plot([row["timing"]["low_s"], row["timing"]["high_s"]], [place, place], color=INK, linewidth=1.2)
        label = duration(median) + (", scaled from a cut-out" if scaled else "")
        axes.annotate(label, (row["timing"]["high_s"], place), (6, 0), textcoords="offset points", va="center")
    axes.set_xscale("log")
    axes.set_xlim(min(medians) / 3, max(medians) * 30)
    axes.set_yticks(range(len(drawn)), [row["name"] for row in drawn])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda s, _: duration(s)))
    axes.minorticks_off()
    _plain(axes)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return _png(figure)


def bars(suites: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> bytes:
    """A bar for every layer, torch's time over ours on a logarithmic axis; losses in their own colour.

    Args:
        suites: name -> its layers, each with name, ratio (None: the result is wrong, and no bar) and most, the ratio at
            the machine's limit, which is a mark.
        title: above the first column.

    Returns:
        a PNG.
    """
    columns = _columns(suites)
    tallest = max(sum(len(layers) + 2 for _, layers in column) for column in columns)
    figure = Figure(figsize=(5.2 * len(columns), 0.8 + 0.15 * tallest), layout="constrained")
    shown = [row["ratio"] for layers in suites.values() for row in layers if row["ratio"]]
    least, most = min([*shown, 0.8]), max([*shown, 1.25])
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        place = 0
        ticks: list[tuple[int, str]] = []
        for suite, layers in column:
            axes.annotate(suite, (least / 1.2, place), va="center", fontsize=7.5, color=INK, weight="bold")
            for row in layers:
                place += 1
                ticks.append((place, row["name"]))
                if row["ratio"] is None:
                    axes.annotate("wrong", (1, place), va="center", fontsize=6.5, color=LOSS)
                    continue
                colour = OURS if row["ratio"] >= 1 else LOSS
                axes.barh(place, row["ratio"] - 1, left=1, height=0.72, color=colour)
                axes.plot(min(row["most"], most * 1.15), place, "|", color=INK, markersize=4, markeredgewidth=0.7)
            place += 2
        axes.set_xscale("log")
        axes.set_xlim(least / 1.25, most * 1.2)
        axes.set_ylim(tallest, -1)
        axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=5.5)
        axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
        axes.minorticks_off()
        _plain(axes)
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=7)
    figure.axes[0].set_title(title, loc="left", fontsize=8)
    return _png(figure)


def convolutions(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Two bars for each layer of a model: the time of its convolution by torch, and by plainconv.

    Args:
        rows: each with name, and seconds by "torch" (None: it has none) and by "plainconv"; in the order to draw, from
            the top.
        title: above.
    """
    figure = Figure(figsize=(9.6, 1.2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for side, shift in (("torch", -0.19), ("plainconv", 0.19)):
        drawn = [(place + shift, row[side]) for place, row in enumerate(rows) if row[side] is not None]
        places, seconds = [place for place, _ in drawn], [second for _, second in drawn]
        axes.barh(places, seconds, height=0.36, color=_colour(side), label=side)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(title, loc="left")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda s, _: duration(s) if s else "0"))
    _plain(axes)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    if rows:
        axes.legend(frameon=False, loc="lower right")
    return figure


def _columns(
    suites: Mapping[str, Sequence[Mapping[str, Any]]], tall: int = 90
) -> list[list[tuple[str, Sequence[Mapping[str, Any]]]]]:
    """The suites side by side, in columns of about so many bars."""
    columns: list[list[tuple[str, Sequence[Mapping[str, Any]]]]] = [[]]
    height = 0
    for suite, layers in suites.items():
        if columns[-1] and height + len(layers) > tall:
            columns.append([])
            height = 0
        columns[-1].append((suite, layers))
        height += len(layers) + 2
    return columns


def _colour(name: str) -> str:
    return TORCH if name == "torch" else OURS


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(OTHER)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)
    axes.title.set(fontsize=11, color=INK)


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
