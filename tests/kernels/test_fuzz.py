"""Every op with arguments that Hypothesis draws: the result is right, or the arguments are refused in one line.

``make fuzz`` draws more of them, others each time. A strategy below draws the arguments of one op, in the order that
its reference takes them in; a new op needs one.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vidaccel.kernels.attention.qkv_projection import qkv_projection
from vidaccel.kernels.attention.spatial_attention import spatial_attention
from vidaccel.kernels.attention.temporal_attention import temporal_attention
from vidaccel.kernels.channels_last import channels_last
from vidaccel.kernels.check import disagreement
from vidaccel.kernels.conv.joined_projection import joined_projection
from vidaccel.kernels.conv.padded_channels import padded_channels
from vidaccel.kernels.conv.padded_clip import FRAME_MODES, PIXEL_MODES
from vidaccel.kernels.ffn.residual_projection import residual_projection
from vidaccel.kernels.norm.channel_statistics import chunk_rows_for
from vidaccel.kernels.op import REFERENCE, Op, listening, ops

# NumPy's, of numbers so large that their squares are infinite, which is what they should be
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "shifted", "channels last")
SMALL_PART = 256  # numbers: what else is cut only where an activation is large is cut then
VALUES = ("normal", "off-centre", "huge", "tiny", "zeros", "constant", "one large")
# Those that check their arguments themselves.
PUBLIC: dict[str, Callable[..., Any]] = {
    "joined_projection": joined_projection,
    "padded_channels": padded_channels,
    "qkv_projection": qkv_projection,
    "residual_projection": residual_projection,
    "spatial_attention": lambda *args, impl: spatial_attention(*args[:4], scale=args[4], impl=impl),
    "temporal_attention": lambda *args, impl: temporal_attention(*args[:5], scale=args[5], impl=impl),
}


class Drawer:
    """Draws sizes, choices and tensors; ``dtype`` is that of what an op works on."""

    def __init__(self, data: st.DataObject, device: torch.device) -> None:
        self._data, self._device = data, device
        dtypes = [torch.float16, torch.float32, torch.float64]  # the interpreter is wrong in bfloat16
        self.dtypes = [*dtypes, torch.bfloat16] if device.type == "cuda" else dtypes
        self.dtype = self.of(*self.dtypes)
        self._least = self.of(1, 1, 1, 1, 0)  # of sizes

    def of(self, *choices: Any) -> Any:
        return self._data.draw(st.sampled_from(choices))

    def size(self, most: int, least: int = 0) -> int:
        return self._data.draw(st.integers(max(least, self._least), most))

    def number(self, most: int) -> int:
        return self._data.draw(st.integers(0, most))

    def flag(self) -> bool:
        return self._data.draw(st.booleans())

    def channels(self) -> int:
        """Also those that kernels want to be divisible by a power of two."""
        return self.of(64, 32, 16, 8, 40, 7, 1)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, kinds: tuple[str, ...] = VALUES) -> Tensor:
        seed, layout, values = self._data.draw(
            st.tuples(st.integers(0, 2**16), st.sampled_from(LAYOUTS), st.sampled_from(kinds))
        )
        torch_random = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=torch_random, dtype=torch.float64)
        return _laid_out(_valued(x, values, dtype or self.dtype, self._device).to(self._device), layout)

    def weight(self, *shape: int) -> Tensor:
        """Of a product. Where it is as large as what it multiplies can be, the sums are infinite, or roundings."""
        return self.tensor(*shape, kinds=("normal", "zeros"))

    def vector(self, *shape: int) -> Tensor:
        """A parameter, which may have another float dtype."""
        return self.tensor(*shape, dtype=self.of(self.dtype, torch.float32))

    def maybe(self, draw: Callable[..., Any], *args: Any) -> Any:
        return draw(*args) if self.flag() else None


def _valued(x: Tensor, values: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    largest = torch.finfo(dtype).max
    # what PyTorch's kernels for GPUs make of a sum that overflows float32, zero or not a number, differs by kernel
    overflows = device.type == "cpu" or dtype == torch.float16
    if values == "off-centre":
        x = x + 30
    elif values == "huge":  # its square is infinite, or else its fourth power nearly so
        x = x * largest ** (0.6 if overflows else 0.2)
    elif values == "tiny":  # its square is zero
        x = x * largest**-0.6
    elif values == "zeros":
        x = x * 0
    elif values == "constant":
        x = x * 0 + 3
    elif values == "one large" and x.numel():
        x.view(-1)[-1] = 1000
    return x.to(dtype)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another place of memory, but for "expanded", which repeats those of the first sample."""
    if layout == "transposed" and x.ndim > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced" and x.ndim:
        wide = x.new_empty(*x.shape[:-1], 2 * x.shape[-1] + 1)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "expanded" and x.ndim and len(x):
        return x[:1].expand(x.shape)
    if layout == "shifted":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if layout == "channels last" and x.ndim in (4, 5) and x.numel():
        return channels_last(x)
    return x


