"""A site: one op at one place of a model; and the mixin that lets a fused block stand in for a diffusers block.

A fused block is a subclass of the diffusers class it replaces, put in place by assigning ``module.__class__``. A call
goes one of three ways:

* the fused forward, once it has proved itself for this signature (shapes, dtypes, device of the tensor arguments);
* on the first sight of a signature, both: the outcome is compared with the original forward within the budget of the
  site's fidelity class, and the verdict kept;
* the original forward, when the fused one does not serve the call, failed, or disagreed. The reason is counted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from vidaccel.errors import first_line
from vidaccel.kernels.dispatch import Choice, choices_so_far, record_choices
from vidaccel.sites.parameters import why_not_bypassed
from vidaccel.sites.self_check import disagreement

__all__ = ["BlockState", "Fidelity", "FusedBlock", "Site", "State", "fuses"]

logger = logging.getLogger(__name__)

Fidelity = Literal["bit-exact", "math-exact", "lossy"]
State = Literal["active", "left alone", "failed", "restored"]
Block = TypeVar("Block", bound="type[FusedBlock]")
Part = TypeVar("Part")


@dataclass(eq=False)
class Site:
    """One op at one module path.

    Attributes:
        path: Where, e.g. ``unet.down_blocks.0.resnets.0.spatial_res_block``.
        op: What, e.g. ``group_norm_silu``.
        fidelity: ``bit-exact``, ``math-exact`` or ``lossy``.
        state: ``active``, ``left alone`` (never patched), ``failed`` (the original code runs for good) or ``restored``.
        reason: Why it was left alone or failed.
        implementations: What has run here so far (``triton``, ``torch``); empty before the first call.
        fallbacks: How many calls went another way than planned, by reason.
    """

    path: str
    op: str
    fidelity: Fidelity
    state: State = "active"
    reason: str = ""
    implementations: set[str] = field(default_factory=set)
    fallbacks: Counter[str] = field(default_factory=Counter)

    @property
    def implementation(self) -> str:
        """What ran here: a name, several joined by ``+``, or ``not run yet``."""
        return "+".join(sorted(self.implementations)) or "not run yet"


class BlockState:
    """What a fused block remembers: its sites by op, the verdict on every signature it has seen, and what it keeps.

    ``kept`` is for results that outlive a call; they are gone with the patch.
    """

    def __init__(self, sites: Iterable[Site], self_check: bool) -> None:
        self.sites = {site.op: site for site in sites}
        self.self_check = self_check
        self.broken = ""
        self.verdicts: dict[tuple[Any, ...], str] = {}
        self.kept: dict[str, Any] = {}

    def enabled(self, op: str) -> bool:
        return op in self.sites

    def note_choices(self, choices: list[Choice]) -> None:
        chosen = {choice.op for choice in choices}
        for choice in choices:
            if site := self.sites.get(choice.op):
                site.implementations.add(choice.impl)
                if choice.reason:
                    site.fallbacks[choice.reason] += 1
        for op, site in self.sites.items():
            if op not in chosen:  # an op that is plain PyTorch: a shortcut or a change of layout
                site.implementations.add("torch")

    def note_fallback(self, reason: str, op: str = "") -> None:
        """Count a call that went another way: the whole block, or only one ``op`` of it."""
        for site in [self.sites[op]] if op else self.sites.values():
            site.fallbacks[reason] += 1

    def fail(self, reason: str) -> None:
        """The original forward runs here from now on; said once, and kept in the report."""
        self.broken = reason
        for site in self.sites.values():
            site.state, site.reason = "failed", reason
        paths = ", ".join(sorted({site.path for site in self.sites.values()}))
        logger.warning("%s: back to the original code: %s", paths, reason)

    @property
    def fidelity(self) -> Fidelity:
        """The loosest class among the block's ops: what the block as a whole can be held to."""
        classes: tuple[Fidelity, ...] = ("lossy", "math-exact")
        return next((c for c in classes if any(s.fidelity == c for s in self.sites.values())), "bit-exact")


