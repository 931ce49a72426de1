"""A VAE's tiles, those that are alike decoded as one batch.

Stock decodes one tile after the other, CogVideoX's in batches of two latent frames, Wan's frame by frame. Here
``tiled_decode`` runs twice (``parallel/asked.py``): first it is heard which tiles there are; then those of one shape go
through the decoder together, each with all of its frames, as many as keep a GPU busy and memory holds; at last stock
code blends them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidaccel.blocks.vae.causal_clip import decode_in_chunks
from vidaccel.errors import first_line
from vidaccel.parallel.asked import (
    CALL_SLOT,
    Asked,
    Call,
    Part,
    joined,
    noise_reason,
    slot_of,
    stand_in_of,
    standing_in,
)
from vidaccel.parallel.layout import layout
from vidaccel.sites.block import SITES, FusedBlock, looking_reason, unserved_reason
from vidaccel.sites.plain import is_of_a_library, rows_are_seen, stock_class
from vidaccel.sites.rules import MethodStandIn, MethodStandIns
from vidaccel.sites.site import Fidelity

__all__ = ["TileBatches", "TileDecoder"]

# Bytes that a batch works in at most, where a tile does not need more: tiles of 240 x 360 pixels and 49 frames keep a
# GPU busy one by one (decoder-profiles-h200.txt).
ENOUGH = 2**33


class TileDecoder(FusedBlock):
    """Base of fused decoders that keep the samples of a batch apart, so that tiles may be samples."""

    def tile_reason(self, *args: Any, **kwargs: Any) -> str | None:
        """Why this first call for a tile goes to the original forward, which would take much memory for a batch."""
        call = inspect.signature(type(self).forward).bind(self, *args, **kwargs)
        call.apply_defaults()
        return unserved_reason(self, getattr(self, SITES), call.args[1:], call.kwargs)

    def bytes_at_once(self, latents: Tensor) -> int:
        """Most memory that decoding all of ``latents`` at once takes."""
        raise NotImplementedError


class _TiledDecode(MethodStandIn):
    def __call__(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        vae, decode = self.module, partial(self.method(), z, *args, **kwargs)
        if torch.compiler.is_compiling() or stand_in_of(vae.decoder) is not None or layout() is not None:
            return decode()  # compiled as it stands, or split over ranks, tile by tile
        reason = _reason(vae, z)
        if self.stays_out(reason):
            return decode()
        asked = Asked(vae)
        try:
            with standing_in({vae.decoder: asked}):
                decode()
        except Exception as error:  # if an argument is wrong, the decode itself will say so
            reason = f"its tiles are not known beforehand: {first_line(error)}"
        if self.stays_out(reason or _part_reason(vae.decoder, asked.parts)):
            return decode()
        groups: dict[Hashable, list[Part]] = {}
        for part in asked.parts:
            groups.setdefault(_kind(part), []).append(part)
        most = max([_decode(vae.decoder, alike) for alike in groups.values()])
        self._site.implementations.add(f"{most} tiles at once" if most > 1 else "one tile at a time")
        return joined(decode, vae, [pixels for part in asked.parts for pixels in part.pixels])


class TileBatches(MethodStandIns):
    """Decode tiles that are alike as one batch."""

    op = "tile_batch"
    fidelity: ClassVar[Fidelity] = "math-exact"
    stand_ins: ClassVar = {"tiled_decode": _TiledDecode}


def _reason(vae: Any, z: Tensor) -> str | None:
    """Why tiles are decoded as they come, or None."""
    decoder = vae.decoder
    if not isinstance(decoder, TileDecoder) or not hasattr(decoder, SITES):
        return "its decoder is not patched"
    if slot_of(decoder) is None:
        return "its decoder is compiled, or somebody's"
    if reason := _foreign_reason(vae):
        return reason
    if rows_are_seen(decoder, *filter(None, [getattr(vae, "post_quant_conv", None)])):
        return "a hook on its decoder would see other calls"
    return noise_reason(decoder) or looking_reason(decoder, z)


def _foreign_reason(vae: Any) -> str | None:
    """Why hearing which tiles there are would run a user's code once more, or on tensors without numbers, or None."""
    if name := next((name for name, function in _functions(vae) if not _is_of_a_library(function)), None):
        return f"its {name} is not that of diffusers"
    before = getattr(vae, "post_quant_conv", None)
    if before is not None and not is_of_a_library(stock_class(before).__module__):
        return f"its post_quant_conv is a {type(before).__name__}, which is not of PyTorch or diffusers"
    return None


