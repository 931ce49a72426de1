"""The ``bench`` command in-process: dry runs on the CPU, and what becomes of the figures when something goes wrong."""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_models import tiny_synthetic_pipeline
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from vidaccel.bench import subject
from vidaccel.bench.first_calls import first_calls
from vidaccel.bench.op_cases import CASES, TINY, Stretches
from vidaccel.bench.op_stock import STOCK
from vidaccel.bench.ops import arguments_of
from vidaccel.bench.record import add_ratios, table
from vidaccel.bench.settings import Settings
from vidaccel.bench.synthetic import build_pipeline, configurations, pipeline_inputs, specification
from vidaccel.bench.timing import time_call, time_calls, time_queued
from vidaccel.bench.variants import applied, cudnn_benchmark, measured_modules, parse_variants
from vidaccel.bench.workloads import ModuleWorkload, workloads
from vidaccel.cli import main
from vidaccel.clips.generation import generate
from vidaccel.clips.outputs import json_text
from vidaccel.errors import UsageError
from vidaccel.kernels.op import ops

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
    new_process=False,
    cpus=None,
    empty_caches=True,
    only=None,
    skip=None,
    seed=0,
)
SHORT = ("--device", "cpu", "--repeats", "1", "--warmup", "0")

Record = dict[str, Any]
Bench = Callable[..., tuple[int, Record]]


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


@pytest.mark.slow
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
    assert record["environment"]["torch"] == version("torch") and record["dtype"] == "float32"
    assert record["ceilings"]["copy_gb_s"] > 0
    assert record["patch_reports"]["patched"]["active"] > 0 and not record["patch_reports"]["patched"]["failed"]
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].split()[:3] == ["scope", "variant", "median"]
    assert "end-to-end: patched:" in captured.err and "end-to-end: patched:" not in captured.out


def test_half_precision_is_held_against_float32(tiny_bench: Bench) -> None:
    code, record = tiny_bench("--scope", "vae", "--variants", "patched", "--dtype", "bfloat16")
    assert code == 0
    eager, patched = record["results"]
    assert 1e-4 < eager["error_to_reference"] < 0.1
    assert patched["error_to_reference"] < 2 * eager["error_to_reference"]
    assert "psnr_min_to_reference_db" in patched and "error_to_eager" not in eager


@pytest.mark.parametrize("synthetic", ["svd", "wan2.1-t2v-1.3b"], ids=["frame-by-frame", "clip"])
def test_an_encode_takes_back_what_was_decoded(synthetic: str, bench: Bench) -> None:
    code, record = bench("--synthetic", synthetic, "--size", "tiny", "--scope", "encode", "--variants", "patched")
    assert code == 0
    eager, patched = record["results"]
    assert eager["scope"] == patched["scope"] == "encode" and 0 < patched["error_to_eager"] < 1e-5
    assert "psnr_min_to_eager_db" not in patched  # latents are no pictures
    assert record["shapes"]["encode"] == [{"x": {"svd": "3x3x32x32"}.get(synthetic, "1x3x9x32x48")}]


