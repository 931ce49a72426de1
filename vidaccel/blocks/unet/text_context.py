"""The text of a clip, once: cross-attention takes one row for each text, not one for each frame.

A text-conditioned UNet attends to one text at all frames. Stock code repeats it for every frame, and projects it to
keys and values there; the repeating happens in the pipeline (AnimateDiff) or within the model's forward (UNet3D,
I2VGenXL). :class:`TextSource` is a rule on a whole model: at the start of each of its calls it looks at the text that
was passed, so that :func:`distinct_rows` can tell a block which rows of its context differ at all.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from vidaccel.sites.memo import Memo, held, once_in_call, preparations
from vidaccel.sites.plain import foreign_reason, rows_are_seen
from vidaccel.sites.rules import Rule
from vidaccel.sites.site import Fidelity, Site

__all__ = ["TextSource", "distinct_rows"]


def distinct_rows(context: Tensor) -> Tensor:
    """``[B, L, D]`` such that ``context`` is that with every row repeated for all frames; or ``context`` itself."""
    memo = held()
    text: _Text | None = memo.text if memo is not None else None
    return context if text is None else text.distinct_rows(context)


class _Text(NamedTuple):
    """The text of a call that is under way, as passed, and what is known of it."""

    text: Tensor
    num_frames: int
    repeats_text: bool
    distinct_text: Tensor

    def distinct_rows(self, context: Tensor) -> Tensor:
        if context is self.text:
            return self.distinct_text
        if not self.repeats_text or context.shape[0] != self.text.shape[0] * self.num_frames:
            return context
        # Never of the text that was passed: I2VGenXL adds image tokens before it repeats, a CUDA graph is recorded with
        # a copy of it, and somebody's wrapper of the model's forward may hand on another one.
        return once_in_call("distinct rows", context, lambda: context[:: self.num_frames].contiguous())


class _Watch:
    """Looks at the arguments of each call of a model."""

    def __init__(self, model: nn.Module, repeats_text: bool, sites: list[Site]) -> None:
        self._model = weakref.ref(model)
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._repeats_text = repeats_text
        self._sites = sites
        self._last: tuple[weakref.ref[Tensor], tuple[int, ...], bool] | None = None

    def __call__(self, memo: Memo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        text, sample = given.get("encoder_hidden_states"), given.get("sample")
        if not isinstance(text, Tensor) or not isinstance(sample, Tensor) or sample.ndim != 5:
            return
        if not all(site.on for site in self._sites):
            return
        if not self._text_is_changed_on_its_way(memo):
            num_frames = sample.shape[2]
            memo.text = _Text(text, num_frames, self._repeats_text, self._distinct(text, sample.shape[0], num_frames))

    def _text_is_changed_on_its_way(self, memo: Memo) -> bool:
        """Whether a hook, a forward or a module that is not diffusers' may hand on another text than was passed."""
        question = "text is changed on its way"
        if question not in memo:
            model = self._model()
            assert model is not None
            repeats_it_otherwise = self._repeats_text and rows_are_seen(model)
            before = len(model._forward_pre_hooks) > 0 or repeats_it_otherwise
            memo[question] = before or any(map(foreign_reason, _on_the_texts_way(model)))
        changed: bool = memo[question]
        return changed

    def _distinct(self, text: Tensor, batch: int, num_frames: int) -> Tensor:
        if self._repeats_text or num_frames == 1 or text.shape[0] != batch * num_frames:
            return text
        return self._first_of_each(text, num_frames)

    def _first_of_each(self, text: Tensor, num_frames: int) -> Tensor:
        """``[B, L, D]`` if every row of that is repeated in ``text``, else ``text``; compares the data, once a clip."""
        if text.is_inference() or (text.is_cuda and torch.cuda.is_current_stream_capturing()):
            return text
        stamp = text.data_ptr(), text._version, num_frames
        first = text[::num_frames].contiguous()  # anew in every call: a write through .data changes no version
        if self._last is None or self._last[0]() is not text or self._last[1] != stamp:
            alike = torch.equal(text, first.repeat_interleave(num_frames, dim=0))
            self._last = weakref.ref(text), stamp, alike
        return first if self._last[2] else text


def _on_the_texts_way(model: nn.Module) -> Iterator[nn.Module]:
    """The modules below ``model`` that a text goes through before an attention sees it."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, BasicTransformerBlock):
            names = path.split(".")
            yield from (modules[".".join(names[:depth])] for depth in range(1, len(names) + 1))


@dataclass(frozen=True)
class TextSource(Rule):
    """Let the text blocks of a video model know its text.

    Attributes:
        owner: A model that takes ``sample`` ``[B, C, F, H, W]`` and ``encoder_hidden_states``.
        repeats_text: Whether its own forward repeats the text for every frame. If not, the pipeline may have.
    """

    owner: type[nn.Module]
    repeats_text: bool = False

    @property
    def ops(self) -> Mapping[str, Fidelity]:
        return {"text_rows": "math-exact"}

    def matches(self, path: str, module: Any) -> bool:
        return isinstance(module, self.owner)

    def left_alone_reason(self, module: Any) -> str | None:
        # what has replaced the forward of this very model does not matter: arguments are looked at before it
        if type(module).forward is not self.owner.forward:
            return f"{type(module).__name__} has a forward of its own"
        return None

    def prepare(self, module: Any, sites: list[Site], checks: bool) -> _Watch:
        return _Watch(module, self.repeats_text, sites)

    def apply(self, module: Any, sites: list[Site], memo: _Watch) -> None:
        preparations(module).append(memo)
        for site in sites:
            site.implementations.add("torch")

    def in_place(self, module: Any, memo: _Watch) -> str | None:
        return None if memo in preparations(module) else "its call is not looked at any more"

    def undo(self, module: Any, memo: _Watch) -> None:
        if memo in preparations(module):
            preparations(module).remove(memo)
