from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v3 as iio
import imageio_ffmpeg
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


def delays(path: Path) -> list[int]:
    with Image.open(path) as image:
        shown = []
        for i in range(image.n_frames):
            image.seek(i)
            image.load()
            shown.append(image.info["duration"])
    return shown


@pytest.mark.parametrize(
    ("suffix", "fps", "expected"),
    [
        (".gif", 8, [130, 120, 130, 120]),
        (".gif", 23.976, [40, 40, 50, 40, 40]),
        (".gif", 50, [20, 20, 20]),
        (".webp", 60, [17, 16, 17]),
        (".webp", 7.5, [133, 134, 133]),
    ],
)
def test_delays_alternate_so_that_a_clip_lasts_as_long_as_it_should(
    tmp_path: Path, suffix: str, fps: float, expected: list[int]
) -> None:
    frames = len(expected)
    write_clip(a_clip(frames, 48, 128), tmp_path / f"clip{suffix}", fps)
    assert delays(tmp_path / f"clip{suffix}") == expected
    assert abs(sum(expected) - 1000 * frames / fps) <= 5


def test_an_mp4_has_any_frame_rate_and_any_name(tmp_path: Path) -> None:
    path = tmp_path / "a:b %04d.mp4"
    write_clip(a_clip(3, 41, 71), path, fps=23.976)
    assert iio.immeta(path)["fps"] == pytest.approx(23.976, abs=0.01)
    assert [frame.shape for frame in iio.imiter(path)] == [(42, 72, 3)] * 3


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ""])
@pytest.mark.parametrize("frames", [1, 3], ids=["one-frame", "frames-that-are-alike"])
def test_clips_in_which_nothing_moves(tmp_path: Path, suffix: str, frames: int) -> None:
    write_clip(np.zeros((frames, 16, 16, 3), np.float32), tmp_path / f"clip{suffix}", fps=8)


@pytest.mark.parametrize("after", ["exit 1", "truncate -s 700 clip.mp4", ": > clip.mp4"])
def test_an_encoder_that_ends_badly_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str) -> None:
    real = imageio_ffmpeg.get_ffmpeg_exe()
    script = tmp_path / "ffmpeg"
    script.write_text(f'#!/bin/sh\n"{real}" "$@" || exit\ncase "$*" in *rawvideo*) {after} ;; esac\n')
    script.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"exit code|cannot be read|reads back"):
        write_clip(a_clip(), Path("clip.mp4"), fps=8)


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


RAMP = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(8, 0)


def saved(folder: Path, name: str, pixels: np.ndarray, mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(folder / name, **options)
    return folder / name


def test_grey_of_any_depth_keeps_its_black_and_white(tmp_path: Path) -> None:
    expected = RAMP[:, :, None].repeat(3, 2)
    deep = (RAMP.astype(np.uint16) * 257) + np.where(RAMP < 255, 100, 0).astype(np.uint16)
    for path in (
        saved(tmp_path, "8.png", RAMP),
        saved(tmp_path, "16.png", deep),
        saved(tmp_path, "16.tiff", deep),
        saved(tmp_path, "float.tiff", (RAMP / 255).astype(np.float32)),
        saved(tmp_path, "palette.png", RAMP, "P"),
        saved(tmp_path, "cmyk.tiff", expected, "CMYK"),
    ):
        image = read_image(path)
        assert (image.mode, image.size) == ("RGB", (64, 8)), path
        np.testing.assert_array_equal(np.asarray(image), expected, err_msg=str(path))


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (RAMP.astype(np.int32) * 2**20, "32-bit grey values"),
        (RAMP.astype(np.float32), "from 0 .black. to 1 .white., got 0 to 255"),
        (np.full((4, 4), np.nan, np.float32), "got nan to nan"),
    ],
    ids=["32-bit", "float-to-255", "nan"],
)
def test_grey_that_nobody_knows_the_white_of_is_refused(tmp_path: Path, pixels: np.ndarray, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        read_image(saved(tmp_path, "grey.tiff", pixels))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white_and_said(mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))  # black that is not to be seen
    options = {"transparency": (0, 0, 0)} if mode == "RGB" else {}
    image.convert(mode).save(tmp_path / f"{mode}.png", **options)
    pixels = np.asarray(read_image(tmp_path / f"{mode}.png"))
    assert (pixels[:, :4] == 255).all() and (pixels[:, 4:] != 255).all()
    assert "is laid on white" in caplog.text
    caplog.clear()
    Image.new("RGBA", (8, 8), (200, 0, 0, 255)).save(tmp_path / "opaque.png")
    read_image(tmp_path / "opaque.png")
    assert not caplog.text


def test_the_first_frame_of_an_animation_is_used_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_clip(a_clip(3), tmp_path / "moving.webp", fps=8)
    image = read_image(tmp_path / "moving.webp")
    assert np.abs(np.asarray(image) - a_clip(1)[0] * 255).mean() < 4
    assert "has 3 frames: the first is used" in caplog.text


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
