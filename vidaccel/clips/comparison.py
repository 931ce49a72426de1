"""Stock and patched, same seed: are they the same clip, and which was faster?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vidaccel.clips.generation import Clip
from vidaccel.clips.video import side_by_side
from vidaccel.fidelity.metrics import psnr

__all__ = ["Comparison"]

_ONE_LEVEL_DB = 20 * np.log10(255)  # PSNR of clips that are one of 256 levels apart everywhere


@dataclass(frozen=True)
class Comparison:
    """Both clips come from one seed, each after a warm-up of its own; frames are compared before they are rounded."""

    stock: Clip
    patched: Clip

    @cached_property
    def psnr(self) -> np.ndarray:
        """``[F]`` in dB."""
        return psnr(self.stock.frames, self.patched.frames)

    @property
    def speedup(self) -> float:
        return self.stock.timings.total / self.patched.timings.total

    def side_by_side(self) -> np.ndarray:
        """One labelled clip."""
        labels = (
            f"stock diffusers {self.stock.timings.total:.1f} s",
            f"vidaccel {self.patched.timings.total:.1f} s · {_decibels(self.psnr.mean())}",
        )
        return side_by_side([self.stock.frames, self.patched.frames], labels)

    def summary(self) -> dict[str, Any]:
        """Plain JSON types; PSNR is null for a frame without any difference."""
        return {
            "psnr_db": [float(value) if np.isfinite(value) else None for value in self.psnr],
            "speedup": self.speedup,
            "stock_timings": asdict(self.stock.timings),
        }

    def __str__(self) -> str:
        lines = (
            f"  stock diffusers: {self.stock.timings}",
            f"  vidaccel: {self.patched.timings}",
            f"  PSNR: mean {_decibels(self.psnr.mean())}, min {_decibels(self.psnr.min())}",
            f"  verdict: {self.speedup:.2f}x as fast, {self._verdict()}",
        )
        return "\n".join(lines)

    def _verdict(self) -> str:
        worst = self.psnr.min()
        if np.isposinf(worst):
            return "the same clip, bit for bit"
        if worst >= _ONE_LEVEL_DB:
            return "the same clip; no frame is as much as one of 256 levels off (rms)"
        return "not the same to the last level; `vidaccel validate` tells rounding from error"


def _decibels(value: float) -> str:
    return "identical" if np.isposinf(value) else f"{value:.1f} dB"
