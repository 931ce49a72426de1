"""PSNR against its formula, SSIM against known values, and the verdict's rule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from vidaccel.fidelity.metrics import Scores, flicker_psnr, likeness, psnr, relative_error, ssim

ROWS, COLUMNS = np.mgrid[:24, :33]


def checked(shift: np.ndarray | int = 0) -> np.ndarray:
    """A frame ``[24, 33, 3]`` of sharp, channel-dependent texture."""
    return np.stack([(COLUMNS * 7 + ROWS * 11 + c * 5 + shift) % 29 / 28 for c in range(3)], axis=-1)


# structural_similarity(a, b, channel_axis=-1, data_range=1, gaussian_weights=True, sigma=1.5,
# use_sample_covariance=False) of scikit-image 0.26.0
@pytest.mark.parametrize(
    ("other", "expected"),
    [
        pytest.param(checked((COLUMNS * ROWS) % 3), 0.8559260463062818, id="other-texture"),
        pytest.param(checked() * 0.9 + 0.05, 0.9944909417123341, id="less-contrast"),
    ],
)
def test_ssim_of_known_frames(other: np.ndarray, expected: float) -> None:
    assert ssim(checked()[None], other[None]) == pytest.approx([expected], abs=1e-12)


def test_psnr_of_a_known_difference() -> None:
    clip = np.zeros((3, 4, 5, 3))
    other = clip + np.array([0.1, 0.01, 0.0]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(psnr(clip, other), [20.0, 40.0, np.inf])


def test_psnr_of_float32_clips_is_computed_in_float64() -> None:
    clip = np.full((1, 64, 64, 3), 0.5, np.float32)
    other = clip + np.float32(2**-20)
    np.testing.assert_allclose(psnr(clip, other), [20 * np.log10(2**20)], rtol=1e-12)


def test_frames_are_told_apart() -> None:
    clip = np.random.default_rng(0).random((3, 16, 16, 3))
    other = clip.copy()
    other[1] = 1 - other[1]
    assert np.array_equal(np.isinf(psnr(clip, other)), [True, False, True])
    assert ssim(clip, other)[[0, 2]] == pytest.approx(1.0, abs=1e-12)
    assert ssim(clip, other)[1] < 0


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize("shape", [(2, 16, 16, 3), (1, 16, 17, 3), (16, 16, 3)], ids=["frames", "width", "no-frames"])
def test_other_shapes_are_refused(metric: Callable[..., np.ndarray], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"of one shape, got \(1, 16, 16, 3\) and"):
        metric(np.zeros((1, 16, 16, 3)), np.zeros(shape))


def test_ssim_refuses_frames_smaller_than_its_window() -> None:
    with pytest.raises(ValueError, match="at least 11x11 pixels, got 16x8"):
        ssim(np.zeros((1, 16, 8, 3)), np.zeros((1, 16, 8, 3)))


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_flicker_is_what_changes_from_frame_to_frame() -> None:
    clip = np.random.default_rng(0).random((3, 16, 16, 3))
    brighter, flickering = clip + 0.1, clip.copy()
    flickering[1] += 0.1
    assert np.all(flicker_psnr(clip, brighter) > 250)  # all frames alike: nothing flickers
    np.testing.assert_allclose(flicker_psnr(clip, flickering), [20.0, 20.0])
    assert likeness(clip[:1], clip[:1]).flicker_psnr_db is None


def test_scores_of_frames() -> None:
    scores = Scores(np.array([40.0, np.inf, 30.0]))
    assert (scores.mean, scores.minimum, scores.worst_frame) == (35.0, 30.0, 2)
    lost = Scores(np.array([40.0, np.nan]))
    assert lost.worst_frame == 1 and np.isnan(lost.minimum)
