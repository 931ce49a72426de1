"""Clips that are there already: how they are read, and that the figures are those of FFmpeg's filters."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage import data

from vidaccel.clips.encoding import encode
from vidaccel.clips.frames import read_frames
from vidaccel.fidelity.clip_files import measure

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """A photograph that the camera moves over, ``[5, 160, 208, 3]`` uint8."""
    photograph = data.astronaut()[:, :, :3]
    return np.stack([photograph[40 + 3 * i : 200 + 3 * i, 150 + 5 * i : 358 + 5 * i] for i in range(5)])


def x264(clip: np.ndarray, path: Path, crf: int, codec: str = "libx264") -> None:
    height, width = clip.shape[1:3]
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "8", "-i", "pipe:0"]
    wanted = ["-c:v", codec, "-pix_fmt", "yuv420p", "-crf", str(crf), "-b:v", "0", str(path)]
    subprocess.run([FFMPEG, "-v", "error", "-y", *given, *wanted], input=clip.tobytes(), check=True)


def by_ffmpeg(a: Path, b: Path, metric: str, value: str, folder: Path) -> list[float]:
    """What the filter says of each frame, FFmpeg reading both clips by itself."""
    inputs: list[str] = []
    for clip in (a, b):
        inputs += ["-framerate", "8", "-i", str(clip / "frame-%04d.png")] if clip.is_dir() else ["-i", str(clip)]
    graph = f"[0]format=gbrp[a];[1]format=gbrp[b];[a][b]{metric}=stats_file=stats.txt"
    subprocess.run([FFMPEG, "-v", "error", *inputs, "-lavfi", graph, "-f", "null", "-"], cwd=folder, check=True)
    return [float(found) for found in re.findall(rf"{value}:(\S+)", (folder / "stats.txt").read_text())]


def changed(scene: np.ndarray, how: str) -> np.ndarray:
    if how == "noise":
        noise = np.random.default_rng(0).normal(0, 12, scene.shape)
        return (scene + noise).clip(0, 255).round().astype(np.uint8)
    if how == "blur":
        return gaussian_filter(scene, (0, 1.2, 1.2, 0))
    return np.roll(scene, 1, axis=2)


@pytest.mark.parametrize("how", ["crf 18", "crf 36", "noise", "shift", "blur"])
def test_the_figures_are_those_of_ffmpeg(how: str, scene: np.ndarray, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    encode(scene, a, 8)
    if how.startswith("crf"):
        b = tmp_path / "b.mp4"
        x264(scene, b, int(how.split()[1]))
    else:
        encode(changed(scene, how), b, 8)
    clip = measure(a, b)
    mse = [255**2 * 10 ** (-value / 10) for value in clip["psnr_db"]["frames"]]
    np.testing.assert_allclose(clip["psnr_db"]["frames"], by_ffmpeg(a, b, "psnr", "psnr_avg", tmp_path), atol=0.01)
    np.testing.assert_allclose(mse, by_ffmpeg(a, b, "psnr", "mse_avg", tmp_path), atol=0.006)
    np.testing.assert_allclose(clip["ssim"]["frames"], by_ffmpeg(a, b, "ssim", "All", tmp_path), atol=1e-3)
    assert clip["psnr_db"]["of_mean_error"] == pytest.approx(10 * np.log10(255**2 / np.mean(mse)))
    assert 15 < clip["psnr_db"]["minimum"] < 50 and 0.2 < clip["ssim"]["minimum"] < 0.999


@pytest.mark.parametrize(
    ("suffix", "mode"), [(".webp", "RGBA"), (".apng", "RGBA"), (".tiff", "I;16"), (".tiff", "F"), (".gif", "P")]
)
def test_frames_of_a_file_are_read_like_pictures_of_a_folder(
    suffix: str, mode: str, scene: np.ndarray, tmp_path: Path
) -> None:
    if mode == "RGBA":
        alpha = np.arange(160 * 208, dtype=np.uint32).reshape(1, 160, 208, 1) % 256
        clip = np.concatenate([scene, np.broadcast_to(alpha.astype(np.uint8), (*scene.shape[:3], 1))], axis=3)
    else:
        grey = scene[..., 0]
        clip = {"I;16": grey.astype(np.uint16) * 257, "F": grey / np.float32(255), "P": grey}[mode]
    first, *others = pictures = [Image.fromarray(frame) for frame in clip]
    options = {".webp": {"lossless": True, "exact": True}, ".apng": {"format": "PNG"}}.get(suffix, {})
    file, folder = tmp_path / f"clip{suffix}", tmp_path / "clip"
    first.save(file, save_all=True, append_images=others, **options)
    folder.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}{'.tiff' if mode == 'F' else '.png'}")
    np.testing.assert_array_equal(np.stack([*read_frames(file)]), np.stack([*read_frames(folder)]))


def test_a_photograph_is_a_clip_of_one_frame(scene: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(scene[0]).save(tmp_path / "photograph.jpg")
    (frame,) = read_frames(tmp_path / "photograph.jpg")
    assert frame.shape == scene[0].shape


def test_two_films_of_other_codecs(scene: np.ndarray, tmp_path: Path) -> None:
    a, b = tmp_path / "a.mp4", tmp_path / "b.webm"
    x264(scene, a, 12)
    x264(scene, b, 30, "libvpx-vp9")
    clip = measure(a, b)
    assert (clip["frames"], clip["height"], clip["width"]) == (5, 160, 208) and not clip["bit_identical"]
    np.testing.assert_allclose(clip["psnr_db"]["frames"], by_ffmpeg(a, b, "psnr", "psnr_avg", tmp_path), atol=0.01)
    np.testing.assert_allclose(clip["ssim"]["frames"], by_ffmpeg(a, b, "ssim", "All", tmp_path), atol=1e-3)


def test_a_clip_and_itself(scene: np.ndarray, tmp_path: Path) -> None:
    encode(scene, tmp_path / "frames", 8)
    clip = measure(tmp_path / "frames", tmp_path / "frames")
    assert clip["bit_identical"] and clip["psnr_db"]["minimum"] == clip["psnr_db"]["of_mean_error"] == np.inf
    assert clip["ssim"]["frames"] == [1.0] * 5 and len(clip["flicker_psnr_db"]["frames"]) == 4


def test_flicker_shows_what_frames_alone_do_not(scene: np.ndarray, tmp_path: Path) -> None:
    brighter = scene.clip(8, 247)
    trembling = (brighter.astype(np.int16) + np.array([4, -4, 4, -4, 4]).reshape(-1, 1, 1, 1)).astype(np.uint8)
    for name, clip in (("a", brighter), ("b", brighter + np.uint8(4)), ("c", trembling)):
        encode(clip, tmp_path / name, 8)
    steady, flickers = (measure(tmp_path / "a", tmp_path / name) for name in "bc")
    np.testing.assert_allclose(steady["psnr_db"]["frames"], flickers["psnr_db"]["frames"])
    assert steady["flicker_psnr_db"]["minimum"] == np.inf
    assert flickers["flicker_psnr_db"]["minimum"] == pytest.approx(20 * np.log10(255 / 8))


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_animations(suffix: str, tmp_path: Path) -> None:
    clip = np.zeros((3, 16, 16, 3), np.uint8)
    clip[:, 4:8, 4:8] = np.array([60, 120, 180]).reshape(3, 1, 1, 1)
    first, *others = map(Image.fromarray, clip)
    options = {"lossless": True} if suffix == ".webp" else {}
    first.save(tmp_path / f"clip{suffix}", save_all=True, append_images=others, duration=100, **options)
    np.testing.assert_array_equal(np.stack(list(read_frames(tmp_path / f"clip{suffix}"))), clip)


def test_a_film_gives_each_stored_frame_once(scene: np.ndarray, tmp_path: Path) -> None:
    """Even where frames are shown for unequal times."""
    encode(scene, tmp_path / "frames", 8)
    listing = "".join(f"file 'frames/frame-{i:04d}.png'\nduration {0.1 * (1 + 3 * (i % 2))}\n" for i in range(5))
    (tmp_path / "list.txt").write_text(listing)
    command = ["-f", "concat", "-i", "list.txt", "-fps_mode", "vfr", "-pix_fmt", "yuv420p", "clip.mp4"]
    subprocess.run([FFMPEG, "-v", "error", *command], cwd=tmp_path, check=True)
    assert len(list(read_frames(tmp_path / "clip.mp4"))) == 5


def test_pictures_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for i in (1, 2, 10):
        Image.new("L", (12, 12), i).save(tmp_path / f"f{i}.{'jpg' if i == 1 else 'png'}")
    (tmp_path / ".DS_Store").write_bytes(b"a file manager's")
    assert [frame[0, 0, 0] for frame in read_frames(tmp_path)] == [1, 2, 10]
