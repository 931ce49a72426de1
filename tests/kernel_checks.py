"""What kernel tests share: the error budget, faults, fewer combinations, and what a compiler makes of a kernel.

It stands beside ``tests/kernels/`` because names below ``kernels`` belong to the Hugging Face package of that name.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from vidaccel.kernels.op import Op

DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)  # the interpreter's bfloat16 is wrong

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def assert_close_to_gold(out: Tensor, gold: Tensor, baseline: Tensor) -> None:
    """Error against the float64 ``gold`` may be twice PyTorch's own (``baseline``) plus one rounding step."""
    assert out.dtype == baseline.dtype and out.shape == gold.shape
    err = (out.double() - gold).abs().max()
    allowed = 2 * (baseline.double() - gold).abs().max() + torch.finfo(out.dtype).eps * gold.abs().max()
    assert err <= allowed, f"max err {err:.3e} > allowed {allowed:.3e}"


def pairwise(choices: Mapping[str, Sequence[Any]]) -> pytest.MarkDecorator:
    """Parametrise over a few of all combinations, in which any two choices of different arguments meet at least once.

    Choices are plain values, or a ``pytest.param`` with an id where their text is not readable or where one choice sets
    several arguments (``"shape, groups"``).
    """

    def pairs(row: tuple[int, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2))

    rows = list(itertools.product(*(range(len(values)) for values in choices.values())))
    missing = set[Any]().union(*map(pairs, rows))
    cases = []
    while missing:
        row = max(rows, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(row)
        chosen = [values[i] for values, i in zip(choices.values(), row, strict=True)]
        names = [getattr(choice, "id", None) or str(choice).removeprefix("torch.") for choice in chosen]
        values = [value for choice in chosen for value in getattr(choice, "values", (choice,))]
        cases.append(pytest.param(*values, id="-".join(names)))
    return pytest.mark.parametrize(",".join(choices), cases)


def _gain(rows: Tensor) -> None:
    rows[0] *= 1.01


def _zeroed_row(rows: Tensor) -> None:
    rows.select(0, -1).flatten(0, -2)[-1] = 0


def _swapped_frames(rows: Tensor) -> None:
    rows[:2] = rows[:2].flip(0).clone()


# What a check has to find in an output ``[frames, ..., C]``, spoilt in place.
FAULTS = {"gain": _gain, "zeroed-row": _zeroed_row, "swapped-frames": _swapped_frames}


@contextmanager
def planted(op: Op, name: str, spoil: Callable[[Any], None]) -> Iterator[None]:
    """Inside the ``with`` block the results of an implementation are spoilt, in place."""
    right = op.implementations[name]

    def run(*args: Any) -> Any:
        out = right.run(*args)
        spoil(out)
        return out

    with mock.patch.dict(op.implementations, {name: right._replace(run=run, bind=None)}):
        op.forget()
        yield
    op.forget()


def compile_for(
    target: str,
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    num_warps: int = 4,
    enable_fp_fusion: bool = True,
) -> dict[str, str]:
    """Compile a ``@triton.jit`` or ``@gluon.jit`` kernel for a GPU that need not be here.

    One ``signature`` or ``constexprs`` may serve several kernels: names that this one lacks are passed over.

    Args:
        target: A key of ``TARGETS``.
        kernel: The kernel, a top-level name of its module (interpreted here or not).
        signature: Type of every argument that is not in ``constexprs``: ``"*fp16"``, ``"i64"``, ``"fp32"``. A suffix
            ``":16"`` promises divisibility by 16, as a launch finds it on tensors and on such integers.
        constexprs: Value of every other argument; None for a pointer left out, 1 for an integer specialised to 1.

    Returns:
        The text of every stage: ``"ttir"``, ``"ttgir"``, ``"llir"``, then ``"ptx"`` and ``"sass"``, or ``"amdgcn"``.
    """
    options = {"num_warps": num_warps, "num_stages": 3, "enable_fp_fusion": enable_fp_fusion}
    task = (target, kernel.fn.__module__, kernel.fn.__name__, dict(signature), dict(constexprs), options)
    return _compiler().submit(_compile, *task).result()


def assert_no_spills(asm: Mapping[str, str]) -> None:
    """No register of a kernel built by ``compile_for`` lives in local (scratch) memory.

    Tiles are chosen for the Triton that the project is pinned to; what another one makes of them may spill one or two.
    """
    if "sass" in asm:
        found = re.findall(r"\b(?:LDL|STL)\b.*", asm["sass"])
        assert len(found) <= (0 if triton.__version__.startswith("3.6.") else 4), (
            f"{len(found)} local-memory accesses, first: {found[0]}"
        )
    else:
        spilled = [int(n) for n in re.findall(r"[sv]gpr_spill_count:\s*(\d+)", asm["amdgcn"])]
        assert spilled and not any(spilled), f"spilled registers: {spilled}"


def narrow_accesses(asm: Mapping[str, str]) -> list[str]:
    """The accesses to global memory of less than 16 bytes a thread."""
    code = asm.get("sass") or asm["amdgcn"]
    accesses = re.findall(r"\b(?:LDG|STG|LDGSTS)\.\S+|\b(?:global|buffer)_(?:load|store)_\w+", code)
    assert accesses
    return [access for access in accesses if not re.search(r"\.128|x4$", access)]


@functools.cache
def _compiler() -> ProcessPoolExecutor:
    """One process per test session that compiles: under ``TRITON_INTERPRET=1`` even ``tl.sum`` is interpreted."""
    pool = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        pool.submit(os.getpid).result()  # starts the process, which keeps the environment of this moment
    return pool


def _compile(
    target: str,
    module: str,
    name: str,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, str]:
    kernel = getattr(importlib.import_module(module), name)
    types, attrs = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constexprs:
            types[argument] = "constexpr"
            continue
        types[argument], _, divisor = signature[argument].partition(":")
        if divisor:
            attrs[(position,)] = [["tt.divisibility", int(divisor)]]
    constants = {name: value for name, value in constexprs.items() if name in types}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, types, constants, attrs)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    asm = {stage: text for stage, text in compiled.asm.items() if isinstance(text, str)}
    if TARGETS[target].backend == "cuda":
        asm["sass"] = compiled.asm["sass"]
    return asm
