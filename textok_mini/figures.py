"""The pictures that notebooks share: images with their captions beneath, strips to compare, curves with bands."""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from textok_mini.images import pixels
from textok_mini.intervals import Interval

# One colour an arm through the whole book, told apart also without colour vision (Okabe and Ito's palette).
COLOURS = {"textok": "#0072B2", "twin": "#D55E00", "registers": "#009E73", "wrong caption": "#CC79A7"}


def show_images(
    images: Tensor, captions: Sequence[str] | None = None, columns: int = 6, lines: int = 5, credit: str = ""
) -> Figure:
    """Images with their captions wrapped beneath them, and below all the `credit` of whoever drew them. A caption is
    text, never mathtext: `$` stays `$`."""
    pictures = pixels(images)
    rows = -(-len(pictures) // columns)
    height = 1.9 * (1.0 + (0.11 * lines if captions is not None else 0.05))
    figure, axes = plt.subplots(rows, columns, figsize=(1.9 * columns, height * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, picture) in enumerate(zip(axes.flat, pictures, strict=False)):
        axis.imshow(picture, interpolation="nearest")
        if captions is not None:
            wrapped = textwrap.shorten(captions[i], 24 * lines, placeholder=" …")
            axis.text(
                0.5, -0.04, textwrap.fill(wrapped, 24), transform=axis.transAxes, ha="center", va="top",
                fontsize=7.5, parse_math=False,
            )  # fmt: skip
    figure.tight_layout(pad=0.4)
    give(figure, credit)
    return figure


def give(figure: Figure, credit: str) -> None:
    figure.text(0.995, -0.03, credit, ha="right", va="top", fontsize=6, color="#666666", parse_math=False)


def compare_images(
    rows: Mapping[str, Tensor],
    captions: Sequence[str] | None = None,
    width: float = 1.35,
    lines: int = 5,
    credit: str = "",
) -> Figure:
    """Rows of images under one another, each row with its name at the left; captions, if any, under the last, and
    below all the `credit` of whoever drew the originals."""
    count = len(next(iter(rows.values())))
    extra = 0.14 * lines if captions is not None else 0
    figure, axes = plt.subplots(
        len(rows), count, figsize=(width * count + 0.9, width * (len(rows) + extra)), squeeze=False
    )
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pixels(images), strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(textwrap.fill(name, 16), rotation=0, ha="right", va="center", fontsize=9)
    if captions is not None:
        for axis, caption in zip(axes[-1], captions, strict=True):
            text = textwrap.fill(textwrap.shorten(caption, 20 * lines, placeholder=" …"), 20)
            axis.set_xlabel(text, fontsize=6.5, parse_math=False)
    figure.tight_layout(pad=0.3)
    give(figure, credit)
    return figure


def plot_curves(
    axis: Axes, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str
) -> Axes:
    """Named (x, y) curves on one axis, an arm's colour by its name."""
    for name, (x, y) in curves.items():
        axis.plot(x, y, marker="o" if len(x) < 15 else None, ms=3, label=name, color=COLOURS.get(name))
    axis.set(xlabel=x_label, ylabel=y_label)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return axis


def plot_intervals(axis: Axes, intervals: Mapping[str, Interval], label: str) -> Axes:
    """Named figures as points with their intervals, from top to bottom, zero marked."""
    for i, (name, x) in enumerate(intervals.items()):
        errors = [[x.mean - x.low], [x.high - x.mean]]
        axis.errorbar(x.mean, -i, xerr=errors, fmt="o", capsize=3, color=COLOURS.get(name, "#333333"))
    axis.axvline(0, color="#888888", lw=0.8)
    axis.set(yticks=[-i for i in range(len(intervals))], yticklabels=list(intervals), xlabel=label)
    axis.grid(alpha=0.3, axis="x")
    return axis
