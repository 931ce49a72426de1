"""What the script that runs compute-sanitizer makes of its words, and says where it cannot run."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "sanitize.py"
GEGLU = {"_geglu_kernel": None}
# from runs on an H200, where no other source is named
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
WRONG = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at _geglu_kernel+0x1a0 in geglu.py:58
=========     by thread (3,0,0) in block (0,0,0)
=========     Access to 0x7fe77a5f1802 is out of bounds
========= 
========= Invalid __global__ read of size 4 bytes
=========     at 0x90 in _geglu_kernel
========= ERROR SUMMARY: 12 errors
========= ERROR SUMMARY: 10 errors were not printed. Use --print-limit option to adjust the number of printed errors
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at fmha_cutlassF_f16_aligned_32x128_gmem_sm80(\
PyTorchMemEffAttention::AttentionKernel<cutlass::half_t, cutlass::arch::Sm80, (bool)1, (int)32>::Params)+0xa440
=========     and Write access at fmha_cutlassF_f16_aligned_32x128_gmem_sm80(\
PyTorchMemEffAttention::AttentionKernel<cutlass::half_t, cutlass::arch::Sm80, (bool)1, (int)32>::Params)+0x3b30 \
[2048 hazards]
========= 
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
WARPS = """========= Error: Race reported between Read access at attention+0x100 in spatial_attention_gluon.py:270
=========     and Write access at attention+0xc080 in spatial_attention_gluon.py:270 [3 hazards]
=========     and Write access at attention+0x11330 in spatial_attention_gluon.py:289 [2 hazards]
========= 
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
COPIED = """========= Uninitialized __global__ memory read of size 2 bytes
=========     at void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(\
at::TensorIteratorBase &)::[lambda() (instance 3)]::operator ()() const::[lambda(float) (instance 1)], (int)4>\
(int, T1, T2, T4, T5, T6, T7)+0x3b0
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x1000
========= 
"""
READ = COPIED.replace(COPIED.splitlines()[1], "=========     at _geglu_kernel+0x3b0 in geglu.py:58")
DROPPED = """========= Warning: Error buffer overflow has been detected. Some records have been dropped
========= 
"""
HOST = """========= Host API memory access error at host access to 0x7f7fcdc01200 of size 400 bytes
=========     Uninitialized access at 0x7f7fcdc01300 on access by cudaMemcpy source
"""  # https://github.com/Henning1/dogqc/issues/4
COPY, FMHA = "at::native::unrolled_elementwise_kernel", "fmha_cutlassF_f16_aligned_32x128_gmem_sm80"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def summary(*reports: str) -> str:
    return f"========= COMPUTE-SANITIZER\n{''.join(reports)}========= ERROR SUMMARY: {len(reports)} errors\n"


@pytest.mark.parametrize(
    ("text", "errors", "reports"),
    [
        (CLEAN, 0, []),
        (WRONG, 12, [("_geglu_kernel", (58,)), ("_geglu_kernel", ())]),
        (RACE, 1, [(FMHA, ())]),
        (CLEAN + RACE, 1, [(FMHA, ())]),
        (WARPS, 1, [("attention", (270, 270, 289))]),
        (
            summary(COPIED, READ, HOST),
            3,
            [(COPY, ()), ("_geglu_kernel", (58,)), ("cudaMemcpy", ())],
        ),
        (summary(COPIED, DROPPED, READ), 3, [(COPY, ()), (COPY, ()), ("_geglu_kernel", (58,))]),
        (summary(DROPPED), 1, [("", ())]),
        ("", None, []),
    ],
)
def test_what_a_log_says(script: dict[str, Any], text: str, errors: int | None, reports: list[Any]) -> None:
    assert script["parse"](text) == (errors, reports)


