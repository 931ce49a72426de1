"""What a variant such as ``patched+compile`` does to a pipeline, and how all of it is undone.

A variant is ``eager``, or parts joined by ``+``: stock code and patched code take the same switches, so that the
baseline is as strong as the user could make it. ``patched`` is ``patch_pipeline(pipe)`` as it comes, with CUDA graphs
where it finds that they pay; ``patched+no_graph`` is without. ``compile`` compiles whole models, ``compile_blocks`` the
denoiser's repeated blocks, as diffusers' ``compile_repeated_blocks(fullgraph=True)`` does. Under ``torchrun`` a patched
clip may be split over all ranks: ``guidance``, ``frames``, ``sequence``, or ``parallel`` as the patch itself chooses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn
from torch._inductor.utils import fresh_cache

from vidaccel.bench.settings import Settings
from vidaccel.environment import free_memory
from vidaccel.errors import UsageError
from vidaccel.parallel.team import team
from vidaccel.patching.patch import CudaGraph, patch_pipeline
from vidaccel.patching.report import PatchReport

__all__ = [
    "BASELINES",
    "COMPILED",
    "DEFAULT",
    "applied",
    "cudnn_benchmark",
    "dtype_of",
    "is_split",
    "measured_modules",
    "parse_variants",
    "without_benchmark",
]

SPLITS = {"guidance": "guidance", "frames": "frames", "sequence": "sequence", "parallel": "auto"}
PARTS = ("channels_last", "cudnn.benchmark", "patched", "no_graph", "compile", "compile_blocks", *SPLITS)
COMPILED = frozenset(["compile", "compile_blocks"])
DEFAULT = ("eager", "patched", "compile", "patched+compile")
# The switches that a user of torch.compile may also turn; the fastest is the baseline that counts.
BASELINES = ("compile+cudnn.benchmark", "compile+channels_last", "compile+channels_last+cudnn.benchmark")


def parse_variants(text: str) -> tuple[str, ...]:
    """``"eager,patched+compile"`` as names; eager always comes first, for the others are compared with it.

    But under ``torchrun``: there the first one named stands for one GPU.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        parts = set(name.split("+"))
        unknown = parts - set(PARTS)
        if unknown and name != "eager":
            raise UsageError(f"--variants: unknown {', '.join(sorted(unknown))}; parts are eager, {', '.join(PARTS)}")
        if "no_graph" in parts and ("patched" not in parts or COMPILED & parts):
            raise UsageError(f"--variants: {name}: no_graph goes with patched, and not with compile, which has none")
        if (split := parts & SPLITS.keys()) and (len(split) > 1 or "patched" not in parts or COMPILED & parts):
            raise UsageError(f"--variants: {name}: one of {', '.join(SPLITS)} goes with patched, and not with compile")
        if split and team().size == 1:
            raise UsageError(f"--variants: {name}: there is one process; start with torchrun --nproc-per-node 2")
        if parts >= COMPILED:
            raise UsageError(f"--variants: {name}: compile and compile_blocks are alternatives")
    return tuple(dict.fromkeys(["eager", *names] if team().size == 1 else names))


def is_split(variant: str) -> bool:
    """Whether all ranks share a call under ``variant``."""
    return bool(SPLITS.keys() & set(variant.split("+")))


def without_benchmark(variant: str) -> str:
    """The variant that runs the same code, compiled or not, but for the algorithms that cuDNN chooses in it."""
    parts = variant.split("+")
    if "patched" in parts and not {"no_graph", *COMPILED} & set(parts):  # a graph may have recorded them
        return variant
    return "+".join(part for part in parts if part != "cudnn.benchmark") or "eager"


def measured_modules(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The denoiser and the VAE's decoder and encoder: what the scopes time by themselves, and what is compiled."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    return {"denoiser": denoiser, "vae": pipe.vae.decoder, "encode": pipe.vae.encoder}


def dtype_of(pipe: DiffusionPipeline) -> torch.dtype:
    """What the denoiser computes in."""
    return next(measured_modules(pipe)["denoiser"].parameters()).dtype


@contextmanager
def applied(variant: str, pipe: DiffusionPipeline, settings: Settings) -> Iterator[PatchReport | None]:
    """``pipe`` under ``variant`` inside the ``with`` block, and as it was after it; yields the patch report, if any."""
    parts = set(variant.split("+"))
    modules = measured_modules(pipe).values()
    with ExitStack() as undo:
        undo.callback(_forget_compiled_code)
        if settings.empty_caches:
            undo.enter_context(fresh_cache())
        if "channels_last" in parts:
            for module in modules:
                undo.enter_context(_channels_last(module))
        if "cudnn.benchmark" in parts:
            undo.enter_context(cudnn_benchmark(dtype_of(pipe)))
        report = None
        if "patched" in parts:
            graph: CudaGraph = False if {"no_graph", *COMPILED} & parts else "auto"
            split: Any = next((SPLITS[part] for part in parts if part in SPLITS), None)
            report = patch_pipeline(pipe, only=settings.only, skip=settings.skip, cuda_graph=graph, parallel=split)
            undo.enter_context(report)
        if "compile" in parts:
            for module in modules:
                module.compile(backend=settings.compile_backend)
                undo.callback(setattr, module, "_compiled_call_impl", None)
        if "compile_blocks" in parts:
            denoiser: Any = measured_modules(pipe)["denoiser"]
            undo.callback(_uncompile_blocks, denoiser)
            denoiser.compile_repeated_blocks(fullgraph=True, backend=settings.compile_backend)
        yield report


def _uncompile_blocks(denoiser: Any) -> None:
    for block in denoiser.modules():
        if type(block).__name__ in denoiser._repeated_blocks:
            block._compiled_call_impl = None


def _forget_compiled_code() -> None:
    torch._dynamo.reset()
    free_memory()


@contextmanager
def cudnn_benchmark(dtype: torch.dtype) -> Iterator[None]:
    """Let cuDNN try its algorithms out inside the ``with`` block, also for convolutions of ``dtype`` that ran before.

    PyTorch keeps the algorithm of a convolution that has run, and asks for none again in this process, whatever the
    flag says by then. It keeps it by whether TF32 is allowed, too, which means nothing to 16-bit numbers, so turning
    that round makes it ask. A float32 convolution keeps what it had.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32
    cudnn.benchmark = True
    if dtype.itemsize == 2:
        cudnn.allow_tf32 = not cudnn.allow_tf32
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32 = before


@contextmanager
def _channels_last(module: nn.Module) -> Iterator[None]:
    """Convolution weights in channels-last order; ``module.to(memory_format=...)`` takes 4-D or 5-D, never both."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    weights = [p for p in module.parameters() if p.ndim in formats]
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=formats[weight.ndim])
    try:
        yield
    finally:
        for weight in weights:
            weight.data = weight.data.contiguous()
