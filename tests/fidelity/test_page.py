"""The page that shows a comparison: as text, and in a real browser where there is one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from browser import look_at
from comparison_example import example_comparison

from vidaccel.fidelity.comparison import Comparison
from vidaccel.fidelity.metrics import likeness
from vidaccel.fidelity.page import page
from vidaccel.fidelity.pictures import pictures_of


def page_of(comparison: Comparison) -> str:
    pairs = zip(comparison.reference, comparison.patched, strict=True)
    return page(comparison.summary(), pairs, ("unpatched", "patched"), 8)


@pytest.mark.parametrize("width", [1280, 800])
@pytest.mark.parametrize("passed", [True, False], ids=["pass", "fail"])
@pytest.mark.slow
def test_in_a_browser(passed: bool, width: int, tmp_path: Path) -> None:
    (first, later, last), console = look_at(page_of(example_comparison(passed=passed, frames=12)), tmp_path, width)
    assert console == []
    assert first["width"] == width and first["scrollWidth"] <= width and first["overflowing"] == []
    for canvas in first["canvases"]:
        assert canvas[:2] == [48, 32] and canvas[2] > width / 5
    assert len(first["canvases"]) == 3
    assert first["frame"] != later["frame"]
    shown = zip(first["canvases"], later["canvases"], strict=True)
    assert all(before[3] != after[3] for before, after in shown), "every clip plays"
    assert last["frame"] == "11" and last["where"].startswith("frame 11 / 11 · PSNR ")
    assert len(first["curves"]) == 4 and all(w > width / 4 and paths > 5 for w, paths in first["curves"])
    assert {"PSNR per frame", "Error per step", "Noise floor", "Guard rails"} <= set(first["headings"])


def test_a_page_needs_nothing_else() -> None:
    text = page_of(example_comparison())
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    loaded = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert loaded <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, nothing that is fetched


def test_what_a_failed_comparison_tells() -> None:
    comparison = example_comparison(passed=False)
    text = page_of(comparison)
    for said in (">FAIL<", "Not the same clip", *comparison.verdict.reasons, "a site failed its check", "skip="):
        assert said.replace("'", "&#39;") in text


def identical(comparison: Comparison) -> dict[str, object]:
    clip = comparison.reference / 255
    return {"patched": comparison.reference, "clip": likeness(clip, clip), "floor": ()}


def one_frame(comparison: Comparison) -> dict[str, object]:
    clip = comparison.reference[:1] / 255
    frames = {"reference": comparison.reference[:1], "patched": comparison.patched[:1]}
    return {**frames, "clip": likeness(clip, clip * 0.99), "floor": ()}


def not_finite(comparison: Comparison) -> dict[str, object]:
    clip = comparison.reference / 255
    other = clip.copy()
    other[2] = np.nan
    return {"clip": likeness(clip, other)}


def bare(comparison: Comparison) -> dict[str, object]:
    return {"latents": None, "vae_psnr_db": None, "blame": None, "floor": (), "floor_left_out": ()}


def hostile(comparison: Comparison) -> dict[str, object]:
    return {"arguments": {"call": {"prompt": "</script><script>alert(1)</script>"}}}


CASES = [identical, one_frame, not_finite, bare, hostile]


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_unusual_comparisons(change: Callable[[Comparison], dict[str, object]], tmp_path: Path) -> None:
    example = example_comparison()
    text = page_of(example_comparison(**change(example)))
    assert ">inf<" not in text and ">nan" not in text and "<script>alert" not in text
    (first, _, last), console = look_at(text, tmp_path, 1000)
    assert console == [] and first["overflowing"] == []
    frames = 1 if change is one_frame else 4
    assert last["frame"] == str(frames - 1)


def test_large_clips_are_made_small() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 288, 512, 3), dtype=np.uint8)
    pairs = ((noise[0], noise[1]) for _ in range(250))
    pictures = pictures_of(pairs, 250, 288, 512, worst_psnr_db=8.0)
    assert pictures.stride == 3 and pictures.reduction == 2 and not pictures.lossless
    assert len(pictures.first) == len(pictures.second) == len(pictures.difference) == 84
    size = sum(map(len, (*pictures.first, *pictures.second, *pictures.difference)))
    assert size < 12e6  # of noise, the worst that there is


def test_one_wrong_pixel_shows_in_a_reduced_difference() -> None:
    import base64
    import io

    from PIL import Image

    a = np.full((600, 1000, 3), 100, np.uint8)
    b = a.copy()
    b[301, 501] = 101
    pictures = pictures_of([(a, b)] * 2, 2, 600, 1000, worst_psnr_db=105.9)
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures.difference[0]))))
    assert pictures.reduction == 3 and pictures.amplification == 64
    assert shown[95:105, 162:172].max() > 30 and shown[:50].max() < 8
