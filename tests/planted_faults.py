"""Faults of kinds that real kernels have had, to be planted into ops, and what is to blame for each.

A fault is an implementation of an op that is wrong in one way. It is put beside those that the op has, and asked for
with ``VIDACCEL_IMPL``; where it is to be at one site only, it goes by the parameters that it is called with.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidaccel.kernels.channels_last import channels_last
from vidaccel.kernels.norm.channel_statistics import channel_statistics_ref
from vidaccel.kernels.op import Implementation, ops

__all__ = ["FAULTS", "Fault", "planted"]

Wrong = Callable[[Callable[..., Any], tuple[Any, ...]], Any]  # takes the op's reference and the arguments


@dataclass(frozen=True)
class Fault:
    """One fault of an SVD pipeline.

    Attributes:
        name: What it is, in a few words.
        ops: The op that is wrong, and those that run with it or in its place.
        wrong: What it returns where it is wrong.
        at: The module whose parameters it is wrong with; empty: everywhere.
        site: Path of the module that is to be blamed; or, for a fault that is everywhere, what such paths end in.
        first_call: From which of its calls on it is wrong; 0: from the first after a clip.
    """

    name: str
    ops: tuple[str, ...]
    wrong: Wrong
    at: str = ""
    site: str = ""
    first_call: int = 1

    def is_at(self, path: str, op: str) -> bool:
        """Whether it is right to blame this site."""
        return op in self.ops and (path == self.site if self.at else path.endswith(self.site))


_RESNET = "unet.mid_block.resnets.0.spatial_res_block"
_TEMPORAL = "unet.mid_block.resnets.1.temporal_res_block"
_DECODER = "vae.decoder.up_blocks.0.resnets.0.spatial_res_block"
_UPSAMPLER = "unet.up_blocks.0.upsamplers.0"
_FEED_FORWARD = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0"


def _times(factor: float) -> Wrong:
    return lambda reference, args: reference(*args) * factor


def _with(position: int, change: Callable[[Any], Any]) -> Wrong:
    """The right result for other arguments."""
    return lambda reference, args: reference(*args[:position], change(args[position]), *args[position + 1 :])


def _without_bias(reference: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    at = next(i for i, x in enumerate(args) if isinstance(x, Tensor) and x.ndim == 1)
    return _with(at, torch.zeros_like)(reference, args)


def _frame_later(reference: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    query, key, value, frames, *others = args
    clips = value.unflatten(0, (-1, frames))
    return reference(query, key, clips.roll(1, 1).flatten(0, 1), frames, *others)


def _wrong_scale(reference: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    query, key, value, frames, heads, *_ = args
    return reference(query, key, value, frames, heads, 0.7 * (query.shape[-1] // heads) ** -0.5)


def _sixteen_bit_sums(reference: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """A convolution that is added up in half precision: in bfloat16 for bfloat16, else in float16."""
    x, weight, bias, *rows = args  # of a part of the statistics, if it returns any
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float16
    total = bias.to(dtype)[None, :, None, None]
    padded = F.pad(F.interpolate(x, scale_factor=2.0).to(dtype), (1, 1, 1, 1))
    height, width = 2 * x.shape[2], 2 * x.shape[3]
    for channel, row, column in itertools.product(range(x.shape[1]), range(3), range(3)):
        pixels = padded[:, channel, None, row : row + height, column : column + width]
        total = total + pixels * weight[:, channel, row, column].to(dtype)[None, :, None, None]
    y = channels_last(total.to(x.dtype))
    return (y, channel_statistics_ref(y, *rows)) if rows else y


def _before_lora(weight: Tensor) -> Tensor:
    """What a block would go on with that had kept a weight, and has not seen that a LoRA of rank 1 was fused in."""
    out_features, in_features = weight.shape
    rows, columns = (torch.linspace(-1, 1, n, device=weight.device) for n in (out_features, in_features))
    lora = torch.outer(rows, -columns).to(weight.dtype)
    return weight - 0.1 * weight.std() * lora


def _rows_lost(reference: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    *others, normed = reference(*args)
    normed = normed.clone()
    normed[..., -1, :] = 0
    return [*others, normed]


def _in_frame(change: Callable[[Tensor], None]) -> Wrong:
    """A result of which ``change`` spoils frame 1."""

    def wrong(reference: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        out = reference(*args).clone()
        change(out[1])
        return out

    return wrong


def _swapped(reference: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    out = reference(*args)
    return out[[1, 0, *range(2, len(out))]]


def _tile(frame: Tensor) -> None:
    frame[:, :4, :4] = frame[:, :4, :4].flip(0)


def _large_values(reference: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    x, out = args[0], reference(*args)
    return torch.where(x.abs() > 0.7 * x.abs().amax(), 0.5 * out, out)


FAULTS = (
    Fault("1 % scale in one norm", ("group_norm_silu",), _times(1.01), f"{_RESNET}.norm1", _RESNET),
    Fault(
        "temporal attention off by one frame",
        ("temporal_attention",),
        _frame_later,
        site="temporal_transformer_blocks.0",
    ),
    Fault("time embedding dropped", ("group_norm_silu",), _with(6, lambda shift: None), f"{_RESNET}.norm2", _RESNET),
    Fault("eps 1e-5 for 1e-6", ("group_norm_silu",), _with(4, lambda eps: 1e-5), f"{_DECODER}.norm1", _DECODER),
    Fault("eps 1e-3 for 1e-5", ("group_norm_silu",), _with(4, lambda eps: 1e-3), f"{_RESNET}.norm1", _RESNET),
    Fault(
        "bias of one convolution missing",
        ("temporal_conv", "conv_epilogue"),
        _without_bias,
        f"{_TEMPORAL}.conv2",
        _TEMPORAL,
    ),
    Fault(
        "sums in 16 bits",
        ("upsample_conv", "upsample_conv_and_statistics"),
        _sixteen_bit_sums,
        f"{_UPSAMPLER}.conv",
        _UPSAMPLER,
    ),
    Fault(
        "stale weight after a LoRA", ("linear_geglu",), _with(1, _before_lora), f"{_FEED_FORWARD}.proj", _FEED_FORWARD
    ),
    Fault("two frames swapped", ("group_norm_silu",), _swapped, f"{_DECODER}.norm1", _DECODER),
    Fault(
        "a frame of NaN",
        ("group_norm_silu",),
        _in_frame(lambda frame: frame.fill_(float("nan")).sum()),
        f"{_DECODER}.norm2",
        _DECODER,
    ),
    Fault("a tile of one frame wrong", ("group_norm_silu",), _in_frame(_tile), f"{_DECODER}.norm2", _DECODER),
    Fault("last row of every norm zero", ("add_layer_norm",), _rows_lost, site="transformer_blocks.0"),
    Fault("wrong attention scale", ("temporal_attention",), _wrong_scale, site="temporal_transformer_blocks.0"),
    Fault("SiLU twice", ("group_norm_silu",), lambda ref, args: F.silu(ref(*args)), f"{_RESNET}.norm2", _RESNET),
    Fault("from the second call on", ("group_norm_silu",), _times(1.05), f"{_RESNET}.norm1", _RESNET, first_call=2),
    Fault("from the second clip on", ("group_norm_silu",), _times(1.05), f"{_RESNET}.norm1", _RESNET, first_call=0),
    Fault("at large values only", ("group_norm_silu",), _large_values, f"{_RESNET}.norm1", _RESNET),
)


@contextmanager
def planted(pipe: Any, *faults: Fault, steps: int = 1) -> Iterator[None]:
    """Plant ``faults`` into every patch that is made inside the ``with`` block; a clip has ``steps``."""
    by_op: dict[str, list[Fault]] = {}
    for fault in faults:
        for op in fault.ops:
            by_op.setdefault(op, []).append(fault)
    wishes = os.environ.get("VIDACCEL_IMPL", "")
    try:
        for op, some in by_op.items():
            _plant(pipe, op, some, steps)
        os.environ["VIDACCEL_IMPL"] = ",".join([*(f"{op}=planted" for op in by_op), *filter(None, [wishes])])
        yield
    finally:
        for op in by_op:
            ops()[op].implementations.pop("planted")
            ops()[op].forget()
        if wishes:
            os.environ["VIDACCEL_IMPL"] = wishes
        else:
            del os.environ["VIDACCEL_IMPL"]


def _plant(pipe: Any, name: str, faults: list[Fault], steps: int) -> None:
    op = ops()[name]
    calls = dict.fromkeys(faults, 0)
    parameters = {fault: _parameters(pipe, fault) for fault in faults}

    def run(*args: Any) -> Any:
        for fault in faults:
            if fault.at and not any(arg is parameter for arg in args for parameter in parameters[fault]):
                continue
            calls[fault] += 1
            if calls[fault] >= (fault.first_call or steps + 1):
                return fault.wrong(op.reference, args)
        return op.reference(*args)

    op.implementations["planted"] = Implementation(run)
    op.forget()


def _parameters(pipe: Any, fault: Fault) -> list[nn.Parameter]:
    if not fault.at:
        return []
    component, _, path = fault.at.partition(".")
    return list(getattr(pipe, component).get_submodule(path).parameters())