@pytest.fixture
def backend() -> Iterator[Callable[[Callable[..., Any]], None]]:
    """Name a backend of torch.compile ``"odd"``, which runs a graph's outputs through a function."""
    name = "odd"

    def register(change: Callable[..., Any]) -> None:
        @torch._dynamo.register_backend(name=name)
        def compiled(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
            return lambda *args: [change(x) for x in graph(*args)]

    yield register
    torch._dynamo.backends.registry._COMPILER_FNS.pop(name, None)
    torch._dynamo.backends.registry._BACKENDS.pop(name, None)


def test_a_failing_variant_costs_only_itself(bench: Bench, backend: Callable[..., None]) -> None:
    def broken(x: torch.Tensor) -> None:
        raise RuntimeError("no kernel image\nand a long story")

    backend(broken)
    code, record = bench("--op", "geglu", "--size", "tiny", "--compile-backend", "odd")
    assert code == 1 and record["complete"]
    measured = rows(record)
    assert measured["geglu: tiny", "compile"]["status"] == "failed"
    assert measured["geglu: tiny", "compile"]["reason"] == "RuntimeError: no kernel image"
    assert measured["geglu: tiny", "eager"]["status"] == measured["geglu: tiny", "ours"]["status"] == "ok"


def test_interrupted_keeps_what_is_measured(bench: Bench, backend: Callable[..., None]) -> None:
    def interrupted(x: torch.Tensor) -> None:
        raise KeyboardInterrupt

    backend(interrupted)
    code, record = bench("--op", "geglu", "--size", "tiny", "--compile-backend", "odd")
    assert code == 130
    assert not record["complete"] and [row["variant"] for row in record["results"]] == ["eager"]


def test_nothing_is_held_against_an_output_that_is_not_finite(
    tiny_bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = ModuleWorkload.output
    monkeypatch.setattr(ModuleWorkload, "output", lambda workload: right(workload) * float("nan"))
    code, record = tiny_bench("--scope", "vae", "--variants", "patched", "--quick")
    assert code == 0 and {row["status"] for row in record["results"]} == {"ok"}
    assert not [name for row in record["results"] for name in row if name.startswith(("error", "psnr", "bit"))]
    assert "vae: eager's output is not finite: no error is measured" in caplog.text


@pytest.mark.slow
def test_neighbours_share_their_compiled_code_and_must_be_finite(
    tiny_bench: Bench, backend: Callable[..., None]
) -> None:
    backend(lambda x: x * float("nan") if torch.backends.cudnn.benchmark else x)
    names = "cudnn.benchmark,patched+no_graph,compile,compile+cudnn.benchmark"
    code, record = tiny_bench("--scope", "vae", "--variants", names, "--compile-backend", "odd", "--quick")
    assert code == 1 and not torch.backends.cudnn.benchmark
    *measured, compiled, not_finite = record["results"]
    assert not_finite["reason"] == "ArithmeticError: the output is not finite, eager's is"
    assert [row["cold_start_s"] is None for row in measured] == [False, True, False]
    for row in (*measured, compiled):
        assert row["of_best_compile"] == row["median_ms"] / compiled["median_ms"]


@pytest.mark.slow
def test_a_decoder_that_is_called_frame_by_frame_is_timed_as_a_whole() -> None:
    pipe, arguments = tiny_synthetic_pipeline("wan2.1-t2v-1.3b")
    arguments |= {"num_frames": 5, "num_inference_steps": 1}  # one frame of latents, then another
    (workload,) = workloads(pipe, arguments, ("vae",), 0).values()
    ((call,),) = ([shapes] for shapes in workload.shapes)
    assert set(call) == {"z"}
    first, second = workload.output(), workload.output()  # a cache that went on would give another clip
    assert torch.equal(first, second) and first.shape[2] == arguments["num_frames"]
    torch._dynamo.utils.counters.clear()
    with applied("compile+channels_last", pipe, EAGERLY):
        torch.testing.assert_close(workload.output(), first, rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] and not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_a_decode_in_tiles_is_timed_as_a_whole() -> None:
    """Tiles at the edges are smaller, and no clip by themselves."""
    pipe, arguments = tiny_synthetic_pipeline("hunyuanvideo1.5-480p")
    assert pipe.vae.use_tiling
    (workload,) = workloads(pipe, arguments, ("vae",), 0).values()
    assert len(workload.shapes) == 1 and workload.output().shape[2] == arguments["num_frames"]


def test_variants() -> None:
    assert parse_variants("patched,patched+no_graph, eager") == ("eager", "patched", "patched+no_graph")
    for variant in ("no_graph", "compile+no_graph", "patched+compile+no_graph", "patched+compile_blocks+no_graph"):
        with pytest.raises(UsageError, match="no_graph goes with patched, and not with compile"):
            parse_variants(variant)
    with pytest.raises(UsageError, match="alternatives"):
        parse_variants("compile+compile_blocks")


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


def test_a_decode_alone_needs_neither_prompt_nor_image(bench: Bench, model: Path) -> None:
    size = ("--height", "32", "--width", "32", "--frames", "2", "--steps", "1", "--variants", "eager")
    code, record = bench("--model", model, *size, "--scope", "vae")
    assert code == 0 and [row["scope"] for row in record["results"]] == ["vae"]
    assert bench("--model", model, *size, "--scope", "vae,end-to-end")[0] == 2, "a clip is made from something"


def test_only_that_names_no_site_is_answered_before_loading(
    bench: Bench, model: Path, image: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subject, "load_pipeline", None)
    assert bench("--model", model, "--image", image, "--only", "temporal_attenshun")[0] == 2
    assert "did you mean temporal_attention" in capsys.readouterr().err


def test_first_calls(plain_pytorch: None) -> None:
    specified = specification("svd", "tiny")
    arguments = specified["call"] | pipeline_inputs(specified, CPU, torch.float32)
    pipe = build_pipeline(specified, CPU, torch.float32)
    settings = replace(EAGERLY, scopes=("denoiser", "end-to-end"))
    denoiser, clip = first_calls((pipe, arguments), "patched", CPU, settings)
    assert (denoiser["scope"], clip["scope"]) == ("denoiser", "end-to-end")
    assert denoiser["patch_s"] > 0 and denoiser["first_call_s"] > 0 and denoiser["run_ms"] > 0
    assert len(denoiser["calls_ms"]) == len(denoiser["calls_host_ms"]) == 9 and len(clip["calls_ms"]) == 2
    assert min(denoiser["calls_ms"]) <= denoiser["next_ms"] <= denoiser["next_worst_ms"] == max(denoiser["calls_ms"])
    assert min(clip["calls_ms"]) > min(denoiser["calls_ms"])


@pytest.mark.slow
def test_each_variant_in_a_process_of_its_own(tiny_bench: Bench) -> None:
    before = dict(os.environ)
    code, record = tiny_bench("--scope", "denoiser", "--variants", "eager", "--new-process")
    assert code == 0 and dict(os.environ) == before
    (row,) = record["new_processes"]
    assert (row["scope"], row["variant"], row["caches"], row["status"]) == ("denoiser", "eager", "empty", "ok")
    assert len(row["calls_ms"]) == 9


def test_no_time_for_new_processes(tiny_bench: Bench) -> None:
    _, record = tiny_bench("--variants", "patched,compile", "--new-process", "--time-limit", 0)
    assert [(row["variant"], row["caches"]) for row in record["new_processes"]] == [
        ("eager", "empty"),
        ("patched", "empty"),
        ("patched", "warm"),
    ]
    assert {row["reason"] for row in record["new_processes"]} == {"the time limit was reached"}


def test_fewer_cores(bench: Bench) -> None:
    before = os.sched_getaffinity(0)
    _, record = bench("--op", "geglu", "--size", "tiny", "--cpus", 1, "--time-limit", 0)
    assert record["environment"]["cpu_cores"] == record["settings"]["cpus"] == 1
    assert os.sched_getaffinity(0) == before


MEASURED_OPS = sorted(CASES.keys() & ops().keys())


@pytest.mark.slow
def test_ops_dry_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIDACCEL_IMPL")
    code, record = bench("--op", "all", "--size", "tiny", "--compile-backend", "eager")
    assert code == 0 and record["complete"] and record["failed_ops"] == []
    measured = rows(record)
    for op in MEASURED_OPS:
        assert {"eager", "compile", "ours"} <= {variant for scope, variant in measured if scope == f"{op}: tiny"}
        assert measured[f"{op}: tiny", "eager"]["implementations"] == []
        # convolutions over time are the library's by default, attention in float32, which a CPU measures, PyTorch's;
        # the epilogue of linear_gelu is cuBLASLt's
        if op not in ("temporal_conv", "spatial_attention", "linear_gelu"):
            assert measured[f"{op}: tiny", "ours"]["implementations"] != ["torch"]
    for row in (row for row in record["results"] if row["status"] == "ok"):
        assert row["error_to_reference"] < 1e-5
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        assert row["of_copy_bandwidth"] > 0 and (row.get("of_matmul_rate", 0) > 0) == ("flops" in row)
    assert all(row["reason"] for row in record["results"] if row["status"] == "skipped")


def test_a_failing_op_costs_only_itself(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for op in MEASURED_OPS:
        monkeypatch.setitem(CASES, op, {})
    odd, right = {"y": (2, 4)}, {"x": (2, 4)}
    monkeypatch.setitem(CASES, "geglu", {"odd": odd, "right": right, "again": right})
    code, record = bench("--op", "all", "--quick", "--compile-backend", "eager")
    assert code == 1 and record["complete"] and record["failed_ops"] == ["geglu"]
    assert "failed: geglu" in capsys.readouterr().out
    measured = rows(record)
    assert measured["geglu: odd", "all"]["status"] == "failed"
    assert measured["geglu: again", "eager"]["status"] == "ok"
    assert ("geglu: again", "compile") not in measured, "of many ops only the first case is compiled"


def test_every_case_is_of_an_op() -> None:
    assert all(TINY in cases and len(cases) > 1 for cases in CASES.values())


@pytest.mark.parametrize("name", MEASURED_OPS)
@torch.no_grad()
def test_full_size_cases_fit_their_op(name: str) -> None:
    op = ops()[name]
    with FakeTensorMode():
        for case in CASES[name].values():
            args = arguments_of(op, case, CPU, torch.float16, seed=0)
            expected, fake = op.reference(*args), op.fake(*args)
            for x, y in zip(tree_leaves(expected), tree_leaves(fake), strict=True):
                assert x.shape == y.shape and x.dtype == y.dtype
            assert op.costs(*args).bytes > max(x.nbytes for x in args if isinstance(x, torch.Tensor))


def few_tokens(value: Any) -> Any:
    """Of an argument of a case: 7 for the tokens of a model, 2 of them text."""
    if isinstance(value, Stretches):
        return Stretches(few_tokens(value.lengths))
    if isinstance(value, tuple):
        return type(value)(map(few_tokens, value))
    return {226: 2, 17550: 5}.get(value, 7 if isinstance(value, int) and value > 4096 else value)


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in ("gated_residual_norm", "qk_norm_rope") for case in CASES[name]]
)
@torch.no_grad()
def test_stock_code_computes_what_the_op_does(name: str, case: str) -> None:
    arguments = {argument: few_tokens(value) for argument, value in CASES[name][case].items()}
    args = arguments_of(ops()[name], arguments, CPU, torch.float32, seed=0)
    stock = STOCK[name]
    outputs = tree_leaves(stock.collect(stock.run(*stock.prepare(*args))))
    for ours, expected in zip(outputs, tree_leaves(ops()[name].reference(*args)), strict=True):
        torch.testing.assert_close(ours.reshape(expected.shape), expected)


def test_time_limit_of_ops(bench: Bench) -> None:
    code, record = bench("--op", "geglu", "--size", "tiny", "--time-limit", 0)
    assert code == 0 and {row["reason"] for row in record["results"]} == {"the time limit was reached"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--synthetic", "sora"], "svd, svd-xt", id="family"),
        pytest.param(["--op", "matmul"], "--op matmul: unknown; there are ", id="op"),
        pytest.param(["--scope", "all"], "scopes are denoiser, vae, encode, end-to-end", id="scope"),
        pytest.param(["--variants", "compile+faster"], "unknown faster", id="variant"),
        pytest.param(["--synthetic", "svd", "--size", "tiny", "--only", "no_op"], "ops are: ", id="site"),
        pytest.param(["--synthetic", "svd", "--prompt", "a cat"], "--prompt means nothing to", id="prompt"),
        pytest.param(["--size", "tiny"], "means nothing without --synthetic or --op", id="size"),
        pytest.param(["--op", "gelu"], "did you mean geglu", id="op, nearly"),
        pytest.param(["--op", "geglu", "--new-process"], "means nothing to --op", id="process"),
        pytest.param(["--cpus", "0"], "--cpus must be 1 to", id="cpus"),
        pytest.param(["--repeats", "0"], "--repeats must be at least 1", id="repeats"),
        pytest.param(["--synthetic", "svd", "--op", "geglu"], "not allowed with", id="both"),
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


@pytest.mark.parametrize("family", sorted(set(configurations()) - {"svd-xt", "zeroscope"}))  # others at another size
def test_synthetic_tiny_pipelines_run(family: str) -> None:
    specified = specification(family, "tiny")
    pipe = build_pipeline(specified, CPU, torch.bfloat16)
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    parameters = [parameter for model in models for parameter in model.parameters()]
    assert all(p.any() for p in parameters if p.ndim > 1), "a layer of zeros switches a branch off"
    assert not any(p.requires_grad for p in parameters)
    for model in models:
        kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if kept & set(name.split(".")) else torch.bfloat16), name
    clip = generate(pipe, specified["call"] | pipeline_inputs(specified, CPU, torch.bfloat16), seed=0)
    assert torch.from_numpy(clip.frames).isfinite().all()


@pytest.mark.parametrize("family", configurations())
def test_before_a_decode_there_is_a_shallow_denoiser(family: str) -> None:
    full, shallow = specification(family), specification(family, shallow_denoiser=True)
    changed = {name for name, part in full["components"].items() if part != shallow["components"][name]}
    assert changed == {"transformer"} & full["components"].keys() and full["call"] == shallow["call"]
    for name in changed:
        before, after = (specified["components"][name][1] for specified in (full, shallow))
        assert {key for key in before if before[key] != after[key]} <= {"num_layers", "num_single_layers"}
        assert after["num_layers"] == 2


def test_synthetic_inputs() -> None:
    kinds = {"noise": [1, 2, 3], "zeros": {"zeros": [1, 2]}, "mask": {"mask": [2, 4], "valid": 1}, "image": "image"}
    inputs = pipeline_inputs({"call": {"height": 8, "width": 16}, "inputs": kinds}, CPU, torch.bfloat16)
    assert inputs["noise"].shape == (1, 2, 3) and inputs["noise"].dtype == torch.bfloat16 and inputs["noise"].all()
    assert inputs["zeros"].shape == (1, 2) and inputs["zeros"].dtype == torch.bfloat16 and not inputs["zeros"].any()
    assert inputs["mask"].tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]] and inputs["mask"].dtype == torch.int64
    assert inputs["image"].size == (16, 8)


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


