"""The text that a clip is conditioned on: its keys and values are projected once per clip, and once for all frames.

Stock code projects the same text in every cross-attention at every step, and each time for every frame again, because
the text is repeated over the frames: by the pipeline (AnimateDiff) or within the model's forward (UNet3D, I2VGenXL).

* :class:`TextSource` is a rule on a whole model. While the model runs, it knows the text that was passed and the
  number of frames, so that :func:`distinct_rows` can tell a block which rows of its context differ at all.
* :class:`LastResult` keeps what was projected for as long as the text lives and neither it nor the weights change.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from vidaccel.sites.parameters import why_unreadable
from vidaccel.sites.rules import Rule
from vidaccel.sites.site import Fidelity, Site

__all__ = ["LastResult", "TextSource", "distinct_rows", "is_text_hook", "keys_values", "why_not_kept"]

Result = TypeVar("Result")


class LastResult:
    """One result worked out from one tensor; forgotten when that tensor dies, or is not the one asked for."""

    def __init__(self) -> None:
        self._entry: tuple[weakref.ref[Tensor], Hashable, Any] | None = None

    def __reduce__(self) -> tuple[type[LastResult], tuple[()]]:
        return LastResult, ()  # a copied or loaded model starts without

    def of(self, x: Tensor, compute: Callable[[], Result], *key: Hashable) -> Result:
        """``compute()``, or what it gave last time if ``x`` is the same unchanged tensor and ``key`` the same."""
        stamp = (*_stamp(x), *key)
        if self._entry is not None and self._entry[0]() is x and self._entry[1] == stamp:
            return self._entry[2]
        self.clear()  # before the new result is made, so that never two are held
        result = compute()
        self._entry = weakref.ref(x, _clearing(weakref.ref(self))), stamp, result
        return result

    def clear(self) -> None:
        self._entry = None


def _clearing(owner: weakref.ref[LastResult]) -> Callable[[object], None]:
    """A weak reference's callback. It does not hold ``owner``: that memory would wait for a garbage collection."""

    def clear(_: object) -> None:
        if (result := owner()) is not None:
            result.clear()

    return clear


def _stamp(*tensors: Tensor) -> tuple[int, ...]:
    """What changes when one of ``tensors`` is written to or gets other memory."""
    return tuple(number for x in tensors for number in (x.data_ptr(), x._version))


def why_not_kept(attn: Attention, rows: Tensor) -> str | None:
    """Why the keys and values of ``rows`` must be projected at every call, or None."""
    if torch.is_grad_enabled() or rows.is_inference():
        return "text keys and values are kept only under torch.no_grad(), not torch.inference_mode()"
    if torch.is_autocast_enabled(rows.device.type):
        return "text keys and values are not kept under autocast"
    if _is_capturing(rows):
        return "a CUDA graph is being captured, and projects its text itself"
    for projection in (attn.to_k, attn.to_v):
        if reason := why_unreadable(projection, nn.Linear, rows, with_bias=False):
            return reason
        if projection.weight.is_inference():
            return "a weight was made under torch.inference_mode(), where nothing tells that it was written to"
    return None


def keys_values(attn: Attention, rows: Tensor, kept: LastResult | None) -> tuple[Tensor, Tensor]:
    """``attn``'s keys and values of the text ``rows`` ``[B, L, D]``; those in ``kept`` if nothing has changed."""
    if kept is None:
        return attn.to_k(rows), attn.to_v(rows)
    parameters = (attn.to_k.weight, attn.to_k.bias, attn.to_v.weight, attn.to_v.bias)
    stamp = _stamp(*(parameter for parameter in parameters if parameter is not None))
    return kept.of(rows, lambda: (attn.to_k(rows), attn.to_v(rows)), *stamp)


def distinct_rows(context: Tensor) -> Tensor:
    """``[B, L, D]`` such that ``context`` is that with every row repeated for all frames; or ``context`` itself."""
    call = _running.calls[-1] if _running.calls else None
    return context if call is None else call.distinct_rows(context)


