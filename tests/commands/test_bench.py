"""The ``bench`` command in-process: dry runs on the CPU, and what becomes of the figures when something goes wrong."""

from __future__ import annotations

import json
import runpy
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vidaccel.bench import measure, ops, variants
from vidaccel.bench.op_case import Provider
from vidaccel.bench.op_cases import OPS
from vidaccel.bench.ops import one_stage_kernels
from vidaccel.bench.record import add_ratios, table
from vidaccel.bench.settings import Settings
from vidaccel.bench.synthetic import build_pipeline, configurations, pipeline_inputs, specification
from vidaccel.bench.timing import time_calls, time_queued
from vidaccel.bench.variants import applied, cudnn_benchmark, measured_modules
from vidaccel.cli import main
from vidaccel.clips.generation import generate
from vidaccel.clips.outputs import json_text
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.norm.group_norm_silu import _apply_kernel

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
EAGERLY = Settings(
    scopes=("vae",),
    variants=("eager",),
    repeats=1,
    warmup=0,
    budget_seconds=1.0,
    with_reference=False,
    compile_backend="eager",
    empty_caches=True,
    only=None,
    skip=None,
    seed=0,
)
SHORT = ("--device", "cpu", "--repeats", "1", "--warmup", "0")

Record = dict[str, Any]
Bench = Callable[..., tuple[int, Record]]


