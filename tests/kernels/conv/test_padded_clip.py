from __future__ import annotations

import numpy as np
import pytest
import torch

from vidaccel.kernels.conv.padded_clip import Padding, pad_clip

MODES = {"zeros": "constant", "replicate": "edge", "reflect": "reflect"}


@pytest.mark.parametrize("halo", [False, True], ids=["first", "halo"])
@pytest.mark.parametrize("pixel_mode", MODES)
@pytest.mark.parametrize("frame_mode", ["zeros", "replicate"])
@pytest.mark.parametrize("counts", [(0, 0, 0), (2, 0, 1), (1, 1, 0), (3, 2, 3)], ids=str)
def test_pads_like_numpy(counts: tuple[int, int, int], frame_mode: str, pixel_mode: str, halo: bool) -> None:
    padding = Padding(*counts, frame_mode, pixel_mode)
    before, after, border = counts
    rows = torch.randn(2, 3, 4, 5, 6)
    front = torch.randn(2, before, 4, 5, 6) if halo else None
    clip = np.pad(rows, [(0, 0), (before, after), *[(0, 0)] * 3], mode=MODES[frame_mode])
    if front is not None:
        clip[:, :before] = front
    expected = np.pad(clip, [(0, 0)] * 2 + [(border, border)] * 2 + [(0, 0)], mode=MODES[pixel_mode])
    padded = pad_clip(rows, front, padding)
    assert padded.is_contiguous() and tuple(padded.shape) == padding.shape(rows.shape)
    assert np.array_equal(padded, expected) and torch.equal(padding.inner(padded), rows)


def test_a_clip_without_padding_is_itself() -> None:
    rows = torch.randn(1, 2, 3, 4, 5)
    assert pad_clip(rows, None, Padding()) is rows