class _Call(NamedTuple):
    """A call of a model that is under way: its text as passed, and what is known of it."""

    text: Tensor
    num_frames: int
    repeats_text: bool
    distinct_text: Tensor

    def distinct_rows(self, context: Tensor) -> Tensor:
        if context is self.text:
            return self.distinct_text
        if not self.repeats_text or context.shape[0] != self.text.shape[0] * self.num_frames:
            return context
        # I2VGenXL adds image tokens before it repeats: another context every step, the same for every frame
        return self.text if context.shape[1:] == self.text.shape[1:] else context[:: self.num_frames]


class _Running(threading.local):
    """The calls of models with a :class:`TextSource` in this thread, innermost last; None for one of no plain text."""

    def __init__(self) -> None:
        self.calls: list[_Call | None] = []


_running = _Running()


class _Watch:
    """The two forward hooks of a model with a :class:`TextSource`: from one to the other blocks know of its text."""

    def __init__(self, model: nn.Module, repeats_text: bool) -> None:
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._repeats_text = repeats_text
        self._distinct = LastResult()

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        given = dict(zip(self._names, args, strict=False)) | kwargs
        # Of a model whose calls are recorded as CUDA graphs no text is compared: a replay may bring another one.
        compares = model._compiled_call_impl is None
        _running.calls.append(self._call(given.get("sample"), given.get("encoder_hidden_states"), compares))

    def leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            _running.calls.pop()

    def _call(self, sample: Any, text: Any, compares: bool) -> _Call | None:
        if not isinstance(text, Tensor) or not isinstance(sample, Tensor) or sample.ndim != 5:
            return None
        batch, _, num_frames, _, _ = sample.shape
        distinct = text
        if compares and not self._repeats_text and num_frames > 1 and text.shape[0] == batch * num_frames:
            distinct = self._first_of_each(text, num_frames)
        return _Call(text, num_frames, self._repeats_text, distinct)

    def _first_of_each(self, text: Tensor, num_frames: int) -> Tensor:
        """``[B, L, D]`` if every row of that is repeated in ``text``, else ``text``; compares the data, once a clip."""
        if text.is_inference() or _is_capturing(text):
            return text

        def compare() -> Tensor | None:
            first = text[::num_frames].contiguous()
            return first if torch.equal(text, first.repeat_interleave(num_frames, dim=0)) else None

        first = self._distinct.of(text, compare, num_frames)
        return text if first is None else first


def is_text_hook(hook: Any) -> bool:
    """Whether a forward hook is a :class:`TextSource`'s: a replay of what blocks did with it needs it no more."""
    return isinstance(getattr(hook, "__self__", None), _Watch)


@dataclass(frozen=True)
class TextSource(Rule):
    """Let the text blocks of a video model know its text: forward hooks on the model, whose class stays.

    Attributes:
        owner: A model that takes ``sample`` ``[B, C, F, H, W]`` and ``encoder_hidden_states``.
        repeats_text: Whether its own forward repeats the text for every frame. If not, the pipeline may have.
    """

    owner: type[nn.Module]
    repeats_text: bool = False

    @property
    def ops(self) -> dict[str, Fidelity]:
        return {"text_keys_values": "math-exact"}

    def matches(self, path: str, module: Any) -> bool:
        return type(module) is self.owner

    def why_left_alone(self, module: Any) -> str | None:
        return None  # the hooks run before and after whatever has replaced the model's forward

    def apply(self, module: Any, sites: list[Site], self_check: bool) -> tuple[Any, Any]:
        watch = _Watch(module, self.repeats_text)
        for site in sites:
            site.implementations.add("torch")
        return (
            module.register_forward_pre_hook(watch.enter, with_kwargs=True),
            module.register_forward_hook(watch.leave, always_call=True),
        )

    def undo(self, module: Any, memo: tuple[Any, Any]) -> None:
        for handle in memo:
            handle.remove()


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
