from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from vidaccel.clips.video import fit_image, read_image, side_by_side, to_uint8, write_clip
from vidaccel.errors import UsageError


def a_clip(frames: int = 5, height: int = 40, width: int = 72) -> np.ndarray:
    """A bright square that moves over a gradient; the sides are even but no multiples of 16."""
    clip = np.empty((frames, height, width, 3), np.float32)
    clip[:] = np.linspace(0, 0.5, width, dtype=np.float32)[:, None]
    for i in range(frames):
        clip[i, 8:24, 8 * i : 8 * i + 16] = (1.0, 0.75, 0.25)
    return clip


@pytest.mark.parametrize(
    ("suffix", "worst_mean_error"),
    [(".mp4", 3.0), (".gif", 6.0), (".webp", 3.0)],
)
def test_a_file_holds_the_same_frames_at_the_same_size(tmp_path: Path, suffix: str, worst_mean_error: float) -> None:
    clip = a_clip()
    write_clip(clip, tmp_path / f"clip{suffix}", fps=5)
    back = np.stack([frame[..., :3] for frame in iio.imiter(tmp_path / f"clip{suffix}")])
    assert back.shape == clip.shape
    assert np.abs(back.astype(float) - clip * 255).mean() < worst_mean_error


def test_a_folder_holds_every_frame_without_loss(tmp_path: Path) -> None:
    clip = a_clip()
    write_clip(clip, tmp_path / "clip", fps=5)
    names = sorted(path.name for path in (tmp_path / "clip").iterdir())
    assert names == [f"frame-{i:04d}.png" for i in range(5)]
    np.testing.assert_array_equal([iio.imread(tmp_path / "clip" / name) for name in names], to_uint8(clip))


def test_frame_rate(tmp_path: Path) -> None:
    for suffix in (".mp4", ".gif", ".webp"):
        write_clip(a_clip(), tmp_path / f"clip{suffix}", fps=5)
    assert iio.immeta(tmp_path / "clip.mp4")["fps"] == 5
    assert iio.immeta(tmp_path / "clip.gif")["duration"] == 200
    with Image.open(tmp_path / "clip.webp") as webp:
        webp.load()
        assert webp.info["duration"] == 200


def test_to_uint8_rounds_to_the_nearest_level() -> None:
    np.testing.assert_array_equal(
        to_uint8(np.array([-0.1, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 1.1])), [0, 0, 0, 1, 255, 255]
    )


def test_fit_image_cuts_the_edges_and_keeps_the_middle() -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    fitted = fit_image(image, 32, 32)
    assert fitted.size == (32, 32)
    assert np.abs(np.asarray(fitted)[:, 2:-2] - np.array([0.0, 0.0, 255.0])).max() < 3


def test_read_image_obeys_the_camera_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("L", (40, 20)).save(tmp_path / "photo.jpg", exif=exif)
    image = read_image(tmp_path / "photo.jpg")
    assert (image.mode, image.size) == ("RGB", (20, 40))


def test_read_image_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(UsageError, match=r"notes\.png is not an image"):
        read_image(tmp_path / "notes.png")
    with pytest.raises(UsageError, match=r"nothing\.png: No such file"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(UsageError, match=r"Is a directory"):
        read_image(tmp_path)
    image = Image.new("RGB", (64, 64))
    image.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    with pytest.raises(UsageError, match=r"cut\.png"):
        read_image(tmp_path / "cut.png")


@pytest.mark.parametrize(("height", "width"), [(40, 72), (9, 361)], ids=["enlarged", "odd-sides"])
def test_side_by_side_shows_both_clips_under_their_labels(height: int, width: int) -> None:
    left, right = a_clip(2, height, width), 1 - a_clip(2, height, width)
    both = side_by_side([left, right], ["stock diffusers 12.3 s", "vidaccel 9.8 s"])
    assert both.shape[1] % 2 == both.shape[2] % 2 == 0
    scale = (both.shape[2] // 2) // width
    left, right = (clip.repeat(scale, 1).repeat(scale, 2) for clip in (left, right))
    columns = [slice(8, 8 + width * scale), slice(16 + width * scale, 16 + 2 * width * scale)]
    top = next(row for row in range(both.shape[1]) if (both[0, row, columns[0]] == left[0, 0]).all())
    for clip, span in zip((left, right), columns, strict=True):
        np.testing.assert_array_equal(both[:, top : top + height * scale, span], clip)
        assert np.ptp(both[0, :top, span]) > 0.5, "no label"


def test_a_long_label_stays_inside_its_half() -> None:
    clip = np.zeros((1, 64, 64, 3), np.float32)
    labels = ["vidaccel " + "9.8 s · " * 20, ""]
    both = side_by_side([clip, clip], labels)
    background = both[0, 0, 0]
    banner = both[0, :30]
    assert (banner[:, banner.shape[1] // 2 :] == background).all()
    assert (banner[:, : banner.shape[1] // 2] != background).any()