@pytest.mark.gpu
def test_queueing_is_told_from_running(device: torch.device) -> None:
    times = time_call(lambda: torch.cuda._sleep(10**8), device)
    assert times.wall_ms > 20
    assert 0 < times.host_ms < times.wall_ms / 2  # that other processes may keep waiting


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
    assert 0 < latency.p20_ms <= latency.median_ms <= latency.p80_ms and latency.repeats >= 3
    assert latency.median_ms < 0.5  # launching takes 2 ms; a single one of three may find the GPU at others' work


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


def test_the_readme_tables_are_drawn_from_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"scope": "denoiser", "variant": "eager", "median_ms": 200.0}
    record = _record("H200", {"synthetic": "svd"}, measured, measured | {"variant": "patched", "median_ms": 100.0})
    path, readme, tables = tmp_path / "svd.json", tmp_path / "README.md", tmp_path / "tables.md"
    path.write_text(json.dumps(record))
    for page in (readme, tables):
        page.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")

    def draw(*options: str) -> object:
        pages = "--readme", str(readme), "--tables", str(tables)
        monkeypatch.setattr(sys, "argv", ["draw_benchmarks.py", str(path), *pages, *options])
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(str(ROOT / "scripts" / "draw_benchmarks.py"), run_name="__main__")
        return exited.value.code

    assert draw("--check") == 1
    assert draw() == 0
    assert draw("--check") == 0
    texts = [page.read_text() for page in (readme, tables)]
    for text in texts:
        assert text.startswith("before\n<!-- benchmarks -->\n") and text.endswith("<!-- /benchmarks -->\nafter\n")
        assert "\nold\n" not in text
    assert "| svd denoiser, 2x14, float16 | 200 ms | - | 100 ms | **0.50** | - | - | - |" in texts[0]
    assert "| svd denoiser, 2x14, float16 | eager | 200 ms |" in texts[1] and f"`{record['command']}`" in texts[1]
    tables.write_text("changed\n" + texts[1])
    assert draw("--check") == 0  # what stands beside the tables is written by hand
    tables.write_text(texts[1].replace("200 ms", "20 ms"))
    assert draw("--check") == 1
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
        | {"variant": "patched", "median_ms": 80.0, "peak_reserved_gib": 3.0, "host_ms": 12.0}
        | {"error_to_reference": 1e-3, "error_to_eager": 3e-3, "psnr_min_to_eager_db": "inf"},
        {"scope": "denoiser", "variant": "patched+compile", "status": "failed", "reason": "OutOfMemoryError: 80 GiB"},
    )
    starts = {"scope": "denoiser", "status": "ok", "patch_s": 0.5}
    figures = {
        ("eager", "empty"): (0.5, 200.0, 210.0),
        ("patched", "empty"): (9.0, 90.0, 300.0),
        ("patched", "warm"): (1.5, 80.0, 100.0),
    }
    calls["new_processes"] = [
        *(
            starts
            | {"variant": variant, "caches": caches}
            | dict(zip(("first_call_s", "next_ms", "next_worst_ms"), values, strict=True))
            for (variant, caches), values in figures.items()
        ),
        {"scope": "denoiser", "variant": "patched+compile", "caches": "warm", "status": "failed", "reason": "no"},
    ]
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
        "| svd denoiser, 2x14, float16 | eager | 200 ms | 1.00 | 1.25 | 1 s | 1.00 (1.05) | - | 1.2 GiB | "
        "2.0e-03, - | - |",
        "|  | compile | 160 ms | 0.80 | 1.00 | 2 s | - | - | 1.2 GiB | -, - | - |",
        "|  | patched | 80 ms | 0.40 | 0.50 | 2 s (9.5 s) | 0.40 (0.50); 0.45 (1.50) | 12 ms | 1.2 GiB (3.0) | "
        "1.0e-03, 3.0e-03 | inf dB |",
        "|  | patched+compile | failed: OutOfMemoryError: 80 GiB | - | - | - | - | - | - | - | - |",
    ]
    assert [line for line in lines if line.startswith("| geglu")] == [
        "| geglu: level 0, float16 | 3 ms | - | 1 ms | 3.00 | - | 75% (3000 GB/s) | - | 1.50 |",
        "| geglu: level 0, float16 with cudnn.benchmark | 3 ms | - | failed: RuntimeError: no | - | - | - | - | - |",
    ]
    assert sum(line.startswith("- `vidaccel bench") for line in lines) == 3

    older = _record("H100", {"synthetic": "svd"}, measured | {"variant": "eager", "median_ms": 400.0})
    older["environment"]["date"] = "2026-11-22T00:00:00"
    short = runpy.run_path(str(ROOT / "scripts" / "draw_benchmarks.py"))["summary"]
    lines = short([calls, older, kernels, calls | {"ranks": 2}]).splitlines()
    assert lines[0] == "On one H200:" and lines[4:] == [
        "| svd denoiser, 2x14, float16 | 200 ms | 160 ms | 80 ms | **0.40** | 0.50 | 2 s (9.5 s) | 1.2 -> 1.2 GiB |"
    ]

    pinned = draw([calls | {"settings": {"cpus": 2}}])
    assert "| svd denoiser, 2x14, float16, on 2 CPU cores | eager |" in pinned

    lines = draw([calls, calls | {"note": "empty caches", "complete": False}]).splitlines()
    labels = [line.split(" | ")[0] for line in lines if line.startswith("| svd")]
    assert labels == ["| svd denoiser, 2x14, float16", "| svd denoiser, 2x14, float16; empty caches"]
    assert [line.endswith("; empty caches; cut short") for line in lines if line.startswith("- `")] == [False, True]