def _add_layer_norm(d: Drawer) -> Any:
    samples, channels = d.size(4), d.channels()
    x = samples, d.size(5), channels
    row_to = d.of("sum", "residual", "norm", "stored")
    residual = d.tensor(*x) if row_to == "residual" else d.maybe(d.tensor, *x)
    position = d.maybe(d.tensor, d.of(1, max(samples, 1)), channels)
    row = d.maybe(d.tensor, samples, 1, channels)
    return d.tensor(*x), d.vector(channels), d.vector(channels), 1e-5, residual, row, position, row_to


def _alpha_blend(d: Drawer) -> Any:
    batch, frames, channels = d.size(2), d.size(3), d.channels()
    clip = (batch, channels, frames, d.size(3), d.size(3))
    shape = d.of(clip, (batch * frames, d.size(5), channels), (batch, channels, d.size(3), d.size(3)))
    stills = None if len(shape) == 4 else d.maybe(lambda: (d.tensor(batch, frames) > 0).to(d.dtype))
    return d.tensor(*shape), d.tensor(*shape), d.vector(1), stills, d.maybe(d.tensor, *shape), d.flag()


def _image_or_clip(d: Drawer) -> tuple[int, ...]:
    sides = [d.size(4) for _ in range(d.size(3, 1))]
    return d.size(2), d.channels(), *sides


def _conv_epilogue(d: Drawer, shape: tuple[int, ...] | None = None) -> Any:
    shape = shape or _image_or_clip(d)
    residual = d.maybe(d.tensor, *shape)
    residual_bias = None if residual is None else d.maybe(d.vector, shape[1])
    mix_factor = None if residual is None else d.maybe(d.vector, 1)
    stills = mix_factor is not None and len(shape) == 5 and d.flag()
    image_only = (d.tensor(shape[0], shape[2]) > 0).to(d.dtype) if stills else None
    return d.tensor(*shape), d.vector(shape[1]), residual, residual_bias, mix_factor, image_only, d.flag(), d.flag()


def _conv_epilogue_and_statistics(d: Drawer) -> Any:
    shape = _image_or_clip(d)
    return *_conv_epilogue(d, shape), chunk_rows_for(shape)


def _block_causal_attention(d: Drawer) -> Any:
    block = d.size(4, 1)
    x = d.size(2), block * d.size(4), d.of(288, 16, 3)
    return d.tensor(*x), d.tensor(*x), d.tensor(*x), block


def _channels_last_weight(d: Drawer) -> Any:
    return d.weight(d.size(3), d.channels(), *(d.of(1, 3) for _ in range(3))), d.of(torch.float16, torch.float32)


