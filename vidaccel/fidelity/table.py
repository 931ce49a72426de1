"""A comparison as lines for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vidaccel.fidelity.figures import decibels, error, ratio, similarity
from vidaccel.patching.report import path_pattern

__all__ = ["clip_lines", "comparison_lines"]

_MOST_SITES = 5


def clip_lines(clip: Mapping[str, Any]) -> list[str]:
    """What was measured of two clips."""
    size = f"{clip['frames']} frames of {clip['width']}x{clip['height']} pixels"
    whole = clip["psnr_db"].get("of_mean_error")
    rows = [("", "mean", "worst", "frame"), *_score_rows(clip)]
    if whole is not None:
        rows.insert(2, ("PSNR of the mean error", decibels(whole), "", ""))
    return [f"{size}{', bit-identical' if clip['bit_identical'] else ''}", *_aligned(rows)]


def comparison_lines(summary: Mapping[str, Any]) -> list[str]:
    """A :class:`~vidaccel.fidelity.comparison.Comparison`: the figures, whom to blame, and last the verdict."""
    clip, verdict = summary["clip"], summary["verdict"]
    rows = [("", "mean", "worst", "frame"), *_score_rows(clip)]
    if summary["vae"]:
        rows.append(_row("VAE alone", summary["vae"]["psnr_db"], decibels))
    rows += [_row(f"floor: {control['control']}", control["psnr_db"], decibels) for control in summary["floor"]]
    lines = [f"{clip['frames']} frames of {clip['width']}x{clip['height']} pixels", *_aligned(rows)]
    if summary["latents"]:
        lines.append(f"latents: relative error {error(summary['latents']['relative_error'])}")
    lines += [
        f"{name}: {error(max(steps['patched']))} at most, of equal maths {_worst_control(steps['controls'])}"
        for name, steps in (("single steps", summary["steps"]), ("single decodes", summary.get("decodes")))
        if steps and steps["patched"]
    ]
    lines += [f"left out: {entry['control']}: {entry['reason']}" for entry in summary["floor_left_out"]]
    lines += ["", *_patched(summary["patch"]["ops"]), *_exceptions(summary["patch"])]
    lines += ["", *_sites(summary["blame"])]
    guards = summary["guard_rails"]
    lines += [f"{'FAILS' if guard['fails'] else 'note'}: {guard['what']}: {guard['detail']}" for guard in guards]
    lines += [verdict_line(verdict, clip), *(f"  {reason}" for reason in verdict["reasons"])]
    return lines


def verdict_line(verdict: Mapping[str, Any], clip: Mapping[str, Any]) -> str:
    worst = f"worst frame {clip['psnr_db']['worst_frame']}: {decibels(clip['psnr_db']['minimum'])}"
    needed = [verdict[limit] for limit in ("allowed_db", "min_psnr_db") if verdict[limit] is not None]
    worst += f", needs {decibels(max(needed))}" if needed else ""
    return f"{'PASS' if verdict['passed'] else 'FAIL'} ({verdict['rule']}): {worst}"


def _score_rows(clip: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    yield _row("PSNR", clip["psnr_db"], decibels)
    yield _row("SSIM", clip["ssim"], similarity)
    if clip["flicker_psnr_db"]:
        yield _row("flicker", clip["flicker_psnr_db"], decibels, first_frame=1)


def _row(name: str, scores: Mapping[str, Any], text: Any, first_frame: int = 0) -> tuple[str, ...]:
    return name, text(scores["mean"]), text(scores["minimum"]), str(scores["worst_frame"] + first_frame)


def _worst_control(controls: Mapping[str, Sequence[float]]) -> str:
    errors = {name: max(values) for name, values in controls.items()}
    return f"{error(max(errors.values()))} ({max(errors, key=lambda name: errors[name])})" if errors else "none"


def _sites(blame: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """The worst sites: those at fault, else the one that is nearest to it."""
    if not blame:
        return []
    at_fault = [site for site in blame if not site["ratio"] <= 1]
    rows = [("worst sites", "op", "error", "budget", "ratio", "to leave it out")]
    rows += [
        (
            *(site["path"], site["op"], error(site["error"]), error(site["budget"]), ratio(site["ratio"])),
            f"--skip {site['skip']}" if at_fault else "",
        )
        for site in (at_fault or blame[:1])[:_MOST_SITES]
    ]
    more = len(at_fault) - _MOST_SITES
    return [*_aligned(rows, right=(2, 3, 4)), *([f"and {more} more"] if more > 0 else [])]


def _patched(ops: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line per op: how many of its sites are in which state, what ran there, and what may differ."""
    width = max(map(len, ops), default=0)
    return [
        f"{op:{width}}  {', '.join(f'{count} {state}' for state, count in outcome['states'].items())} "
        f"({'+'.join(outcome['implementations'])}, {outcome['fidelity']})"
        for op, outcome in ops.items()
    ]


def _exceptions(summary: Mapping[str, Any]) -> list[str]:
    """What did not run as planned, one line per reason and kind of place."""
    lines = [
        f"{state.replace('_', ' ')}: {entry['path']}: {entry['op']} at {entry['sites']} sites: {entry['reason']}"
        for state in ("left_alone", "failed")
        for entry in summary[state]
    ]
    calls: Counter[tuple[str, str, str]] = Counter()
    for fallback in summary["fallbacks"]:
        calls[path_pattern(fallback["path"]), fallback["op"], fallback["reason"]] += fallback["calls"]
    return lines + [f"fell back: {path}: {op} in {n} calls: {reason}" for (path, op, reason), n in calls.items()]


def _aligned(rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = (1, 2, 3)) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = (
        [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    )
    return ["  ".join(row).rstrip() for row in padded]
