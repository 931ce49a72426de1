"""What a VAE's ``decode`` asks its decoder for, heard before any of it is decoded.

How latents are cut into tiles, and their pixels joined, is a VAE's own business. So it runs twice, both times with a
stand-in for its decoder (:func:`standing_in`). The first one, :class:`Asked`, hears what the decoder is asked for, and
answers with tensors that have no numbers (``meta``). Calls of which one passes on the cache of the one before belong
together, and are a :class:`Part`: a tile, or a clip that goes piece by piece. How parts are decoded is for others to
decide. :func:`joined` hands their pixels out, to be joined as ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vidaccel.kernels.context import while_set

__all__ = [
    "CALL_SLOT",
    "Asked",
    "Call",
    "HearsStandIns",
    "Part",
    "Run",
    "joined",
    "noise_reason",
    "pixels_of",
    "slot_of",
    "stand_in_of",
    "standing_in",
]

CALL_SLOT = "_compiled_call_impl"  # what nn.Module calls in place of its forward: module.compile() writes it, and we do

Run = Callable[[], Any]
StandIn = Callable[..., Any]
Answer = TypeVar("Answer")

_stand_ins: ContextVar[Mapping[nn.Module, StandIn | None]] = ContextVar("stand_ins", default={})  # noqa: B039  # kept


def stand_in_of(model: nn.Module) -> StandIn | None:
    """What is called in place of ``model`` in this thread, or None."""
    return _stand_ins.get().get(model)


def standing_in(stand_ins: Mapping[nn.Module, StandIn | None]) -> AbstractContextManager[object]:
    """Inside the ``with`` block, in this thread, call others in place of these models; None: the model itself."""
    return while_set(_stand_ins, {**_stand_ins.get(), **stand_ins})


class HearsStandIns:
    """What a model's call goes through where stand-ins for the model are called."""

    def asked(self, question: Callable[[], Answer]) -> Answer:
        """The answer to a question about the model; what is found out for it stands for its calls, and the reverse."""
        raise NotImplementedError


def slot_of(model: nn.Module) -> HearsStandIns | None:
    """What a call of ``model`` goes through, or None if that is not ours."""
    slot = vars(model).get(CALL_SLOT)
    return slot if isinstance(slot, HearsStandIns) else None


class Call:
    """A call of a decoder."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs

    @property
    def sample(self) -> Tensor:
        """The latents."""
        sample: Tensor = next(x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor))
        return sample

    def follows(self, other: Call) -> bool:
        """Whether it is given what ``other`` has left."""
        cache = self.kwargs.get("feat_cache")
        if cache is not None:
            return cache is other.kwargs.get("feat_cache")
        return self.kwargs.get("conv_cache") is other


class Part:
    """Calls of a decoder that belong together.

    Attributes:
        calls: One after the other.
        pixels: What it has decoded, call by call.
    """

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        self.pixels: list[Tensor] = []

    def decode(self, decoder: nn.Module) -> None:
        """Fill ``pixels``."""
        cache = None
        lists: dict[int, list[Any]] = {}  # of this decode: what it writes to them, the next one must not find
        for call in self.calls:
            kwargs = {
                name: lists.setdefault(id(x), list(x)) if isinstance(x, list) else x for name, x in call.kwargs.items()
            }  # fmt: skip
            if isinstance(kwargs.get("conv_cache"), Call):
                kwargs = {**kwargs, "conv_cache": cache}
            out = decoder(*call.args, **kwargs)
            self.pixels.append(pixels_of(out))
            cache = out[1] if isinstance(out, tuple) else None


class Asked:
    """Stands in for the decoder of a VAE, and writes down what it is asked for.

    Attributes:
        parts: That.
    """

    def __init__(self, vae: Any) -> None:
        self.parts: list[Part] = []
        self._with_cache = _returns_cache(vae.decoder)
        self._channels = 3 * (getattr(vae.config, "patch_size", None) or 1) ** 2  # what a patch of pixels divides

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs)
        if self.parts and call.follows(self.parts[-1].calls[-1]):
            self.parts[-1].calls.append(call)
        else:
            self.begin(call)
        sample = call.sample
        # all that is done with pixels is to cut, blend and join them, whatever their size
        pixels = torch.empty(len(sample), self._channels, *sample.shape[2:], device="meta", dtype=sample.dtype)
        return (pixels, call) if self._with_cache else pixels

    def begin(self, call: Call) -> None:
        """A part begins with this call; those before are complete."""
        self.parts.append(Part([call]))


def joined(decode: Run, vae: Any, pixels: list[Tensor]) -> Any:
    """What a decode makes of the pixels that its decoder would have returned, call by call."""
    with_cache = _returns_cache(vae.decoder)
    pixels.reverse()

    def hand_out(*args: Any, **kwargs: Any) -> Any:
        return (pixels.pop(), None) if with_cache else pixels.pop()

    stand_ins: dict[nn.Module, StandIn | None] = {vae.decoder: hand_out}
    if isinstance(before := getattr(vae, "post_quant_conv", None), nn.Module):
        stand_ins[before] = lambda latents: latents  # what it would make of them, nobody reads
    with standing_in(stand_ins):
        return decode()


def pixels_of(out: Any) -> Tensor:
    """Of what a decoder returned."""
    pixels: Tensor = out[0] if isinstance(out, tuple) else out
    return pixels


def noise_reason(decoder: nn.Module) -> str | None:
    """Why its calls must stay as they are, one by one, or None."""
    if any(getattr(part, "per_channel_scale1", None) is not None for part in decoder.modules()):
        return "its decoder adds noise, which is drawn call by call"
    return None


def _returns_cache(decoder: nn.Module) -> bool:
    return "conv_cache" in inspect.signature(type(decoder).forward).parameters