def _clip_conv(d: Drawer) -> Any:
    channels, taps = d.of(32, 96, d.channels()), (d.of(1, 3), *d.of((3, 3), (1, 3)))
    bordered = d.flag()
    border = [side - 1 if bordered else 0 for side in taps[1:]]
    rows = d.tensor(d.size(2), taps[0] + d.number(2), *(d.size(4) + more for more in border), channels)
    largest = torch.linalg.vector_norm(rows.float(), dim=-1).amax().view(1) if rows.numel() and d.flag() else None
    return rows, d.weight(d.of(96, 4, 8), channels, *taps), largest, bordered


def _depth_to_space(d: Drawer) -> Any:
    factor_t, channels = d.of(1, 2), d.channels()
    x = d.size(2), d.size(3), d.size(3), d.size(3), 4 * factor_t * channels
    source = d.tensor(*x[:-1], d.of(channels, 2 * channels, 4 * channels // 2))
    return d.tensor(*x), d.vector(x[-1]), source, factor_t, d.flag()


def _gated_residual_norm(d: Drawer) -> Any:
    samples, tokens, channels = d.size(3), d.size(5), d.channels()
    x, kind = (samples, tokens, channels), d.of("layer", "rms", "none")
    branch = d.tensor(*x) if kind == "none" else d.maybe(d.tensor, *x)
    count = d.of(1, tokens, 2)
    rows = None
    if count not in (1, tokens) or d.flag():
        picked = d.number(2**16)
        rows = torch.arange(picked, picked + tokens, dtype=torch.int32, device=d.tensor().device) % max(count, 1)
        count = max(count, 1)

    def modulation() -> Tensor:
        return d.vector(d.of(1, samples), count, channels)

    gate = None if branch is None else d.maybe(modulation)
    scale, shift, scale2 = d.maybe(modulation), d.maybe(modulation), d.maybe(modulation)
    shift2 = None if scale2 is None else modulation()
    norm = 1e-6, d.maybe(d.vector, channels), d.maybe(d.vector, channels)
    branch_eps = None if branch is None else d.of(None, 1e-6)
    return d.tensor(*x), branch, gate, scale, shift, scale2, shift2, rows, kind, *norm, branch_eps, d.of("once", "each")


def _geglu(d: Drawer) -> Any:
    return (d.tensor(*[d.size(4) for _ in range(d.size(3))], 2 * d.channels()),)


_swiglu = _geglu


def _group_norm(d: Drawer) -> Any:
    shape = _image_or_clip(d)
    return d.tensor(*shape), d.vector(shape[1]), d.vector(shape[1]), d.of(1, math.gcd(4, shape[1]), shape[1]), 1e-5


def _group_norm_and_sum(d: Drawer) -> Any:
    x, *others = _group_norm(d)
    return x, *others, d.vector(x.shape[1]), None, 0, 0


def _group_norm_silu(d: Drawer) -> Any:
    x, weight, bias, groups, eps = _group_norm(d)
    tail = d.maybe(d.tensor, *x.shape)
    shift = d.maybe(d.tensor, len(x), d.of(1, max(math.prod(x.shape[2:]), 1)), len(weight) * (1 if tail is None else 2))
    if tail is not None:
        weight, bias = torch.cat([weight, weight]), torch.cat([bias, bias])
    return x, weight, bias, groups, eps, d.flag(), shift, tail, None, 0, 0


def _joined_projection(d: Drawer) -> Any:
    samples, *sides = d.size(2), d.size(4), d.size(4)
    channels, skipped = d.channels(), d.channels()
    x, skip = (d.tensor(samples, c, *sides) for c in (channels, skipped))
    return x, skip, d.weight(d.channels(), channels + skipped, 1, 1)


def _rows_and_weights(d: Drawer, *widths: int) -> tuple[Tensor, ...]:
    channels = d.channels()
    x = d.tensor(*[d.size(4) for _ in range(d.size(2, 1))], channels)
    return x, *(d.weight(width, channels) for width in widths)


def _linear_geglu(d: Drawer) -> Any:
    width = 2 * d.channels()
    return *_rows_and_weights(d, width), d.tensor(width)


def _linear_gelu(d: Drawer) -> Any:
    width = d.channels()
    return *_rows_and_weights(d, width), d.maybe(d.tensor, width), d.of("tanh", "none")


def _merged_taps(d: Drawer) -> Any:
    return d.weight(d.size(3), d.channels(), 3, 3, 3), d.of(1, 2)


def _padded_channels(d: Drawer) -> Any:
    channels, out, kernel = d.channels(), d.channels(), d.of(1, 3)
    x = d.tensor(d.size(2), channels, d.size(6, 3), d.size(6, 3))
    weight = d.weight(out, channels, kernel, kernel)
    return x, weight, d.maybe(d.tensor, out), (d.of(1, 2), d.of(1, 2)), (d.of(0, 1), d.of(0, 1))


def _norm_of_clips(d: Drawer, *x: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The first arguments of a norm of clips of the shape ``x``, and the spans of frames."""
    channels, frames = x[4], max(x[1], 1)
    norm = d.vector(channels), d.vector(channels), d.of(1, math.gcd(4, channels), channels), 1e-5
    spans = d.of((frames, frames), (1, 1), (1, 2))
    return (d.tensor(*x), *norm), spans


def _frame_statistics(d: Drawer) -> Any:
    samples, channels, frames, *sides = d.size(2), d.channels(), d.size(3), d.size(4), d.size(4)
    shape = samples, channels, frames, *sides
    return d.tensor(*shape), d.maybe(d.tensor, samples, frames, channels), chunk_rows_for(shape)


def _padded_group_norm(d: Drawer) -> Any:
    x = d.size(2), d.size(4), d.size(4), d.size(4), d.channels()
    norm, spans = _norm_of_clips(d, *x)
    before = d.number(2)
    halo = d.maybe(d.tensor, x[0], before, *x[2:]) if before else None
    padding = before, d.number(2), d.number(1), d.of(*FRAME_MODES), d.of(*PIXEL_MODES)
    return *norm, d.maybe(d.tensor, x[4]), halo, *padding, *spans, d.flag(), None, 0, 0


def _pixel_conv(d: Drawer) -> Any:
    channels, taps = d.channels(), (d.of(1, 3), d.of(1, 3), d.of(1, 3))
    out, bordered = d.of(1, 3, 4), d.flag()
    height, width = (d.size(4) + bordered * (side - 1) for side in taps[1:])
    rows = d.tensor(d.size(2), taps[0] + d.number(2), height, width, channels)
    return rows, d.weight(out, channels, *taps), d.vector(out), bordered


def _pixel_shuffle(d: Drawer) -> Any:
    cell = d.of(1, 2), d.of(1, 2), d.of(1, 2, 3)
    size, channels = math.prod(cell), d.channels()
    x = d.size(2), d.size(3), d.size(3), d.size(3)
    source = d.maybe(d.tensor, *x, size * d.of(1, channels))
    return d.tensor(*x, size * channels), d.vector(size * channels), source, *cell, d.number(cell[0] - 1), d.number(1)


def _qk_norm_rope(d: Drawer) -> Any:
    batch, tokens, heads, head_dim = d.size(2), d.size(5), d.size(3, 1), 2 * d.of(8, 16, 5, 1)
    x, norm = (batch, tokens, heads * head_dim), d.of("none", "rms_head", "rms_all", "layer_head")
    width = heads * head_dim if norm == "rms_all" else head_dim

    def parameters() -> tuple[Any, ...]:
        with_weight, with_bias = d.flag(), d.flag()
        return (*(d.vector(width) if there else None for there in (with_weight, with_weight, with_bias, with_bias)),)

    def table() -> Tensor:
        return d.tensor(d.of(1, batch), tokens - start, d.of(1, heads), head_dim // 2, dtype=torch.float32)

    rope, start = d.of("none", "pairs", "halves"), d.number(tokens)
    tables = (None, None) if rope == "none" else (table(), table())
    alone = (d.tensor(*x), d.maybe(d.tensor, *x), heads, norm, 1e-6, d.of("once", "each"), *parameters(), rope, *tables)
    if alone[1] is None or d.flag():
        return *alone, start, *[None] * 8, False
    second = batch, d.size(4), heads * head_dim
    return *alone, start, d.tensor(*x), *(d.tensor(*second) for _ in range(3)), *parameters(), d.flag()


def _qkv_projection(d: Drawer) -> Any:
    width = d.channels()
    return _rows_and_weights(d, d.channels(), width, width)


def _residual_projection(d: Drawer) -> Any:
    x, weight = _rows_and_weights(d, d.channels())
    return x, weight, d.tensor(*x.shape[:-1], len(weight)).contiguous()


def _rms_norm_silu(d: Drawer) -> Any:
    factor_t, cells = d.of(0, 1, 2), d.flag()
    sides = [side * (2 if factor_t or cells else 1) for side in (d.size(4), d.size(4))]
    x = d.size(2), d.size(3), *sides, d.channels()
    channels, skip = x[-1], d.number(factor_t - 1) if factor_t else 0
    out_dtype = d.of(None, torch.float16) if d.dtype == torch.float32 else None
    if factor_t:
        small = x[0], -(-(x[1] + skip) // factor_t), x[2] // 2, x[3] // 2
        residual = d.tensor(*small, channels * d.of(1, 2, 4 * factor_t))
    else:
        residual = d.maybe(d.tensor, *x)
    x_scale = torch.full([1], d.of(0.25, 8.0)) if d.flag() else None
    residual_bias = None if residual is None else d.maybe(d.vector, channels)
    scale, shift = [d.vector(x[0], channels) for _ in range(2)] if d.flag() else (None, None)
    before = d.number(2)
    halo = d.maybe(lambda: d.tensor(x[0], before, *x[2:], dtype=out_dtype)) if before else None
    padding = before, d.number(2), d.number(1), d.of(*FRAME_MODES), d.of(*PIXEL_MODES)
    vectors = d.maybe(d.vector, channels), d.maybe(d.vector, channels)
    flags = d.of("normalize", "mean", "none"), 1e-6, d.flag(), d.flag(), d.flag(), out_dtype
    added = residual, residual_bias, scale, shift, halo, x_scale, factor_t, skip
    made = (*x[:2], x[2] // 2 + 1, x[3] // 2 + 1, 4, channels) if cells else x
    return d.tensor(*made), *vectors, *added, *padding, *flags


def _spatial_attention(d: Drawer) -> Any:
    batch, heads, head_dim = d.size(2), d.size(2, 1), d.of(16, 40, 64, 3)
    q, k = (batch, d.size(20), heads * head_dim), (batch, d.size(20), heads * head_dim)
    return d.tensor(*q), d.tensor(*k), d.tensor(*k), heads, d.of(head_dim**-0.5, 0.3)


def _spatial_norm_silu(d: Drawer) -> Any:
    latents = d.size(2), d.size(2), d.size(2), d.size(2), d.of(32, 8, 7, 1)
    rate, scale, first = d.of(1, 2), d.of(1, 2, 4), d.of(0, 1)
    frames = first + rate * (latents[1] - first)  # of an odd number, the first has its own latents
    x = latents[0], max(frames, 0), scale * latents[2], scale * latents[3], latents[4]
    norm, spans = _norm_of_clips(d, *x)
    before = d.number(2)
    halo = d.maybe(d.tensor, x[0], before, *x[2:]) if before else None
    of_latents = d.tensor(*latents), d.tensor(*latents)
    return *norm, *of_latents, d.maybe(d.tensor, x[4]), halo, before, *spans, d.flag(), None, 0, 0


def _temporal_attention(d: Drawer) -> Any:
    batch, frames, heads, head_dim = d.size(2), d.size(4, 1), d.size(2, 1), d.of(16, 40, 64, 3)
    q = batch * frames, d.size(4), heads * head_dim
    k = batch * d.of(frames, 3), *q[1:]
    return d.tensor(*q), d.tensor(*k), d.tensor(*k), frames, heads, d.of(head_dim**-0.5, 0.3)


def _temporal_conv(d: Drawer) -> Any:
    batch, frames, channels, out = d.size(2), d.size(4), d.channels(), d.channels()
    sides = d.size(3), d.size(3)
    _, bias, residual, _, *blend, _ = _conv_epilogue(d, (batch, out, frames, *sides))
    return d.tensor(batch, channels, frames, *sides), d.weight(out, channels, 3, 1, 1), bias, residual, *blend


def _upsample_conv(d: Drawer) -> Any:
    channels, out = d.of(16, 7, 1), d.of(8, 32, 7)
    x = d.tensor(d.size(2), channels, d.size(3), d.size(3))
    return x, d.weight(out, channels, 3, 3), d.vector(out)


def _upsample_cells(d: Drawer) -> Any:
    return _upsample_conv(d)[:2]


def _upsample_conv_and_statistics(d: Drawer) -> Any:
    x, weight, bias = _upsample_conv(d)
    return x, weight, bias, chunk_rows_for((len(x), len(weight), 2 * x.shape[2], 2 * x.shape[3]))


STRATEGIES: dict[str, Callable[[Drawer], Any]] = {
    name[1:]: strategy for name, strategy in globals().items() if name[1:] in ops()
}


def test_every_op_has_a_strategy() -> None:
    assert STRATEGIES.keys() == ops().keys()


def _outcome(run: Callable[[], Any]) -> Any:
    """The result, or the error as it is told."""
    try:
        return run()
    except Exception as error:
        return error


def check(op: Op, args: tuple[Any, ...]) -> None:
    """Every implementation gives what the reference does, in new memory; or all refuse the arguments alike."""
    call = PUBLIC.get(op.name, op)
    expected = _outcome(lambda: call(*_copies(args), impl=REFERENCE))
    for name, way in op.implementations.items():
        given = _copies(args)
        out = _outcome(lambda: call(*given, impl=name))  # noqa: B023
        if isinstance(out, ValueError) and "cannot run: " in str(out):
            assert op.unserved(*args, impl=name)
        elif isinstance(expected, Exception) and _is_empty(args):  # PyTorch takes some of these, and refuses others
            assert isinstance(out, Exception) or _is_empty(out), name
        elif isinstance(expected, Exception):
            assert isinstance(expected, (ValueError, TypeError)) and "\n" not in str(expected), repr(expected)
            assert (type(out), str(out)) == (type(expected), str(expected)), name
        else:
            assert not isinstance(out, Exception), repr(out)
            if name != REFERENCE:
                assert not (problem := disagreement(op, args, out, way.fidelity)), f"{name}: {problem}"
                with mock.patch("vidaccel.kernels.check.MOST_ELEMENTS", SMALL_PART):
                    assert not (problem := disagreement(op, args, out, way.fidelity)), f"{name}, in parts: {problem}"
            assert way.registered <= _like_its_fake(op, args, out), name
            if name == REFERENCE and op.registered:  # what comes next may have been written for the kernel's result
                assert _places(out) == _places(op.fake(*args)), "the reference's result lies in another order of memory"
            assert _may_overwrite(op, args) or all(map(_same, given, args)), f"{name} wrote to an argument"
    if not isinstance(expected, Exception):
        with listening(checks=True) as events:
            call(*_copies(args), impl=None)
        assert not any(event.problem or "Error: " in event.reason for event in events), events


def _is_empty(tensors: Any) -> bool:
    return any(x.numel() == 0 for x in tree_leaves(tensors) if isinstance(x, Tensor))


def _copies(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same in the same layout, in memory of its own."""
    return tuple(_copy(x) if isinstance(x, Tensor) else x for x in args)


def _copy(x: Tensor) -> Tensor:
    base = x if x._base is None else x._base
    return base.clone(memory_format=torch.preserve_format).as_strided(x.shape, x.stride(), x.storage_offset())


def _same(x: Any, y: Any) -> bool:
    return not isinstance(x, Tensor) or bool(((x == y) | ((x != x) & (y != y))).all())


def _may_overwrite(op: Op, args: tuple[Any, ...]) -> bool:
    return op.name in ("conv_epilogue", "conv_epilogue_and_statistics", "residual_projection", "rms_norm_silu")


def _like_its_fake(op: Op, args: tuple[Any, ...], out: Any) -> bool:
    """Whether torch.compile is told the truth about the result's shape, dtype and strides."""
    told = op.fake(*args)
    return _places(out) == _places(told) and [x.dtype for x in tree_leaves(out)] == [x.dtype for x in tree_leaves(told)]


def _places(out: Any) -> list[Any]:
    """The shapes and strides of the results, as far as these matter."""
    return [(x.shape, _strides(x) if x.numel() else None) for x in tree_leaves(out)]


def _strides(x: Tensor) -> list[int]:
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("name", STRATEGIES)
@given(data=st.data())
def test_an_op(name: str, data: st.DataObject) -> None:
    with torch.no_grad():
        check(ops()[name], STRATEGIES[name](Drawer(data, torch.device("cpu"))))


X = torch.linspace(-2, 2, 256).view(1, 1, 1, 1, 256)
IMAGE = torch.ones(1, 3, 2, 2)
ROWS = torch.linspace(-2, 2, 96).view(2, 16, 3).mT  # [2, 3, 16]
PARAMETERS = torch.ones(2, 16)
FLAGS = True, True, False
FOUND = {
    "a bias that is not rounded first": (
        "depth_to_space",
        lambda: (X.half(), X.flatten() / 3, torch.zeros(1, 1, 1, 1, 64).half(), 1, False),
    ),
    "no sample": ("temporal_attention", lambda: (*[torch.ones(0, 1, 16)] * 3, 1, 1, 0.25)),
    "no channel": ("qkv_projection", lambda: (torch.ones(2, 3, 0), *[torch.ones(4, 0)] * 3)),
    "no channel beside some": ("joined_projection", lambda: (IMAGE[:, :0], IMAGE, torch.ones(2, 3, 1, 1))),
    "rows of the other order": ("geglu", lambda: (ROWS,)),
    "rows of the other order, summed": ("add_layer_norm", lambda: (ROWS, *PARAMETERS, 1e-5, ROWS, None, None, "sum")),
    "rows of the other order, joined": (
        "gated_residual_norm",
        lambda: (ROWS, ROWS, *[None] * 6, "none", 0.0, None, None, None, "once"),
    ),
    "a clip of the other order": (
        "rms_norm_silu",
        lambda: (ROWS[None, None], *PARAMETERS, *[None] * 6, *[0] * 5, *["zeros"] * 2, "mean", 1e-6, *FLAGS, None),
    ),
    "statistics of no image": (
        "upsample_conv_and_statistics",
        lambda: (IMAGE[:0], torch.ones(8, 3, 3, 3), torch.ones(8), 1),
    ),
    "stills of the other order": (
        "alpha_blend",
        lambda: (*[channels_last(torch.ones(2, 16, 3, 2, 3))] * 2, torch.ones(1), torch.ones(3, 2).mT, None, False),
    ),
    "a row of a wider dtype": (
        "add_layer_norm",
        lambda: (ROWS.half(), *PARAMETERS, 1e-5, None, ROWS[:, :1], None, "sum"),
    ),
    "rows that are cut into parts": (
        "conv_epilogue",
        lambda: (torch.ones(1, 16, 8), PARAMETERS[0], *[None] * 4, False, False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("found", FOUND)
def test_what_was_found_once(found: str) -> None:
    name, draw = FOUND[found]
    with torch.no_grad():
        check(ops()[name], draw())


@pytest.mark.gpu
@pytest.mark.fuzz
@pytest.mark.parametrize("name", STRATEGIES)
@given(data=st.data())
def test_an_op_on_a_gpu(name: str, data: st.DataObject) -> None:
    with torch.no_grad():
        check(ops()[name], STRATEGIES[name](Drawer(data, torch.device("cuda"))))


def _large(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)


def _large_linear_geglu(device: torch.device) -> tuple[Any, ...]:
    return _large(device, 2, 65, 64), _large(device, 256, 64) / 8, _large(device, 256)


def _large_spatial_attention(device: torch.device) -> tuple[Any, ...]:
    return *(_large(device, 2, 70, 128) for _ in range(3)), 2, 0.125


def _large_spatial_norm_silu(device: torch.device) -> tuple[Any, ...]:
    norm = _large(device, 1, 5, 4, 6, 64), _large(device, 64), _large(device, 64), 2, 1e-6
    of_latents = (_large(device, 1, 3, 2, 3, 64) for _ in range(2))
    return *norm, *of_latents, _large(device, 64), _large(device, 1, 2, 4, 6, 64), 2, 3, 2, True, None, 0, 0


# For kernels that want more than is drawn, or that few examples pass by: ``make sanitize`` is to run all.
LARGE: dict[str, Callable[[torch.device], tuple[Any, ...]]] = {
    "linear_geglu": _large_linear_geglu,
    "spatial_attention": _large_spatial_attention,
    "spatial_norm_silu": _large_spatial_norm_silu,
}


@pytest.mark.parametrize("name", LARGE)
def test_large(name: str) -> None:
    with torch.no_grad():
        check(ops()[name], LARGE[name](torch.device("cpu")))


@pytest.mark.gpu
@pytest.mark.fuzz
@pytest.mark.parametrize("name", LARGE)
def test_large_on_a_gpu(name: str) -> None:
    with torch.no_grad():
        check(ops()[name], LARGE[name](torch.device("cuda")))


@pytest.mark.parametrize("name", STRATEGIES)
@given(data=st.data())
def test_an_op_keeps_no_tensor(name: str, data: st.DataObject) -> None:
    args = STRATEGIES[name](Drawer(data, torch.device("cpu")))
    alive = [weakref.ref(x) for x in args if isinstance(x, Tensor)]
    with torch.no_grad(), suppress(ValueError, RuntimeError):  # it may refuse them
        PUBLIC.get(name, ops()[name])(*args, impl=None)
    del args
    assert not [x.shape for ref in alive if (x := ref()) is not None]


SPOIL: dict[str, Callable[[Tensor], Tensor]] = {
    "a dim more": lambda x: x[None],
    "a dim less": lambda x: x.flatten(0, 1) if x.ndim > 1 else x.new_empty(()),
    "one more at the end": lambda x: torch.cat([x, x[..., :1]], -1) if x.numel() else x.new_empty(1),
    "twice as many": lambda x: torch.cat([x, x]) if x.ndim else x,
    "another float dtype": lambda x: x.to(torch.float32 if x.dtype == torch.float64 else torch.float64),
    "integers": lambda x: x.long(),
    "none at all": lambda x: x[:0] if x.ndim else x,
}


@pytest.mark.parametrize("name", STRATEGIES)
@given(data=st.data())
def test_arguments_that_do_not_fit(name: str, data: st.DataObject) -> None:
    args = STRATEGIES[name](Drawer(data, torch.device("cpu")))
    at = data.draw(st.sampled_from([i for i, x in enumerate(args) if isinstance(x, Tensor)]))
    spoil = SPOIL[data.draw(st.sampled_from(list(SPOIL)))]
    with torch.no_grad():
        check(ops()[name], (*args[:at], spoil(args[at]), *args[at + 1 :]))