@pytest.mark.parametrize(
    ("text", "code", "kernels", "verdict"),
    [
        (CLEAN, 0, GEGLU, "clean"),
        (CLEAN + WRONG, 0, GEGLU, "op: 10 errors are not listed; op: 2 errors in _geglu_kernel"),
        (RACE, 0, GEGLU, "clean"),
        (RACE, 0, {FMHA: None}, f"op: 1 errors in {FMHA}"),
        (summary("========= Program hit cudaErrorInvalidValue\n"), 0, GEGLU, "op: 1 errors in no kernel named"),
        (summary(READ), 0, GEGLU, "op: 1 errors in _geglu_kernel"),
        (CLEAN, 1, GEGLU, "op: exit code 1"),
        (summary(COPIED, DROPPED), 0, GEGLU, "clean"),
        (summary(READ, DROPPED), 0, GEGLU, "op: 2 errors in _geglu_kernel"),
        (summary(DROPPED), 0, GEGLU, "op: 1 errors in no kernel named"),
        (CLEAN, 0, {}, "no kernel ran"),
        (CLEAN, 0, {"_matmul_kernel": None}, "did not run: _geglu_kernel"),
        ("", 0, GEGLU, "op: no summary: the tool did not run"),
    ],
)
def test_the_verdict_is_about_our_kernels(
    script: dict[str, Any], text: str, code: int, kernels: dict[str, None], verdict: str
) -> None:
    expected = ["_geglu_kernel"] if "did not run" in verdict else []
    result = script["judge"]("racecheck", [script["Run"]("op", code, script["parse"](text), kernels)], expected)
    assert result["verdict"] == verdict
    elsewhere = {RACE: {FMHA: 1}, summary(COPIED, DROPPED): {COPY: 2}}.get(text, {})
    assert result["elsewhere"] == {name: count for name, count in elsewhere.items() if name not in kernels}


@pytest.mark.parametrize(
    ("control", "log", "verdict"),
    [
        ("nothing written", [COPIED], "clean"),
        ("nothing written", [], "control 'nothing written': not reported"),
        ("a plain store", [], "clean"),
        ("a plain store", [COPIED], "control 'a plain store': reported"),
        ("a product", [COPIED], "clean"),  # either way
        ("a product", [], "clean"),
    ],
)
def test_a_control_that_the_tool_gets_wrong(script: dict[str, Any], control: str, log: list[str], verdict: str) -> None:
    runs = [
        script["Run"](name, 0, script["parse"](summary(*said)), GEGLU) for name, said in [("op", []), (control, log)]
    ]
    assert script["judge"]("initcheck", runs)["verdict"] == verdict


def test_products_are_written_anew(script: dict[str, Any]) -> None:
    x, seen = torch.randn(3, 4, 5), []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    with Seeing(), script["products_written_anew"]():
        out = torch.bmm(x, x.mT)
    assert torch.equal(out, torch.bmm(x, x.mT))
    assert seen[-2:] == [torch.ops.aten.bmm, torch.ops.aten.mul]


@pytest.mark.parametrize(
    ("control", "lines", "explained"),
    [
        (WARPS, (270, 310), True),
        (CLEAN, (270, 310), False),  # the control has shown that the tool understands how warps part
        (WARPS, (270, 288), False),  # one access is in a partition
        (WARPS, None, False),  # the kernel's warps do not part
    ],
)
def test_races_before_warps_part(
    script: dict[str, Any], control: str, lines: tuple[int, int] | None, explained: bool
) -> None:
    runs = [
        script["Run"]("op", 0, script["parse"](WARPS), {"attention": lines}),
        script["Run"]("partitions that share nothing", 0, script["parse"](control), {}),
    ]
    result = script["judge"]("racecheck", runs)
    assert result["verdict"] == ("clean" if explained else "op: 1 errors in attention")
    assert result["explained_by_the_controls"] == ({"op": {"attention": 1}} if explained else {})


def test_every_kernel_is_known(script: dict[str, Any]) -> None:
    found = script["every_kernel"]()
    assert {"_geglu_kernel", "spatial_attention_gluon_kernel", "clip_conv_gluon_kernel"} <= found


def test_the_lines_before_warps_part(script: dict[str, Any]) -> None:
    gluon = pytest.importorskip("vidaccel.kernels.attention.spatial_attention_gluon")
    source = Path(gluon.__file__).read_text().splitlines()
    first, last = script["lines_before_partitions"](gluon.spatial_attention_gluon_kernel.fn)
    lines = source[first - 1 : last]
    assert lines[0].startswith("@gluon.jit") and lines[1].startswith("def spatial_attention_gluon_kernel(")
    assert lines[-1] == "        )" and not source[last].strip()
    assert script["lines_before_partitions"](gluon._consumer.fn) is None


@pytest.mark.slow
def test_an_op_under_a_tool(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the sanitizer, a program that runs what it is given, and leaves a log."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\nfrom pathlib import Path\nat = sys.argv.index('--log-file')\n"
        f"Path(sys.argv[at + 1].replace('%p', '1')).write_text({CLEAN!r})\n"
        "sys.exit(subprocess.run(sys.argv[at + 2 :]).returncode)\n"
    )
    program.chmod(0o755)
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    run = script["run_under"](str(program), "initcheck", "linear_gelu")
    assert (run.name, run.code, run.found) == ("linear_gelu", 0, (0, []))


def test_a_missing_tool_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "apt-get install" in done.stderr
