"""One clip made by a pipeline, with what went into its VAE and came out of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from vidaccel.clips.generation import generate
from vidaccel.patching.families import unwrapped

__all__ = ["Call", "Take", "as_frames", "film", "on_host", "run_again", "run_device", "tensors_of"]


@dataclass(frozen=True)
class Call:
    """A call that was made: what it got and returned, with every tensor on the host.

    Attributes:
        of: The component that was called.
        outputs: None where nobody will compare them.
    """

    of: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor] | None = None


@dataclass(frozen=True)
class Take:
    """``frames`` is ``[F, H, W, C]`` float32 in 0..1; ``decodes`` are the calls of the VAE's decoder."""

    frames: np.ndarray
    seconds: float
    decodes: list[Call] = field(default_factory=list)

    @property
    def latents(self) -> Tensor | None:
        """All that was decoded, as one float32 row; None where no VAE was seen."""
        rows = [x.float().flatten() for call in self.decodes for x in tensors_of((call.args, call.kwargs))[:1]]
        return torch.cat(rows) if rows else None


def film(pipe: Any, call: dict[str, Any], seed: int, what: str, *, progress: bool, with_outputs: bool) -> Take:
    """Let ``pipe`` make the clip of ``call`` and ``seed``; ``with_outputs`` keeps what the VAE returned.

    The bar says ``what``.

    Raises:
        UsageError: the pipeline refuses the arguments, or memory runs out.
    """
    start = time.perf_counter()
    with _decodes_of(getattr(pipe, "vae", None), with_outputs) as decodes:
        frames = generate(pipe, call, seed, show_progress=progress, what=what).frames
    return Take(frames, time.perf_counter() - start, decodes)


@contextmanager
def _decodes_of(vae: Any, with_outputs: bool) -> Iterator[list[Call]]:
    """Collect the calls of ``vae.decode`` inside the ``with`` block.

    The method is wrapped in the class: one of an instance would look like somebody else's to the fused blocks.
    """
    calls: list[Call] = []
    owner: Any = vae if "decode" in vars(vae or object) else type(vae)
    decode = getattr(owner, "decode", None)
    if decode is None:
        yield calls
        return
    depth = 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal depth
        mine = owner is vae or args[0] is vae
        if not mine or depth:
            return decode(*args, **kwargs)
        depth += 1
        try:
            given = on_host(args if owner is vae else args[1:]), on_host(kwargs)
            out = decode(*args, **kwargs)
        finally:
            depth -= 1
        calls.append(Call("vae", *given, [x.cpu() for x in tensors_of(out)] if with_outputs else None))
        return out

    inherited = owner is not vae and "decode" not in vars(owner)
    owner.decode = watched
    try:
        yield calls
    finally:
        if inherited:
            del owner.decode
        else:
            owner.decode = decode


def on_host(tree: Any) -> Any:
    """A copy of ``tree`` with copies of its tensors in the host's memory."""
    return tree_map(lambda x: x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x, tree)


@torch.no_grad()
def run_again(pipe: Any, call: Call, *, eagerly: bool = False) -> Any:
    """Make ``call`` again with the component of ``pipe`` as it is now; ``eagerly`` also where that is compiled."""
    device, given = run_device(pipe), getattr(pipe, call.of)
    part: Any = unwrapped(given) if eagerly else given
    args, kwargs = tree_map(lambda x: x.to(device, copy=True) if isinstance(x, Tensor) else x, (call.args, call.kwargs))
    return part.decode(*args, **kwargs) if call.of == "vae" else part(*args, **kwargs)


def run_device(pipe: Any) -> torch.device:
    """Where ``pipe`` computes, also while its weights are offloaded."""
    return torch.device(getattr(pipe, "_execution_device", pipe.device))


def tensors_of(tree: Any) -> list[Tensor]:
    """The floating-point tensors of ``tree``, in order."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]


def as_frames(decoded: Tensor) -> np.ndarray:
    """What a VAE returns, ``[N, C, H, W]`` or ``[B, C, F, H, W]`` in -1..1, as frames ``[F, H, W, C]`` in 0..1."""
    if decoded.ndim == 5:
        decoded = decoded.transpose(1, 2).flatten(0, 1)
    frames: np.ndarray = (decoded.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return frames