def _functions(vae: Any) -> Iterator[tuple[str, Any]]:
    """What of ``vae`` a decode may call, by name: of its classes, and of itself. A forward it does not."""
    for kind in type(vae).__mro__:
        if not kind.__module__.startswith("torch."):  # libraries hang methods of their own on every nn.Module
            yield from ((name, value) for name, value in vars(kind).items() if inspect.isfunction(value))
    own = {name: value for name, value in vars(vae).items() if callable(value) and name != CALL_SLOT}
    yield from ((name, value) for name, value in own.items() if not name.endswith("forward"))


def _is_of_a_library(function: Any) -> bool:
    written = inspect.unwrap(getattr(function, "__func__", function))
    module = written.__module__ if inspect.isfunction(written) else type(function).__module__
    return is_of_a_library(module) or module.startswith("huggingface_hub.")


def _part_reason(decoder: TileDecoder, parts: list[Part]) -> str | None:
    if not parts:
        return "its decode does not call its decoder"
    if not all(_goes_by_sample(call) for part in parts for call in part.calls):
        return "its decoder is given a tensor that is not of as many samples as the latents"
    reasons = (decoder.tile_reason(*part.calls[0].args, **part.calls[0].kwargs) for part in parts)
    slot = slot_of(decoder)
    assert slot is not None
    return slot.asked(lambda: next(filter(None, reasons), None))


def _goes_by_sample(call: Call) -> bool:
    """Whether all its tensors are of as many samples, so that those of several calls may be one."""
    tensors = (x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor))
    return all(x.ndim and len(x) == len(call.sample) for x in tensors)


def _kind(part: Part) -> Hashable:
    """What parts have in common that can be decoded together."""
    return tuple(
        (len(call.args), *call.kwargs, *map(_kind_of, (*call.args, *call.kwargs.values()))) for call in part.calls
    )


def _kind_of(x: Any) -> Hashable:
    if isinstance(x, Tensor):
        return *x.shape, x.dtype, x.device
    if isinstance(x, (Call, list)):  # a cache, of which each part has its own
        return type(x).__name__
    return x if isinstance(x, Hashable) else id(x)


def _decode(decoder: Any, alike: list[Part]) -> int:
    """Decode tiles, as many at once as memory allows; how many those were."""
    first = alike[0].calls[0].sample
    samples, channels, _, *size = first.shape
    frames = sum(call.sample.shape[2] for call in alike[0].calls)

    def needs(tiles: int) -> int:
        batch = first.new_empty(()).expand(tiles * samples, channels, frames, *size)  # takes no memory
        needed: int = decoder.bytes_at_once(batch)
        return needed if needed <= ENOUGH or tiles == 1 else sys.maxsize

    def decode(start: int, end: int) -> None:
        some = alike[start:end]
        batch = _together(some)
        batch.decode(decoder)
        for at, part in enumerate(some):
            part.pixels = [pixels[at * samples : (at + 1) * samples] for pixels in batch.pixels]

    return decode_in_chunks(len(alike), first.device, needs, decode)


def _together(parts: list[Part]) -> Part:
    """Parts that are alike as one, whose samples are those of all.

    The latents of its calls are cut from one tensor, by which decoders know what follows: not one of inference mode,
    of which a view does not tell what it was cut from.
    """
    with torch.inference_mode(False), torch.no_grad():  # the first would record gradients
        clips = torch.cat([torch.cat([call.sample for call in part.calls], dim=2) for part in parts])
        samples = clips.split([call.sample.shape[2] for call in parts[0].calls], dim=2)
    calls = zip(*(part.calls for part in parts), strict=True)
    return Part([_merged(some, sample) for some, sample in zip(calls, samples, strict=True)])


def _merged(calls: tuple[Call, ...], sample: Tensor) -> Call:
    """One call for the samples of several, of which ``sample`` are the latents."""
    first = calls[0]

    def merged(x: Any, others: list[Any]) -> Any:
        if x is first.sample:
            return sample
        return torch.cat(others) if isinstance(x, Tensor) else x

    args = tuple(merged(x, [call.args[at] for call in calls]) for at, x in enumerate(first.args))
    kwargs = {name: merged(x, [call.kwargs[name] for call in calls]) for name, x in first.kwargs.items()}
    return Call(args, kwargs)
