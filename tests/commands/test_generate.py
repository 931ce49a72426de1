"""The ``generate`` command in-process, on a tiny pipeline that is really loaded, run and written."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import imageio.v3 as iio
import numpy as np
import pytest
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from imageio_ffmpeg import get_ffmpeg_exe

from vidaccel.cli import main
from vidaccel.clips import clip_maker, video_model
from vidaccel.clips.clip_request import ClipRequest
from vidaccel.clips.generation import call_arguments, resolve
from vidaccel.clips.video_model import find_model
from vidaccel.errors import UsageError
from vidaccel.patching import patch as patching

Generate = Callable[..., int]

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--height", "32", "--width", "32", "--frames", "2", "--steps", "1", "--device", "cpu")


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is tested here, not the kernels, which Triton's interpreter would run for minutes."""
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder for clips that the command has to make itself."""
    return tmp_path / "clips"


@pytest.fixture
def generate(model: Path, image: Path) -> Generate:
    """Run the command with small sizes; later options win over these."""

    def run(*options: object) -> int:
        return main(["generate", "--model", str(model), "--image", str(image), *SMALL, *map(str, options)])

    return run


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_pipeline(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(clip_maker, "load_pipeline", load_pipeline)


def record_of(clip: Path) -> dict[str, Any]:
    return json.loads(clip.with_name(f"{clip.name}.json").read_text())


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def the_only_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.webp", "clip"])
def test_writes_the_clip_and_its_record(
    name: str, generate: Generate, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--no-patch", "--out", out / name, "--seed", 7) == 0
    assert files_in(out) == [name, f"{name}.json"]
    frames = sorted((out / name).iterdir()) if name == "clip" else list(iio.imiter(out / name))
    assert len(frames) == 2

    record = record_of(out / name)
    assert record["seed"] == record["arguments"]["seed"] == 7
    assert record["arguments"]["steps"] == 1
    assert record["arguments"]["fps"] == 7, "the pipeline's own default"
    assert record["arguments"]["dtype"] == "float32"
    assert record["versions"]["diffusers"] == diffusers.__version__
    assert record["report"] is None
    timings = record["timings"]
    assert timings["encode"] + timings["denoise"] + timings["decode"] == pytest.approx(timings["total"])
    assert min(timings[phase] for phase in ("encode", "denoise", "decode", "step", "peak_memory_gib")) > 0

    printed = capsys.readouterr().out
    for figure in ("load", "patch", "seed 7", "per step", "decode", "total", "peak memory"):
        assert figure in printed


def test_quiet_prints_the_clip_alone(generate: Generate, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("clip.gif", "clip-again.gif"):
        assert generate("--out", out / name, "--quiet") == 0
        assert capsys.readouterr() == (f"{out / name}\n", "")
    assert generate("--out", out / name, "--quiet") == 0
    assert capsys.readouterr() == ("", ""), "nothing was made"


def test_patches_by_default_and_reports(generate: Generate, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--out", out / "clip.mp4") == 0
    report = record_of(out / "clip.mp4")["report"]
    assert report["active"] > 0
    printed = capsys.readouterr()
    assert "sites patched" in printed.out
    assert "steps" in printed.err, "a progress bar"


def test_only_and_skip_choose_sites(generate: Generate, out: Path) -> None:
    assert generate("--out", out / "clip.mp4", "--only", "temporal_attention", "alpha_blend", "--skip", "vae") == 0
    assert set(record_of(out / "clip.mp4")["report"]["ops"]) == {"temporal_attention", "alpha_blend"}


def test_compare(generate: Generate, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--out", out / "clip.gif", "--compare") == 0
    assert files_in(out) == ["clip.compare.gif", "clip.gif", "clip.gif.json"]
    both, alone = (iio.imread(out / name) for name in ("clip.compare.gif", "clip.gif"))
    assert len(both) == len(alone)
    assert both.shape[2] > 2 * alone.shape[2]

    comparison = record_of(out / "clip.gif")["comparison"]
    assert len(comparison["psnr_db"]) == 2
    assert all(value is None or value > 60 for value in comparison["psnr_db"])
    assert comparison["speedup"] > 0
    printed = capsys.readouterr().out
    for figure in ("stock diffusers", "PSNR", "verdict", "as fast"):
        assert figure in printed


def test_compare_measures_the_patch_and_nothing_else(
    generate: Generate, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(clip_maker, "_patch", lambda pipe, args: patching.PatchReport())
    assert generate("--out", out / "clip.gif", "--compare") == 0
    assert record_of(out / "clip.gif")["comparison"]["psnr_db"] == [None, None], "equal frames have no finite PSNR"
    assert "bit for bit" in capsys.readouterr().out


def test_several_clips_have_their_own_seeds(generate: Generate, out: Path) -> None:
    assert generate("--no-patch", "--out", out / "clip.gif", "--num-clips", 2, "--seed", 5) == 0
    assert files_in(out) == ["clip-0000.gif", "clip-0000.gif.json", "clip-0001.gif", "clip-0001.gif.json"]
    assert [record_of(out / f"clip-000{i}.gif")["seed"] for i in range(2)] == [5, 6]
    first, second = (iio.imread(out / f"clip-000{i}.gif") for i in range(2))
    assert (first != second).any()

    assert generate("--no-patch", "--out", out / "again.gif", "--seed", 6) == 0
    np.testing.assert_array_equal(iio.imread(out / "again.gif"), second)


def test_what_is_done_is_skipped(
    generate: Generate, out: Path, no_loading: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as loading:
        loading.setattr(clip_maker, "load_pipeline", video_model.load_pipeline)
        assert generate("--no-patch", "--out", out / "clip.gif") == 0
    before = (out / "clip.gif").stat().st_mtime_ns
    capsys.readouterr()

    assert generate("--no-patch", "--out", out / "clip.gif") == 0
    assert "skipped" in capsys.readouterr().out

    assert generate("--no-patch", "--out", out / "clip.gif", "--steps", 2) == 2
    line = the_only_line(capsys)
    assert "steps 1, now 2" in line and "--overwrite" in line

    (out / "clip.gif.json").unlink()
    assert generate("--no-patch", "--out", out / "clip.gif") == 2
    assert "--overwrite" in the_only_line(capsys)
    assert (out / "clip.gif").stat().st_mtime_ns == before


def test_overwrite(generate: Generate, out: Path) -> None:
    for steps in (1, 2):
        assert (
            generate("--no-patch", "--out", out / "clip", "--steps", steps, "--frames", 4 - steps, "--overwrite") == 0
        )
    assert record_of(out / "clip")["arguments"]["steps"] == 2
    assert files_in(out) == ["clip", "clip.json"]
    assert len(files_in(out / "clip")) == 2, "no frame of the longer clip before it is left"


def test_interruption_leaves_whole_clips_and_nothing_else(
    generate: Generate, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--no-patch", "--num-clips", 2, "--quiet", "--out")

    def interrupted(clip: np.ndarray, path: Path, fps: int) -> None:
        if "0001" in path.name:
            path.write_bytes(b"half a clip")
            raise KeyboardInterrupt
        write_clip(clip, path, fps)

    write_clip = clip_maker.write_clip
    with monkeypatch.context() as ctrl_c:
        ctrl_c.setattr(clip_maker, "write_clip", interrupted)
        assert generate(*options, out / "clip.gif") == 130
    assert the_only_line(capsys) == "vidaccel: interrupted"
    assert files_in(out) == ["clip-0000.gif", "clip-0000.gif.json"]
    before = (out / "clip-0000.gif").stat().st_mtime_ns

    assert generate(*options, out / "clip.gif") == 0
    assert len(files_in(out)) == 4
    assert (out / "clip-0000.gif").stat().st_mtime_ns == before


def test_a_failed_write_keeps_the_old_clip(
    generate: Generate, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def disk_is_full(clip: np.ndarray, path: Path, fps: int) -> None:
        path.write_bytes(b"half a clip")
        raise OSError(28, "No space left on device")

    assert generate("--no-patch", "--out", out / "clip.gif") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    monkeypatch.setattr(clip_maker, "write_clip", disk_is_full)
    assert generate("--no-patch", "--out", out / "clip.gif", "--overwrite", "--quiet") == 1
    assert "No space left on device" in the_only_line(capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_clip_whose_place_is_gone_is_saved_elsewhere(
    generate: Generate, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_and_lose_the_folder(*args: Any, **kwargs: Any) -> Any:
        out.rmdir()
        out.write_text("a file in its place")
        return generate_clip(*args, **kwargs)

    generate_clip = clip_maker.generate
    monkeypatch.setattr(clip_maker, "generate", make_and_lose_the_folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert generate("--no-patch", "--out", out / "clip.gif", "--quiet") == 1
    line = the_only_line(capsys)
    kept = Path(line.rpartition("the clip is saved as ")[2])
    assert kept.parent.parent == tmp_path / "temporary" and len(list(iio.imiter(kept))) == 2
    assert record_of(kept)["arguments"]["steps"] == 1


@pytest.mark.parametrize("broken", [False, True], ids=["encoder-dies", "file-is-cut"])
def test_an_encoder_that_dies_after_the_last_frame_loses_no_clip(
    broken: bool, generate: Generate, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "ffmpeg"
    end = f"truncate -c -s 700 {out}/.clip.part.mp4" if broken else "exit 1"
    script.write_text(f'#!/bin/sh\n"{get_ffmpeg_exe()}" "$@" || exit\ncase "$*" in *rawvideo*) {end} ;; esac\n')
    script.chmod(0o755)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with monkeypatch.context() as dying:
        dying.setenv("IMAGEIO_FFMPEG_EXE", str(script))
        assert generate("--no-patch", "--out", out / "clip.mp4", "--quiet") == 1
    assert files_in(out) == []
    (kept,) = (tmp_path / "temporary").glob("*/clip*.json")
    assert kept.with_suffix("").exists()
    assert generate("--no-patch", "--out", out / "clip.mp4", "--quiet") == 0, "it is not taken for done"


def test_a_random_seed_is_recorded_and_stands(
    generate: Generate, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--no-patch", "--out", out / "clip.gif", "--num-clips", 2, "--seed", "random") == 0
    seeds = [record_of(out / f"clip-000{i}.gif")["seed"] for i in range(2)]
    assert min(seeds) >= 0 and seeds[0] != seeds[1]
    assert f"seed {seeds[0]}" in capsys.readouterr().out
    assert generate("--no-patch", "--out", out / "clip.gif", "--num-clips", 2, "--seed", -1) == 0
    assert capsys.readouterr().out.count("skipped") == 2
    assert generate("--no-patch", "--out", out / "again.gif", "--seed", seeds[0]) == 0
    np.testing.assert_array_equal(iio.imread(out / "again.gif"), iio.imread(out / "clip-0000.gif"))


def test_paths_by_other_names_are_the_same_clip(
    generate: Generate, model: Path, image: Path, out: Path, monkeypatch: pytest.MonkeyPatch, no_loading: None
) -> None:
    with monkeypatch.context() as loading:
        loading.setattr(clip_maker, "load_pipeline", video_model.load_pipeline)
        assert generate("--no-patch", "--out", out / "clip.gif", "--quiet") == 0
    monkeypatch.chdir(model.parent)
    near = Path(os.path.relpath(image))
    for name in (model.name, f"./{model.name}", f"{model.name}/"):
        assert generate("--no-patch", "--out", out / "clip.gif", "--model", name, "--image", near, "--quiet") == 0


def test_a_frame_rate_that_is_no_whole_number(generate: Generate, out: Path) -> None:
    assert generate("--no-patch", "--out", out / "clip.mp4", "--fps", 23.976, "--quiet") == 0
    assert iio.immeta(out / "clip.mp4")["fps"] == pytest.approx(23.976, abs=0.01)
    assert record_of(out / "clip.mp4")["arguments"]["fps"] == 23.976


def test_a_clip_that_is_not_finite_is_not_written(
    generate: Generate, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def overflown(*args: Any, **kwargs: Any) -> Any:
        clip = generate_clip(*args, **kwargs)
        clip.frames[0, 0, 0] = np.nan
        return clip

    generate_clip = clip_maker.generate
    monkeypatch.setattr(clip_maker, "generate", overflown)
    assert generate("--no-patch", "--out", out / "clip.gif", "--quiet") == 2
    assert "not finite" in the_only_line(capsys)
    assert files_in(out) == []


def test_job_file(
    generate: Generate, image: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = tmp_path / "jobs.txt"
    lines = [
        "# a comment, and a blank line",
        "",
        str(image),
        '{"image": "not closed',
        json.dumps({"image": str(image), "steps": 2, "seed": 40, "out": str(out / "named.gif")}),
        json.dumps({"image": str(tmp_path / "missing.png")}),
        json.dumps({"image": str(image), "framez": 3}),
        json.dumps({"image": str(image), "height": 33}),
        json.dumps({"image": str(image), "steps": "2"}),
        json.dumps({"image": str(image), "out": str(out / "named.gif")}),
        json.dumps({"image": str(image), "out": str(out / "clip.avi")}),
        str(image),
    ]
    jobs.write_text("\n".join(lines))
    assert generate("--no-patch", "--jobs", jobs, "--out", out, "--seed", 10, "--quiet") == 1

    complaints = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"vidaccel: error: {jobs} line ") for line in complaints)
    numbers = [int(line.split(" line ")[1].split(":")[0]) for line in complaints]
    assert sorted(numbers) == [4, 6, 7, 8, 9, 10, 11]
    for number, reason in {4: "not JSON", 6: "missing.png", 7: "framez", 8: "multiple of 8", 9: "whole number"}.items():
        assert reason in complaints[numbers.index(number)]

    clips = ["clip-0000.mp4", "clip-0009.mp4", "named.gif"]
    assert files_in(out) == sorted([*clips, *(f"{name}.json" for name in clips)])
    assert [record_of(out / name)["seed"] for name in clips] == [10, 19, 40], "a broken line shifts no seed"
    assert record_of(out / "named.gif")["arguments"]["steps"] == 2

    jobs.write_text(f"{lines[2]}\n")
    assert generate("--no-patch", "--jobs", jobs, "--out", out, "--seed", 10) == 0
    assert "skipped" in capsys.readouterr().out


BAD_INPUT = {
    "no-model-folder": (["--model", "./nothing"], "no such model folder"),
    "no-pipeline": (["--model", "{tmp}"], "holds no model_index.json"),
    "image-missing": (["--image", "{tmp}/nothing.png"], "No such file"),
    "image-is-text": (["--image", "{tmp}/notes.txt"], "is not an image"),
    "prompt-not-taken": (["--prompt", "a cat"], "takes no prompt"),
    "height": (["--height", "36"], "height 36 is not a multiple of 8"),
    "width": (["--width", "36"], "width 36 is not a multiple of 8"),
    "no-frames": (["--frames", "0"], "frames must be at least 1"),
    "one-frame": (["--frames", "1"], "frames 1: StableVideoDiffusionPipeline fails unless min-guidance-scale, 1, is"),
    "negative-steps": (["--steps", "-1"], "steps must be at least 1"),
    "not-a-number": (["--steps", "many"], "invalid int value"),
    "infinite-guidance": (["--guidance-scale", "inf"], "must be finite"),
    "seed-is-text": (["--seed", "dice"], "must be a whole number or random, got 'dice'"),
    "gif-too-fast": (["--out", "{tmp}/clip.gif", "--fps", "60"], "gif shows 50 frames a second at most, got 60"),
    "out-is-here": (["--out", "."], "is a folder, and names no clip"),
    "out-at-the-root": (["--out", "/no-such-folder/clip.gif"], "is not made at the root"),
    "out-too-long": (["--out", "n" * 251 + ".gif"], "is too long a name"),
    "no-clips": (["--num-clips", "0"], "num-clips must be at least 1"),
    "seed": (["--seed", "99999999999999999999"], "seed must be at most"),
    "suffix": (["--out", "{tmp}/clip.avi"], "cannot write .avi"),
    "out-is-a-folder": (["--out", "{tmp}/a.mp4"], "is a folder"),
    "out-is-a-full-folder": (["--out", "{tmp}"], "is not a folder of PNG frames"),
    "out-below-a-file": (["--out", "{tmp}/notes.txt/clip.mp4"], "cannot write into"),
    "graph-on-cpu": (["--cuda-graph"], "--cuda-graph needs a GPU, and the device is cpu"),
    "graph-unpatched": (["--no-patch", "--cuda-graph"], "--no-patch leaves nothing to do"),
    "device": (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    "numberless-device": (["--device", "meta"], "device 'meta' cannot be used here"),
    "most-frames": (["--frames", "1000000000000000000"], "frames must be at most 1073741824, got"),
    "most-height": (["--height", "8000000000"], "height must be at most 65536, got"),
    "long-model": (["--model", "x" * 300], "File name too long"),
    "unknown-device": (["--device", "abacus"], "device 'abacus' cannot be used here"),
    "unknown-option": (["--framez", "3"], "unrecognized arguments: --framez"),
    "contradiction": (["--no-patch", "--compare"], "--no-patch leaves nothing to do"),
    "no-job-file": (["--jobs", "{tmp}/nothing.txt"], "cannot read the job file"),
    "empty-job-file": (["--jobs", "{tmp}/empty.txt"], "holds no job"),
    "binary-job-file": (["--jobs", "{tmp}/first frame.png"], "cannot read the job file"),
}


@pytest.mark.parametrize(("options", "reason"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_before_anything_is_loaded(
    options: list[str],
    reason: str,
    generate: Generate,
    tmp_path: Path,
    no_loading: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "a.mp4").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert generate("--out", tmp_path / "clip.mp4", *(option.format(tmp=tmp_path) for option in options)) == 2
    line = the_only_line(capsys)
    assert line.startswith("vidaccel: error: ") and reason in line
    assert sorted(tmp_path.rglob("*")) == before


def test_memory_that_runs_out_is_told_in_one_line(
    generate: Generate, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--no-patch", "--frames", 10**9, "--out", out / "clip.gif", "--quiet") == 2
    assert "out of memory on cpu: ask for fewer frames" in the_only_line(capsys)
    assert files_in(out) == []


def index_only(folder: Path, pipeline: str) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, "_diffusers_version": "0.42.0"}))
    return folder


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [("HolodeckPipeline", "has no pipeline 'HolodeckPipeline'"), ("StableDiffusionPipeline", "does not make video")],
)
def test_unknown_pipelines(
    pipeline: str, reason: str, tmp_path: Path, generate: Generate, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("--model", index_only(tmp_path / "model", pipeline)) == 2
    assert reason in the_only_line(capsys)


def test_pipeline_without_an_adapter(
    tmp_path: Path, generate: Generate, out: Path, no_loading: None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = index_only(tmp_path / "sana", "SanaWMPipeline")
    assert generate("--model", model, "--out", out / "clip.mp4") == 2
    assert "SanaWMPipeline has no part that vidaccel can patch" in the_only_line(capsys)


def test_broken_weights(model: Path, tmp_path: Path, generate: Generate, capsys: pytest.CaptureFixture[str]) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut off")
    assert generate("--no-patch", "--model", broken, "--out", tmp_path / "clip.mp4", "--quiet") == 2
    assert f"cannot load {broken}" in the_only_line(capsys)


def test_unreachable_hub(
    generate: Generate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_config(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect to the hub\nand here is a page about offline mode")

    monkeypatch.setattr(video_model.DiffusionPipeline, "load_config", load_config)
    assert generate("--model", "nobody/nothing") == 2
    line = the_only_line(capsys)
    assert "nobody/nothing is no folder here" in line and "couldn't connect" in line


def test_only_that_names_no_site_is_answered_without_the_weights(
    generate: Generate, out: Path, no_loading: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--only", "--skip"):
        assert generate("--out", out / "clip.mp4", option, "temporal_attenshun", "--quiet") == 2
        line = the_only_line(capsys)
        assert "'temporal_attenshun' names no site" in line and "temporal_attention" in line
        assert files_in(out) == []


def test_weights_are_safetensors_unless_asked(
    model: Path, tmp_path: Path, generate: Generate, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pickled = shutil.copytree(model, tmp_path / "pickled")
    DiffusionPipeline.from_pretrained(pickled).save_pretrained(pickled, safe_serialization=False)
    for weights in pickled.rglob("diffusion_pytorch_model.safetensors"):
        weights.unlink()
    options = ("--no-patch", "--quiet", "--model", pickled, "--out", out / "clip.gif")
    capsys.readouterr()
    assert generate(*options) == 2
    assert "--allow-pickle" in the_only_line(capsys)
    assert files_in(out) == []
    assert generate(*options, "--allow-pickle") == 0
    assert capsys.readouterr().err == ""


def test_a_model_imports_nothing_else(
    model: Path, tmp_path: Path, generate: Generate, no_loading: None, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = shutil.copytree(model, tmp_path / "hostile", ignore=shutil.ignore_patterns("*.safetensors"))
    index = json.loads((hostile / "model_index.json").read_text())
    (hostile / "model_index.json").write_text(json.dumps(index | {"unet": ["antigravity", "Module"]}))
    assert generate("--model", hostile) == 2
    assert "its unet is of 'antigravity'; only diffusers and transformers are imported" in the_only_line(capsys)
    (hostile / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Mine"]}))
    assert generate("--model", hostile) == 2
    assert "has no pipeline" in the_only_line(capsys)


def test_default_model_and_image_need_the_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(video_model, "_BUNDLED_MODEL", tmp_path / "not-installed")
    assert main(["generate"]) == 2
    assert "give --model" in the_only_line(capsys)


def test_bundled_model_brings_its_image_and_defaults(
    model: Path, image: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundled = tmp_path / "bundled"
    shutil.copytree(model, bundled, ignore=shutil.ignore_patterns("*.safetensors"))
    defaults = {"num_inference_steps": 9, "max_guidance_scale": 1.5, "height": 64, "width": 64, "frames": 5}
    (bundled / "generation_defaults.json").write_text(json.dumps(defaults))
    monkeypatch.setattr(video_model, "_BUNDLED_MODEL", bundled)
    monkeypatch.setattr(video_model, "_BUNDLED_IMAGES", image.parent)

    request = resolve(find_model(None), ClipRequest(steps=4))
    assert (request.image, request.steps, request.guidance_scale) == (str(image), 4, 1.5)
    arguments = call_arguments(find_model(None).pipeline_class, request)
    assert arguments["image"].size == (64, 64)
    assert (arguments["num_inference_steps"], arguments["max_guidance_scale"], arguments["fps"]) == (4, 1.5, 7)

    assert resolve(find_model(None), ClipRequest()).steps == 9
    assert arguments["num_frames"] == 5
    for text, reason in (('{"steps": 0}', "steps must be at least 1"), ('{"framez": 5}', "unknown option 'framez'")):
        (bundled / "generation_defaults.json").write_text(text)
        with pytest.raises(UsageError, match=rf"generation_defaults\.json: {reason}"):
            find_model(None)


def test_options_take_the_names_that_the_pipeline_has() -> None:
    request = ClipRequest(prompt="a cat", frames=16, steps=20, guidance_scale=7.5, seed=1, fps=8)
    assert call_arguments(diffusers.AnimateDiffPipeline, request) == {
        "prompt": "a cat",
        "num_frames": 16,
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
    }
    assert call_arguments(diffusers.LattePipeline, request)["video_length"] == 16
    with pytest.raises(UsageError, match="AnimateDiffPipeline needs prompt"):
        call_arguments(diffusers.AnimateDiffPipeline, ClipRequest())
    with pytest.raises(UsageError, match="AnimateDiffPipeline takes no motion-bucket-id"):
        call_arguments(diffusers.AnimateDiffPipeline, ClipRequest(prompt="a cat", motion_bucket_id=1))
    with pytest.raises(UsageError, match="StableVideoDiffusionPipeline needs image"):
        call_arguments(diffusers.StableVideoDiffusionPipeline, ClipRequest())


def test_the_script_is_the_same_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", "--num-clips", "none"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "generate.py"), run_name="__main__")
    assert end.value.code == 2
    assert "vidaccel generate --help" in the_only_line(capsys)


def test_help_needs_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys; from vidaccel.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit: print({'torch', 'diffusers', 'triton'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--compare" in done.stdout and done.stdout.endswith("set()\n")
