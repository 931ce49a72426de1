"""What the coexistence matrix is made of: a pipeline to try things on, and a thing to try, a feature, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vidaccel.clips.generation import generate

__all__ = ["MATH_EXACT", "Feature", "Needs", "Subject", "Undo", "blocks_of", "has", "seeded", "takes"]

MATH_EXACT = 2e-5  # of the norm of a clip in float32: either way adds up its sums in an order of its own, by the CPU
Undo = Callable[[], Any]


@dataclass
class Subject:
    """A tiny pipeline and what to call it with.

    Attributes:
        call: Arguments and keywords of one call of its denoiser in a clip, for features that are about a single call.
    """

    family: str
    pipe: Any
    arguments: dict[str, Any]
    call: tuple[tuple[Any, ...], dict[str, Any]] = field(default=((), {}))

    @property
    def denoiser(self) -> Any:
        return self.pipe.components.get("transformer") or self.pipe.components["unet"]

    @property
    def denoisers(self) -> list[Any]:
        """Both, where a pipeline has two."""
        second = self.pipe.components.get("transformer_2")
        return [self.denoiser] if second is None else [self.denoiser, second]

    @property
    def models(self) -> list[Any]:
        """The denoiser, or both of them, and the VAE."""
        names = ("unet", "transformer", "transformer_2", "vae")
        return [model for name in names if isinstance(model := self.pipe.components.get(name), nn.Module)]

    def set_denoiser(self, model: Any) -> None:
        self.pipe.register_modules(**{"transformer" if "transformer" in self.pipe.components else "unet": model})

    def clip(self, **changes: Any) -> Tensor:
        """The clip, with some arguments changed."""
        return torch.from_numpy(np.asarray(generate(self.pipe, self.arguments | changes, seed=0).frames))

    def noise(self, **changes: Any) -> Tensor:
        """What one call of the denoiser returns, with some of its keywords changed."""
        args, kwargs = self.call
        return self.denoiser(*args, **(kwargs | changes | {"return_dict": False}))[0]


Needs = Callable[[Subject], str | None]


def nothing(subject: Subject) -> None:
    """What a feature needs, or does, that needs or does nothing."""


@dataclass(frozen=True)
class Feature:
    """Something that users do with a pipeline.

    Attributes:
        name: As the table has it.
        turn_on: Does it; returns what undoes it, or None where stock diffusers cannot.
        needs: Why it cannot be done with a pipeline, patched or not; None if it can.
        run: What is compared.
        fallback: A regular expression: the reasons that it may give to go the original way. Empty: there is to be none.
        shows: Whether what stock diffusers gives is to change. A feature that does nothing would test nothing.
        limit: How far from stock's it may be, relative to its norm.
        rounds: Whether it calculates in low precision: the error to the stock clip is then at most twice stock's own.
        keeps_order: Whether stock's memory order of weights is not what the restored pipeline has: where it makes other
            weights of the patched ones, or asks for the order that the patch has given them.
        drifts: Whether stock diffusers, too, gives other bits when it has been undone.
        slow: Turned on once for each order, not twice.
    """

    name: str
    turn_on: Callable[[Subject], Undo | None] = nothing
    needs: Needs = nothing
    run: Callable[[Subject], Tensor] = Subject.clip
    fallback: str = ""
    shows: bool = False
    limit: float = MATH_EXACT
    rounds: bool = False
    keeps_order: bool = False
    drifts: bool = False
    slow: bool = False


def has(*methods: str) -> Needs:
    """Of a pipeline."""

    def needs(subject: Subject) -> str | None:
        missing = [name for name in methods if not hasattr(subject.pipe, name)]
        return f"the pipeline has no {missing[0]}" if missing else None

    return needs


def takes(*methods: str) -> Needs:
    """Of a denoiser."""

    def needs(subject: Subject) -> str | None:
        missing = [name for name in methods if not hasattr(subject.denoiser, name)]
        return f"the denoiser has no {missing[0]}" if missing else None

    return needs


def seeded(act: Callable[[], Any], seed: int = 7) -> Any:
    """What ``act`` returns, with the same random numbers each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return act()


def blocks_of(subject: Subject) -> list[Any]:
    """The blocks that a denoiser repeats."""
    kinds = {*(subject.denoiser._no_split_modules or ()), *(subject.denoiser._repeated_blocks or ())}
    kinds |= {"AnimateDiffTransformer3D", "BasicTransformerBlock", "ConsisIDBlock", "ResnetBlock2D"}
    blocks = [module for module in subject.denoiser.modules() if type(module).__name__ in kinds]
    assert blocks, "nobody knows the blocks of this denoiser"
    return blocks