def test_the_script_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/bench.py", "--op", "no-op"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(ROOT / "scripts" / "bench.py"), run_name="__main__")
    assert exited.value.code == 2
    assert "--op no-op: unknown" in capsys.readouterr().err


@pytest.mark.gpu
@torch.no_grad()
def test_cudnn_tries_its_algorithms_for_a_convolution_that_has_run(device: torch.device) -> None:
    x, weight = torch.randn(2, 32, 16, 16, device=device).half(), torch.randn(32, 32, 3, 3, device=device).half()
    torch.nn.functional.conv2d(x, weight)

    def kernels() -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profiler:
            torch.nn.functional.conv2d(x, weight)
            torch.cuda.synchronize()
        return len(profiler.events())

    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    with cudnn_benchmark(torch.float16):
        assert kernels() > 10, "nothing was tried"
    assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["svd-xt-vae", "ltx-video-vae", "mochi-vae", "ltx-2-encode"])
def test_records_are_made_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain_pytorch: None) -> None:
    skipped = "--skip", "compile", "new-process"

    def make() -> object:
        options = [str(tmp_path), "--tiny", "--only", name, *skipped, "--minutes", "5", "--commit", "abc"]
        monkeypatch.setattr(sys, "argv", ["make_records.py", *options])
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(str(ROOT / "scripts" / "make_records.py"), run_name="__main__")
        return exited.value.code

    assert make() == 0, (tmp_path / f"{name}.log").read_text()
    path = tmp_path / f"{name}.json"
    record = json.loads(path.read_text())
    scope = name.rpartition("-")[2]
    assert record["environment"]["commit"] == "abc" and list(rows(record)) == [(scope, "eager"), (scope, "patched")]
    made = path.stat().st_mtime_ns
    assert make() == 0 and path.stat().st_mtime_ns == made
