"""One HTML file that shows a comparison: clips that play side by side, curves, tables. It needs no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vidaccel.fidelity.charts import Chart, score_chart, step_chart
from vidaccel.fidelity.figures import decibels, error, flat, ratio, similarity
from vidaccel.fidelity.pictures import pictures_of

__all__ = ["page"]

Pairs = Iterable[tuple[np.ndarray, np.ndarray]]

_MOST_SITES = 12


def page(summary: Mapping[str, Any], pairs: Pairs, names: tuple[str, str], fps: float) -> str:
    """The page as text.

    Args:
        summary: That of a :class:`Comparison`, or of ``vidaccel psnr``, which knows no floor, steps or sites.
        pairs: Both clips, frame by frame, ``[H, W, 3]`` uint8.
        names: What the two are called.
        fps: Frames per second, at first.
    """
    clip = summary["clip"]
    pictures = pictures_of(pairs, clip["frames"], clip["height"], clip["width"], clip["psnr_db"]["minimum"])
    player = {"stride": pictures.stride, "psnr": [decibels(value) for value in clip["psnr_db"]["frames"]]}
    columns = [pictures.first, pictures.second, pictures.difference]
    template = _environment().get_template("page.html")
    return template.render(
        summary=summary,
        names=names,
        fps=fps,
        pictures=pictures,
        player=_script_safe(player | {"columns": columns}),
        charts=_charts(summary, names[1]),
        most_sites=_MOST_SITES,
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[[Any], Any]] = {"db": decibels, "err": error, "ratio": ratio, "ssim": similarity}
    environment.filters |= filters | {"flat": flat}
    return environment


def _script_safe(value: Any) -> Markup:
    """JSON that can stand in a ``<script>``."""
    return Markup(json.dumps(value).replace("<", "\\u003c"))


def _charts(summary: Mapping[str, Any], name: str) -> list[tuple[str, str, Chart, bool]]:
    """Title, explanation, drawing, and whether its axis is of frames."""
    clip, floor = summary["clip"], summary.get("floor", [])
    verdict, steps = summary.get("verdict", {}), summary.get("steps")
    needed = [limit for key in ("allowed_db", "min_psnr_db") if (limit := verdict.get(key)) is not None]

    def of_floor(metric: str) -> dict[str, Any]:
        return {control["control"]: control[metric]["frames"] for control in floor if control[metric]}

    scores = clip["psnr_db"]["frames"]
    text = "higher is nearer" + ("; the floor is what changes of equal maths give" if floor else "")
    chart = score_chart(scores, of_floor("psnr_db"), name, limit=max(needed, default=None))
    charts = [("PSNR per frame", text, chart, True)]
    if steps and steps["patched"]:
        text = "each call on the reference's own inputs: no drift adds up; lower is nearer"
        charts.append(("Error per step", text, step_chart(steps["patched"], steps["controls"]), False))
    if clip["flicker_psnr_db"]:
        chart = score_chart(clip["flicker_psnr_db"]["frames"], of_floor("flicker_psnr_db"), name, first_frame=1)
        charts.append(("Flicker per frame", "PSNR of what changes from the frame before", chart, True))
    chart = score_chart(clip["ssim"]["frames"], of_floor("ssim"), name, label="SSIM", best=1.0)
    charts.append(("SSIM per frame", "structural similarity; 1 is identical", chart, True))
    return charts