class FusedBlock(nn.Module):
    """Mixin that goes before the diffusers class; see the module's docstring for a call's way through it.

    A subclass is made with ``@fuses(Original, {op: fidelity})``, keeps the original ``forward`` signature, hands its
    arguments to :meth:`guarded`, and implements :meth:`fused_forward`.
    """

    original: ClassVar[type[nn.Module]]
    ops: ClassVar[dict[str, Fidelity]]
    _vidaccel: BlockState

    @classmethod
    def stands_for(cls, module: nn.Module) -> bool:
        """Whether ``module`` is of the kind that this block is about, where diffusers has one class for several."""
        return True

    @classmethod
    def why_left_alone(cls, module: nn.Module) -> str | None:
        """Why a module of the original class cannot be fused at all (an unusual configuration), or None."""
        return None

    def fused_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def original_forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.forward(self, *args, **kwargs)

    def why_unserved(self, *args: Any, **kwargs: Any) -> str | None:
        """Why this very call goes to the original forward, or None. Cheap, no tensor data, traceable by Dynamo."""
        return None

    def guarded(self, *args: Any, **kwargs: Any) -> Any:
        """The fused forward if it serves this call and agrees with the original; else the original."""
        state = self._vidaccel
        if state.broken:
            return self.original_forward(*args, **kwargs)
        reason = self._records_gradients(args) or self.why_unserved(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self.original_forward(*args, **kwargs) if reason else self.fused_forward(*args, **kwargs)
        if not reason:
            signature = _signature(args) + _signature(kwargs.values())
            verdict = state.verdicts.get(signature)
            if verdict is None:
                return self._first_sight(signature, args, kwargs)
            reason = verdict
        if reason:
            state.note_fallback(reason)
            return self.original_forward(*args, **kwargs)
        return self.fused_forward(*args, **kwargs)

    def compile_ahead(self) -> None:
        """Begin to compile kernels that the first call will need. What is not foretold here is compiled when needed."""

    def serves_parent(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a fused parent may run parts of this block, with :meth:`run_part`, instead of calling it."""
        bypassed = why_not_bypassed(self, type(self)) is None and not self._vidaccel.broken
        return bypassed and self.why_unserved(*args, **kwargs) is None

    def run_part(self, part: Callable[..., Part], *args: Any, **kwargs: Any) -> Part:
        """``part(*args, **kwargs)``, a method of this block, on behalf of a parent whose self-check covers it."""
        choices = choices_so_far()
        before = 0 if choices is None else len(choices)
        out = part(*args, **kwargs)
        if choices is not None:
            self._vidaccel.note_choices(choices[before:])
        return out

    def _records_gradients(self, args: tuple[Any, ...]) -> str | None:
        if not torch.is_grad_enabled():
            return None
        tensors = [a for a in args if isinstance(a, Tensor)]
        if any(t.requires_grad for t in tensors) or any(p.requires_grad for p in self.parameters()):
            return "gradients are being recorded (fused sites serve inference only: use torch.no_grad())"
        return None

    def _first_sight(self, signature: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self._vidaccel
        try:
            with record_choices() as choices:
                out = self.fused_forward(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Whatever a new GPU, compiler or argument does to the fused path, the clip goes on with the original one.
            # If the arguments themselves were wrong, the original raises the error its users know.
            out = self.original_forward(*args, **kwargs)
            reason = first_line(error)
            state.verdicts[signature] = reason
            state.note_fallback(reason)
            logger.warning("%s: fused path failed, original code runs: %s", self._paths(), reason)
            return out
        state.note_choices(choices)
        try:
            if state.self_check:
                expected = self.original_forward(*args, **kwargs)
                if problem := disagreement(_tensor_of(out), _tensor_of(expected), state.fidelity):
                    state.fail(problem)
                    return expected
        except torch.OutOfMemoryError:  # for the check alone: the fused path has what it needs
            logger.warning("%s: not checked against the original code, for want of memory", self._paths())
        state.verdicts[signature] = ""
        return out

    def _paths(self) -> str:
        return ", ".join(sorted({site.path for site in self._vidaccel.sites.values()}))


def fuses(original: type[nn.Module], ops: dict[str, Fidelity]) -> Callable[[Block], Block]:
    """Class decorator: this fused block replaces ``original`` and hosts ``ops``.

    It takes the original's name, because diffusers finds blocks by ``__class__.__name__`` (``_no_split_modules``,
    ``_repeated_blocks``).
    """

    def decorate(cls: Block) -> Block:
        cls.original, cls.ops = original, ops
        cls.__name__, cls.__qualname__ = original.__name__, original.__qualname__
        return cls

    return decorate


def _signature(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(
        (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else type(value) for value in values
    )


def _tensor_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
