"""What the tests of decoders and encoders of causal VAEs share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_checks import OfPyTorch, relative_error
from torch import Tensor, nn

from vidaccel import patch_module
from vidaccel.patching.report import PatchReport

__all__ = [
    "PIXEL_FAULTS",
    "Lora",
    "assert_no_worse",
    "check_bad_input",
    "check_changed_child",
    "check_fault_found",
    "check_gradients",
    "check_gradients_of_the_last",
    "check_halves",
    "count_convolutions",
    "decode",
    "encode",
    "host_is_full",
    "out_of_memory_beyond",
    "peak_of_encode",
    "ran",
    "reasons",
]


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents).sample


@torch.no_grad()
def encode(vae: Any, clip: Tensor) -> Tensor:
    """The mean of the latents and the logarithm of their variance."""
    return vae.encode(clip).latent_dist.parameters


def peak_of_encode(vae: Any, clip: Tensor) -> int:
    """Bytes of the GPU that an encode takes at its worst beyond those held before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    encode(vae, clip)
    return torch.cuda.max_memory_allocated() - before


CODERS = {decode: "decoder", encode: "encoder"}


def ran(report: PatchReport) -> set[str]:
    """How many frames went through decoders or encoders at once."""
    return {way for site in report.sites if site.op == "whole_clip" for way in site.implementations}


def reasons(report: PatchReport) -> str:
    """Why calls went through stock code."""
    return "; ".join(sorted({reason for _, _, reason in report.fallbacks}))


def host_is_full(text: str) -> RuntimeError:
    """What PyTorch raises where the memory of the host runs out."""
    return RuntimeError(f"DefaultCPUAllocator: can't allocate memory: {text}")


def out_of_memory_beyond(
    monkeypatch: pytest.MonkeyPatch, most: int, error: Callable[[str], Exception] = torch.OutOfMemoryError
) -> None:
    """Let memory run out where a convolution reads more frames than ``most``."""

    def conv3d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.shape[2] > most:
            raise error(f"{x.shape[2]} frames")
        return right(x, *args, **kwargs)

    right = F.conv3d
    monkeypatch.setattr(F, "conv3d", OfPyTorch(conv3d))


def count_convolutions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list of how many frames each convolution reads from now on."""
    frames: list[int] = []

    def conv3d(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        frames.append(x.shape[2])
        return right(x, *args, **kwargs)

    right = F.conv3d
    monkeypatch.setattr(F, "conv3d", OfPyTorch(conv3d))
    return frames


class Lora(nn.Module):
    """Stands where a convolution stood, and does more."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.base(*args, **kwargs)
        return (1.5 * out[0], *out[1:]) if isinstance(out, tuple) else 1.5 * out


def check_changed_child(
    vae: Any,
    latents: Tensor,
    change: Callable[[Any], None],
    when: str,
    reason: str,
    run: Callable[[Any, Tensor], Tensor] = decode,
) -> None:
    """The coder that ``run`` calls runs a child that was changed ``"before"`` or ``"after"`` patching, and says so."""
    if when == "before":
        change(vae)
    report = patch_module(vae)
    if when == "after":
        run(vae, latents)
        change(vae)
    torch.manual_seed(0)
    out = run(vae, latents)
    if when == "after":
        assert reason in reasons(report)
    else:
        left = [site for site in report.sites if site.path == CODERS[run]]
        assert left and all(site.state == "left alone" and reason in site.reason for site in left)
    report.restore()
    torch.manual_seed(0)
    assert torch.equal(out, run(vae, latents))


def assert_no_worse(out: Tensor, stock: Tensor, gold: Tensor) -> None:
    """The error of every frame is at most twice stock's."""
    for frame in range(gold.shape[2]):
        error, own = ((x[:, :, frame].to(gold.dtype) - gold[:, :, frame]).norm() for x in (out, stock))
        assert error <= 2 * own


def check_halves(
    vae: Any, latents: Tensor, dtype: torch.dtype, run: Callable[[Any, Tensor], Tensor] = decode
) -> None:  # fmt: skip
    """Beside float64, patched and stock."""
    vae.to(dtype)
    latents = latents.to(dtype)
    gold = run(copy.deepcopy(vae).double(), latents.double())
    stock = run(vae, latents)
    with patch_module(vae) as report:
        out = run(vae, latents)
        assert not report.fallbacks, str(report)
    assert_no_worse(out, stock, gold)


def check_gradients(
    vae: Any, x: Tensor, call: Callable[[Any, Tensor], Tensor] = lambda vae, x: vae.decode(x).sample
) -> None:
    """A ``call`` that records gradients is stock's."""
    outcomes = []
    for patched in (False, True):
        report = patch_module(vae) if patched else None
        leaf = x.clone().requires_grad_()
        out = call(vae, leaf)
        out.square().sum().backward()
        outcomes.append((out, leaf.grad))
    assert all(map(torch.equal, *outcomes))
    assert report is not None and "gradients" in reasons(report)


def check_gradients_of_the_last(
    call: Callable[[Tensor, Any], tuple[Tensor, Any]], vae: Any, clip: Tensor, sizes: list[int], empty: Any
) -> None:
    """``call`` takes some frames and a cache, first an ``empty`` one; all calls but the last record no gradients."""
    outcomes = []
    for patched in (False, True):
        if patched:
            patch_module(vae)
        leaf, cache = clip.clone().requires_grad_(), copy.copy(empty)
        for at, part in enumerate(parts := leaf.split(sizes, dim=2)):
            with torch.set_grad_enabled(at == len(parts) - 1):
                out, cache = call(part, cache)
        vae.zero_grad()
        out.square().sum().backward()
        outcomes.append([leaf.grad, *(weight.grad for weight in vae.parameters() if weight.grad is not None)])
    assert all(relative_error(ours, stock) <= 1e-5 for stock, ours in zip(*outcomes, strict=True))


@torch.no_grad()
def check_bad_input(vae: Any, x: Tensor, run: Callable[[Any, Tensor], Tensor] = decode) -> PatchReport:
    """The error is stock's."""
    outcomes = []
    for patched in (False, True):
        if patched:
            report = patch_module(vae)
        with pytest.raises(Exception) as error:
            run(vae, x)
        outcomes.append((error.type, str(error.value)))
    assert outcomes[0] == outcomes[1]
    return report


def _swapped_frames(pixels: Tensor) -> Tensor:
    return pixels.flip(2)


def _gain(pixels: Tensor) -> Tensor:
    return pixels * 1.01


def _zeroed_frame(pixels: Tensor) -> Tensor:
    pixels[:, :, -1] = 0
    return pixels


PIXEL_FAULTS = {"swapped-frames": _swapped_frames, "gain": _gain, "zeroed-frame": _zeroed_frame}


def check_fault_found(
    vae: Any,
    latents: Tensor,
    kind: Any,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[[Any, Tensor], Tensor] = decode,
) -> None:
    """What is wrong with what the fused ``kind`` makes when ``run`` is seen, and stock's is returned."""
    expected, right = run(vae, latents), kind.fused_forward
    monkeypatch.setattr(kind, "fused_forward", lambda *args: PIXEL_FAULTS[fault](right(*args)))
    with patch_module(vae) as report:
        assert relative_error(run(vae, latents), expected) <= 1e-5
        assert {site.state for site in report.sites if site.path == CODERS[run]} == {"failed"}