@pytest.fixture
def plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch implementations: interpreted kernels are slow."""
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")


@pytest.fixture
def bench(tmp_path: Path, plain_pytorch: None) -> Bench:
    """Run the command and return its exit code and the record it wrote."""

    def run(*options: object) -> tuple[int, Record]:
        path = tmp_path / "records" / "record.json"
        code = main(["bench", *SHORT, "--out", str(path), *map(str, options)])
        assert [file.name for file in path.parent.iterdir()] in ([], ["record.json"]), "something was left behind"
        return code, json.loads(path.read_text()) if path.exists() else {}

    return run


@pytest.fixture
def tiny_bench(bench: Bench) -> Bench:
    return lambda *options: bench("--synthetic", "svd", "--size", "tiny", *options)


def rows(record: Record) -> dict[tuple[str, str], Record]:
    return {(row["scope"], row["variant"]): row for row in record["results"]}


def test_dry_run_of_all_scopes(tiny_bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    code, record = tiny_bench("--variants", "patched")
    assert code == 0 and record["complete"]
    measured = rows(record)
    assert list(measured) == [
        (scope, variant) for variant in ("eager", "patched") for scope in ("denoiser", "vae", "end-to-end")
    ]
    for row in measured.values():
        assert row["status"] == "ok"
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["repeats"] == 1
    for scope in ("denoiser", "vae", "end-to-end"):
        eager, patched = measured[scope, "eager"], measured[scope, "patched"]
        assert 0 < patched["error_to_eager"] < 1e-5 and not patched["bit_identical"]
        assert patched["of_eager"] == patched["median_ms"] / eager["median_ms"]
        assert patched["of_best_compile"] is None
    assert measured["vae", "patched"]["psnr_min_to_eager_db"] > 60
    assert 0 < measured["end-to-end", "eager"]["step_ms"] < measured["end-to-end", "eager"]["median_ms"]
    assert measured["denoiser", "eager"]["cold_start_s"] > 0
    assert measured["end-to-end", "eager"]["cold_start_s"] is None  # the denoiser had been called before

    assert record["command"] == "vidaccel bench --device cpu --synthetic svd --size tiny --variants patched " + (
        "--repeats 1 --warmup 0"
    )
    assert record["shapes"]["denoiser"][0]["sample"] == "2x3x8x16x16"
    assert record["shapes"]["end-to-end"]["num_frames"] == 3
    assert record["environment"]["torch"] == torch.__version__ and record["dtype"] == "float32"
    assert record["ceilings"]["copy_gb_s"] > 0
    assert record["patch_reports"]["patched"]["active"] > 0 and not record["patch_reports"]["patched"]["failed"]
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].split()[:3] == ["scope", "variant", "median"]
    assert "end-to-end: patched:" in captured.err and "end-to-end: patched:" not in captured.out


def test_compiled_variants_and_the_best_of_them(tiny_bench: Bench) -> None:
    code, record = tiny_bench("--scope", "vae", "--variants", "compile+channels_last,patched+compile")
    assert code == 0
    _, compiled, patched = record["results"]
    assert patched["of_best_compile"] == patched["median_ms"] / compiled["median_ms"]
    assert max(compiled["error_to_eager"], patched["error_to_eager"]) < 1e-5
    assert compiled["cold_start_s"] > 1e-3 * compiled["median_ms"]


def test_half_precision_is_held_against_float32(tiny_bench: Bench) -> None:
    code, record = tiny_bench("--scope", "vae", "--variants", "patched", "--dtype", "bfloat16")
    assert code == 0
    eager, patched = record["results"]
    assert 1e-4 < eager["error_to_reference"] < 0.1
    assert patched["error_to_reference"] < 2 * eager["error_to_reference"]
    assert "psnr_min_to_reference_db" in patched and "error_to_eager" not in eager


def test_a_failing_variant_costs_only_itself(tiny_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel image\nand a long story")

    monkeypatch.setattr(variants, "patch_pipeline", broken)
    code, record = tiny_bench("--scope", "vae,end-to-end", "--variants", "patched,cudnn.benchmark", "--quick")
    assert code == 1 and record["complete"]
    measured = rows(record)
    for scope in ("vae", "end-to-end"):
        assert measured[scope, "patched"]["status"] == "failed"
        assert measured[scope, "patched"]["reason"] == "RuntimeError: no kernel image"
        assert measured[scope, "cudnn.benchmark"]["bit_identical"]


def test_a_variant_whose_output_is_not_finite_fails(tiny_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from vidaccel.blocks.unet.normalization import FusedGroupNorm

    monkeypatch.setenv("VIDACCEL_SELF_CHECK", "0")
    monkeypatch.setattr(FusedGroupNorm, "fused_forward", lambda self, input: input * float("nan"))
    code, record = tiny_bench("--scope", "vae", "--variants", "patched")
    assert code == 1
    assert record["results"][1]["reason"] == "ArithmeticError: the output is not finite, eager's is"


def test_interrupted_keeps_what_is_measured(tiny_bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(variants, "patch_pipeline", interrupted)
    code, record = tiny_bench("--scope", "vae", "--variants", "patched")
    assert code == 130
    assert not record["complete"] and [row["variant"] for row in record["results"]] == ["eager"]


def test_time_limit(tiny_bench: Bench) -> None:
    code, record = tiny_bench("--scope", "vae", "--variants", "patched", "--time-limit", 0)
    assert code == 0
    assert [row["status"] for row in record["results"]] == ["skipped", "skipped"]
    assert record["results"][0]["reason"] == "the time limit was reached"


def test_a_real_model(bench: Bench, model: Path, image: Path) -> None:
    size = ("--height", "32", "--width", "32", "--frames", "2", "--steps", "1")
    code, record = bench("--model", model, "--image", image, *size, "--scope", "end-to-end", "--variants", "patched")
    assert code == 0
    assert record["subject"]["model"] == str(model)
    assert record["shapes"]["end-to-end"]["num_frames"] == 2
    assert record["results"][1]["cold_start_s"] > 0


PREFETCHING = {"add_layer_norm", "group_norm_silu", "temporal_attention"}


@pytest.mark.parametrize("op", sorted(OPS.keys() - {"spatial_attention", "temporal_resnet_block"}))
def test_op(bench: Bench, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    code, record = bench("--op", op, "--size", "tiny")
    assert code == 0
    assert {row["scope"] for row in record["results"]} == {f"{op}: tiny"}
    measured = {row["variant"]: row for row in record["results"]}
    assert "eager" in measured and "compile" in measured
    assert ("ours, one stage" in measured) == (op in PREFETCHING)
    for row in measured.values():
        assert row["status"] == "ok" and row["error_to_reference"] < 1e-5
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        assert row["of_copy_bandwidth"] > 0 and (row.get("of_matmul_rate", 0) > 0) == ("flops" in row)
    assert measured["ours"]["implementations"] == ["triton"]


def test_all_ops_in_one_run(bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("geglu", "alpha_blend"):
        monkeypatch.setitem(OPS, op, OPS[op]._replace(cases=(OPS[op].tiny, OPS[op].tiny._replace(name="again"))))
    wrong = OPS["alpha_blend"].providers | {"ours": Provider(lambda spatial, *others: spatial + 1)}
    monkeypatch.setitem(OPS, "alpha_blend", OPS["alpha_blend"]._replace(providers=wrong))
    monkeypatch.setitem(OPS, "geglu", OPS["geglu"]._replace(reference=None))
    for op in OPS.keys() - {"geglu", "alpha_blend"}:
        monkeypatch.setitem(OPS, op, OPS[op]._replace(cases=()))
    code, record = bench("--op", "all", "--quick", "--compile-backend", "eager")
    assert code == 1 and record["complete"] and record["failed_ops"] == ["alpha_blend", "geglu"]
    assert "failed: alpha_blend, geglu" in capsys.readouterr().out
    measured = rows(record)
    assert {row["status"] for row in record["results"] if row["scope"].startswith("geglu")} == {"failed"}
    assert measured["alpha_blend: tiny", "ours"]["reason"].startswith("ArithmeticError: relative error")
    assert measured["alpha_blend: again", "eager"]["status"] == "ok"
    assert ("alpha_blend: again", "compile") not in measured, "of many ops only the first case is compiled"


def test_all_ops_dry_run(bench: Bench) -> None:
    code, record = bench("--op", "all", "--size", "tiny", "--quick")
    assert code == 0 and record["failed_ops"] == []
    assert list(record["shapes"]) == [f"{op}: tiny" for op in OPS]
    block = {row["variant"]: row for row in record["results"] if row["scope"] == "temporal_resnet_block: tiny"}
    assert block["ours"]["implementations"] == ["torch"] and block["ours"]["error_to_reference"] < 1e-5
    assert "compile+channels_last+cudnn.benchmark" in block and not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("name", sorted(OPS.keys() - {"spatial_attention", "temporal_resnet_block"}))
@torch.no_grad()
def test_full_size_cases_fit_their_op(name: str, plain_pytorch: None) -> None:
    op = OPS[name]
    assert op.cases
    with FakeTensorMode():
        for case in op.cases:
            arguments = op.build(*ops._random_tensors(case, CPU, torch.float16, seed=0))
            gold = [x.shape for x in ops._tensors(op.reference(*arguments, *case.scalars))]
            for variant in op.providers.keys() & {"eager", "ours"}:
                provider = op.providers[variant]
                prepared = provider.prepare(*arguments, *case.scalars)
                outputs = ops._tensors(provider.run(*prepared, *case.scalars))
                assert [x.numel() for x in outputs] == [shape.numel() for shape in gold]
            moved = op.numbers(case) * 2
            assert moved >= sum(x.nbytes for x in arguments if isinstance(x, torch.Tensor))
            assert op.flops is None or op.flops(case) > 0


def test_time_limit_of_ops(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "geglu", OPS["geglu"]._replace(reference=None))  # which is not even computed
    code, record = bench("--op", "geglu", "--size", "tiny", "--time-limit", 0)
    assert code == 0 and {row["reason"] for row in record["results"]} == {"the time limit was reached"}


def test_a_graph_is_captured_in_the_second_call() -> None:
    assert [measure._cold_calls("denoiser", variant) for variant in ("patched", "patched+cuda_graph")] == [1, 2]
    assert measure._cold_calls("end-to-end", "patched+cuda_graph") == 1


def test_op_of_many_implementations(bench: Bench) -> None:
    code, record = bench("--op", "spatial_attention", "--size", "tiny")
    assert code == 0
    measured = rows(record)
    for variant in ("eager", "ours"):
        row = measured["spatial_attention: tiny", variant]
        assert row["error_to_reference"] < 1e-5 and row["tflop_s"] > 0
    gluon = measured["spatial_attention: tiny", "gluon"]
    assert gluon["status"] == "skipped" and "Hopper" in gluon["reason"]


def test_one_stage_reaches_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[dict[str, Any]] = []
    monkeypatch.setattr(Launch, "_through_triton", lambda self, tensors: launches.append(self._constants))
    for guard in (one_stage_kernels(), nullcontext()):
        with guard:
            Launch(_apply_kernel, (1,), STAGES=3, BLOCK_C=64)(torch.zeros(1))
            Launch(_apply_kernel, (1,), BLOCK_C=64)(torch.zeros(1))
    assert [launch.get("STAGES") for launch in launches] == [1, None, 3, None]
    assert all(launch["BLOCK_C"] == 64 for launch in launches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--synthetic", "sora"], "svd, svd-xt", id="family"),
        pytest.param(["--op", "matmul"], "unknown; there are add_layer_norm, alpha_blend", id="op"),
        pytest.param(["--scope", "all"], "scopes are denoiser, vae, end-to-end", id="scope"),
        pytest.param(["--variants", "compile+faster"], "unknown faster", id="variant"),
        pytest.param(["--synthetic", "svd", "--size", "tiny", "--only", "no_op"], "ops are: ", id="site"),
        pytest.param(["--synthetic", "svd", "--prompt", "a cat"], "--prompt means nothing to", id="prompt"),
        pytest.param(["--size", "tiny"], "means nothing without --synthetic or --op", id="size"),
        pytest.param(["--repeats", "0"], "--repeats must be at least 1", id="repeats"),
        pytest.param(["--synthetic", "svd", "--op", "group_norm_silu"], "not allowed with", id="both"),
        pytest.param(["--synthetic", "svd", "--model", "x/y"], "not allowed with", id="model"),
        pytest.param(["--out", "/"], "/ is a folder", id="out"),
    ],
)
def test_bad_input_gets_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SHORT, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vidaccel: error: ") and message in error


@pytest.mark.parametrize("variant", ["compile+channels_last+cudnn.benchmark", "patched+compile"])
def test_a_variant_is_undone(variant: str, plain_pytorch: None) -> None:
    specified = specification("svd", "tiny")
    pipe = build_pipeline(specified, CPU, torch.float32)
    arguments = specified["call"] | pipeline_inputs(specified, CPU, torch.float32)
    weights = {name: weight.stride() for name, weight in pipe.unet.named_parameters()}
    before = generate(pipe, arguments, seed=0).frames
    with applied(variant, pipe, EAGERLY):
        assert all(module._compiled_call_impl is not None for module in measured_modules(pipe).values())
    assert all(module._compiled_call_impl is None for module in measured_modules(pipe).values())
    assert {name: weight.stride() for name, weight in pipe.unet.named_parameters()} == weights
    assert not torch.backends.cudnn.benchmark
    assert (generate(pipe, arguments, seed=0).frames == before).all()


@pytest.mark.parametrize("name", sorted({*configurations()} - {"svd-xt", "zeroscope"}))  # others at another size
def test_synthetic_tiny_pipelines_run(name: str) -> None:
    specified = specification(name, "tiny")
    pipe = build_pipeline(specified, CPU, torch.bfloat16)
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    parameters = [parameter for model in models for parameter in model.parameters()]
    assert all(p.any() for p in parameters if p.ndim > 1), "a layer of zeros switches a branch off"
    assert {p.dtype for p in parameters} == {torch.bfloat16} and not any(p.requires_grad for p in parameters)
    clip = generate(pipe, specified["call"] | pipeline_inputs(specified, CPU, torch.bfloat16), seed=0)
    assert torch.from_numpy(clip.frames).isfinite().all()


def test_synthetic_svd_has_the_size_of_the_released_model() -> None:
    class_name, config = specification("svd-xt")["components"]["unet"]
    with torch.device("meta"):
        unet = getattr(diffusers, class_name)(**config)
    assert sum(p.numel() for p in unet.parameters()) == 1_524_623_082  # of the checkpoint on the hub


def test_timing_stops_when_its_budget_is_spent() -> None:
    calls = []
    assert time_calls(lambda: calls.append(0), CPU, repeats=7, warmup=2).repeats == 7
    assert len(calls) == 9
    assert time_calls(lambda: None, CPU, repeats=100, budget_seconds=0).repeats == 3


@pytest.mark.parametrize(("cache_bytes", "sets"), [(1, 2), (1000, 10), (10**6, 24)])
def test_inputs_are_copied_until_they_exceed_the_cache(
    cache_bytes: int, sets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(L2_cache_size=cache_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    layer, x, y = torch.nn.Linear(2, 2), torch.randn(60), torch.randn(40)  # of 400 bytes
    inputs = ops._input_sets((layer, x, y), CPU)
    assert len(inputs) == sets and inputs[0] == (layer, x, y)
    assert len({tensor.data_ptr() for _, *tensors in inputs for tensor in tensors}) == 2 * sets
    assert all(module is layer and torch.equal(a, x) and torch.equal(b, y) for module, a, b in inputs)


@pytest.mark.gpu
def test_queued_calls_do_not_wait_for_python(device: torch.device) -> None:
    inputs = [torch.randn(2**10, device=device) for _ in range(4)]

    def slow_to_launch(x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            time.sleep(1e-4)
            x = x + 1
        return x

    calls = [partial(slow_to_launch, x) for x in inputs]
    latency = time_queued(calls, device, budget_seconds=0.01)
    assert 0 < latency.p20_ms <= latency.median_ms <= latency.p80_ms < 0.5 and latency.repeats >= 3


def test_table_leaves_out_what_nobody_measured() -> None:
    measured = [
        {"scope": "vae", "variant": "eager", "status": "ok", "median_ms": 10.0},
        {"scope": "vae", "variant": "compile", "status": "ok", "median_ms": 4.0},
        {"scope": "vae", "variant": "compile+channels_last", "status": "failed", "reason": "OutOfMemoryError: 80 GiB"},
        {"scope": "vae", "variant": "patched", "status": "ok", "median_ms": 3.0},
    ]
    add_ratios(measured)
    lines = table(measured).splitlines()
    assert lines[0].split() == ["scope", "variant", "median", "ms", "of", "eager", "of", "best", "compile"]
    assert lines[4].split() == ["vae", "patched", "3.000", "0.300", "0.750"]
    assert lines[3].endswith("failed  OutOfMemoryError: 80 GiB")


def test_records_are_strict_json() -> None:
    assert json.loads(json_text({"psnr": [float("inf"), 1.5, float("nan")]})) == {"psnr": ["inf", 1.5, "nan"]}


def test_the_readme_tables_are_drawn_from_records(
    tiny_bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, record = tiny_bench("--scope", "vae", "--variants", "patched")
    path, readme = tmp_path / "svd.json", tmp_path / "README.md"
    path.write_text(json.dumps(record))
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")

    def draw(*options: str) -> object:
        monkeypatch.setattr(sys, "argv", ["draw_benchmarks.py", str(path), "--readme", str(readme), *options])
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(str(ROOT / "scripts" / "draw_benchmarks.py"), run_name="__main__")
        return exited.value.code

    assert draw("--check") == 1
    assert draw() == 0
    assert draw("--check") == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmarks -->\n") and text.endswith("<!-- /benchmarks -->\nafter\n")
    assert "\nold\n" not in text and "| svd vae, 3x4x16x16, float32 |" in text and f"`{record['command']}`" in text
    readme.write_text("no marks\n")
    assert draw() not in (0, None) and readme.read_text() == "no marks\n"


def _record(device: str, subject: Record, *results: Record) -> Record:
    for row in results:
        row.setdefault("status", "ok")
    add_ratios(list(results))
    return {
        "command": f"vidaccel bench {subject}",
        "environment": {"device": device, "date": "2026-11-23T00:00:00", "commit": None}
        | dict.fromkeys(("torch", "triton", "diffusers"), "1.0"),
        "subject": subject,
        "dtype": "float16",
        "shapes": {"denoiser": [{"sample": "2x14"}]},
        "results": list(results),
    }


def test_tables_of_many_records() -> None:
    measured = {"scope": "denoiser", "cold_start_s": 2.0, "peak_memory_gib": 1.25}
    calls = _record(
        "H200",
        {"synthetic": "svd"},
        measured | {"variant": "eager", "median_ms": 200.0, "error_to_reference": 2e-3},
        measured | {"variant": "compile", "median_ms": 160.0},
        measured | {"variant": "compile+channels_last", "median_ms": 170.0},
        measured
        | {"variant": "patched+cuda_graph", "median_ms": 80.0, "peak_reserved_gib": 3.0}
        | {"error_to_reference": 1e-3, "error_to_eager": 3e-3, "psnr_min_to_eager_db": "inf"},
        {"scope": "denoiser", "variant": "patched+compile", "status": "failed", "reason": "OutOfMemoryError: 80 GiB"},
    )
    rates = {"scope": "geglu: level 0", "gb_s": 3000.0, "of_copy_bandwidth": 0.75}
    kernels = _record(
        "H200",
        {"op": "all"},
        rates | {"variant": "eager", "median_ms": 3.0},
        rates | {"variant": "ours", "median_ms": 1.0},
        rates | {"variant": "ours, one stage", "median_ms": 1.5},
        rates | {"variant": "ours+cudnn.benchmark", "status": "failed", "reason": "RuntimeError: no"},
    )
    draw = runpy.run_path(str(ROOT / "scripts" / "draw_benchmarks.py"))["draw"]
    lines = draw([_record("x86_64 CPU", {"model": "models/tiny"}), calls, kernels]).splitlines()
    assert lines.index("On one x86_64 CPU:") < lines.index("On one H200:")
    assert [line for line in lines if line.startswith(("| svd", "|  |"))] == [
        "| svd denoiser, 2x14, float16 | eager | 200 ms | 1.00 | 1.25 | 2 s | 1.2 GiB | 2.0e-03, - | - |",
        "|  | compile | 160 ms | 0.80 | 1.00 | 2 s | 1.2 GiB | -, - | - |",
        "|  | patched+cuda_graph | 80 ms | 0.40 | 0.50 | 2 s | 1.2 GiB (3.0) | 1.0e-03, 3.0e-03 | inf dB |",
        "|  | patched+compile | failed: OutOfMemoryError: 80 GiB | - | - | - | - | - | - |",
    ]
    assert [line for line in lines if line.startswith("| geglu")] == [
        "| geglu: level 0, float16 | 3 ms | - | 1 ms | 3.00 | - | 75% (3000 GB/s) | - | 1.50 |",
        "| geglu: level 0, float16 with cudnn.benchmark | 3 ms | - | failed: RuntimeError: no | - | - | - | - | - |",
    ]
    assert sum(line.startswith("- `vidaccel bench") for line in lines) == 3

    lines = draw([calls, calls | {"note": "empty caches", "complete": False}]).splitlines()
    labels = [line.split(" | ")[0] for line in lines if line.startswith("| svd")]
    assert labels == ["| svd denoiser, 2x14, float16", "| svd denoiser, 2x14, float16; empty caches"]
    assert [line.endswith("; empty caches; cut short") for line in lines if line.startswith("- `")] == [False, True]


def test_the_script_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/bench.py", "--op", "no-op"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(ROOT / "scripts" / "bench.py"), run_name="__main__")
    assert exited.value.code == 2
    assert "there are add_layer_norm" in capsys.readouterr().err


def test_neighbours_that_differ_in_cudnn_benchmark_share_their_compiled_code(
    tiny_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    seen: dict[str, bool] = {}
    begin, work = measure.applied, measure._measure

    def begun(variant: str, *args: Any) -> Any:
        started.append(variant)
        return begin(variant, *args)

    def measured(workload: Any, yardstick: Any, variant: str, *args: Any) -> Any:
        seen[variant] = torch.backends.cudnn.benchmark
        return work(workload, yardstick, variant, *args)

    monkeypatch.setattr(measure, "applied", begun)
    monkeypatch.setattr(measure, "_measure", measured)
    names = "cudnn.benchmark,compile,compile+cudnn.benchmark,patched+cuda_graph+cudnn.benchmark"
    _, record = tiny_bench("--scope", "vae", "--variants", names, "--quick")
    assert started == ["eager", "compile", "patched+cuda_graph+cudnn.benchmark"]
    *ran, graph = record["results"]
    assert seen == {row["variant"]: "benchmark" in row["variant"] for row in ran}
    assert [row["cold_start_s"] is None for row in ran] == [False, True, False, True]
    assert graph["status"] == "failed"  # a graph wants a GPU; it would have begun anew, for it records algorithms


@pytest.mark.gpu
@torch.no_grad()
def test_cudnn_tries_its_algorithms_for_a_convolution_that_has_run(device: torch.device) -> None:
    x, weight = torch.randn(2, 32, 16, 16, device=device).half(), torch.randn(32, 32, 3, 3, device=device).half()
    torch.nn.functional.conv2d(x, weight)

    def kernels() -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            torch.nn.functional.conv2d(x, weight)
            torch.cuda.synchronize()
        return len(profiler.events())

    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    with cudnn_benchmark(torch.float16):
        assert kernels() > 10, "nothing was tried"
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32) == before
