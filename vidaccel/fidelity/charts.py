"""The curves of a comparison as SVG, drawn by Matplotlib.

It draws colours that no reader sees: each stands for a variable of the page's style sheet, so that one drawing serves a
light page and a dark one. Its text stays text, in the page's font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

__all__ = ["Chart", "score_chart", "step_chart"]

_COLOURS = {"ink": "#010203", "muted": "#010204", "grid": "#010205", "patched": "#010206", "floor": "#010207"}
_COLOURS |= {"limit": "#010208"}
_SIZE = (4.4, 2.5)  # inches, of 72 pixels
_MARGINS = {"left": 0.13, "right": 0.985, "bottom": 0.165, "top": 0.84}
_SETTINGS: Any = {  # Matplotlib types its names one by one
    "svg.fonttype": "none",
    "svg.hashsalt": "vidaccel",  # the same figures give the same drawing
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _COLOURS["grid"],
    "axes.labelcolor": _COLOURS["muted"],
    "text.color": _COLOURS["ink"],
    "xtick.color": _COLOURS["muted"],
    "ytick.color": _COLOURS["muted"],
    "grid.color": _COLOURS["grid"],
}


@dataclass(frozen=True)
class Chart:
    """An ``<svg>``, and where its first and last frame are: fractions of its width."""

    svg: str
    first: float
    last: float


def score_chart(
    frames: Sequence[float],
    floor: Mapping[str, Sequence[float]],
    name: str,
    *,
    label: str = "dB",
    limit: float | None = None,
    best: float | None = None,
    first_frame: int = 0,
) -> Chart:
    """A score for each frame, those of clips of equal maths, and what the worst frame must reach.

    Frames that are equal have an infinite PSNR: a triangle at the upper edge stands for each. ``best`` is the highest
    score that there is.
    """
    with rc_context(_SETTINGS):
        figure, axes = _axes("frame", label)
        _curves(axes, frames, floor, name, first_frame)
        if limit is not None:
            axes.axhline(limit, color=_COLOURS["limit"], linewidth=1.2, linestyle=(0, (4, 3)), label="needed")
        if best is not None:
            low = min(axes.get_ylim()[0], best - 1e-4)
            axes.set_ylim(low, best + 0.03 * (best - low))
        axes.set_xlim(-0.5, first_frame + len(frames) - 0.5)
        _mark_infinite(axes, frames, first_frame)
        return _drawn(figure, axes, first_frame + len(frames))


def step_chart(patched: Sequence[float], controls: Mapping[str, Sequence[float]]) -> Chart:
    """Relative error of each call of the denoiser on the reference's inputs, and that of equal maths."""
    with rc_context(_SETTINGS):
        figure, axes = _axes("call of the denoiser", "relative error")
        if any(0 < error < math.inf for errors in (patched, *controls.values()) for error in errors):
            _curves(axes, [e or math.nan for e in patched], controls, "patched", 0)
            _log_scale(axes)
        else:
            axes.set_yticks([])
            axes.text(0.5, 0.5, "every call gives the same bits", ha="center", transform=axes.transAxes)
        axes.set_xlim(-0.5, max(1, len(patched)) - 0.5)
        return _drawn(figure, axes, len(patched))


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(lambda error, _: f"{error:.0e}")
    axes.yaxis.set_minor_locator(NullLocator())


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE)
    axes = figure.add_axes((
        _MARGINS["left"], _MARGINS["bottom"], _MARGINS["right"] - _MARGINS["left"], _MARGINS["top"] - _MARGINS["bottom"]
    ))  # fmt: skip
    axes.set_xlabel(x)
    axes.set_title(y, loc="left", fontsize=9, color=_COLOURS["muted"], pad=20)
    axes.grid(axis="y", linewidth=0.8)
    axes.tick_params(length=0)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _curves(
    axes: Axes, values: Sequence[float], floor: Mapping[str, Sequence[float]], name: str, first_frame: int
) -> None:
    label = f"equal maths ({len(floor)} clip{'s' * (len(floor) > 1)})"
    for i, others in enumerate(floor.values()):
        style: dict[str, Any] = {"linewidth": 1.1, "marker": "o", "markersize": 2.5}
        axes.plot(*_points(others, first_frame), color=_COLOURS["floor"], label=None if i else label, **style)
    axes.plot(
        *_points(values, first_frame), color=_COLOURS["patched"], linewidth=2, marker="o", markersize=4, label=name
    )


def _points(values: Sequence[float], first_frame: int) -> tuple[np.ndarray, np.ndarray]:
    finite = np.array([value if math.isfinite(value) else math.nan for value in values])
    return np.arange(first_frame, first_frame + len(values)), finite


def _mark_infinite(axes: Axes, values: Sequence[float], first_frame: int) -> None:
    equal = [first_frame + i for i, value in enumerate(values) if value == math.inf]
    if equal:
        upper = axes.get_xaxis_transform()
        marks: dict[str, Any] = {"linestyle": "", "marker": "^", "markersize": 6, "clip_on": False}
        axes.plot(equal, [0.97] * len(equal), color=_COLOURS["patched"], transform=upper, label="identical", **marks)


def _drawn(figure: Figure, axes: Axes, frames: int) -> Chart:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.01), "ncols": 4, "borderaxespad": 0}
        axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, handlelength=1.4, columnspacing=1, **place)
    left, right = axes.get_xlim()
    width = _MARGINS["right"] - _MARGINS["left"]
    first, last = (_MARGINS["left"] + width * (frame - left) / (right - left) for frame in (0, max(frames - 1, 0)))
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue()[buffer.getvalue().index("<svg") :], flags=re.DOTALL)
    for variable, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Chart(svg, first, last)
