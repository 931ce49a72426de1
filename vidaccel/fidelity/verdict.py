"""Are two clips the same clip, and by which rule.

The rule is a floor under the PSNR of the worst frame. It cannot be one number: two correct implementations of the same
maths round at different places, and a diffusion loop feeds every difference back into itself. In float32 that leaves a
clip above 60 dB, where 8-bit frames are all but equal. In float16 and bfloat16 two correct implementations can be 25 to
35 dB apart after a whole clip, so a higher floor would fail good kernels; what passes at 25 dB is the same scene with
the same motion, no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vidaccel.fidelity.metrics import psnr, ssim

__all__ = ["DEFAULT_MIN_PSNR_DB", "Verdict", "judge"]

DEFAULT_MIN_PSNR_DB = {torch.float32: 60.0, torch.float16: 25.0, torch.bfloat16: 25.0}


@dataclass(frozen=True)
class Verdict:
    """What the comparison of two clips gave; ``psnr`` and ``ssim`` are ``[F]``, one value a frame."""

    psnr: np.ndarray
    ssim: np.ndarray
    bit_identical: bool
    min_psnr_db: float

    @property
    def passed(self) -> bool:
        """Whether the worst frame reaches the floor; a frame that is not finite never does."""
        return bool(self.psnr.min() >= self.min_psnr_db)

    @property
    def mean_psnr(self) -> float:
        """Over the frames that differ at all: equal ones have no finite PSNR."""
        differing = self.psnr[self.psnr != np.inf]
        return float(differing.mean()) if differing.size else float("inf")

    def summary(self) -> dict[str, Any]:
        """The verdict as plain types, ready for a record."""
        return {
            "passed": self.passed,
            "bit_identical": self.bit_identical,
            "min_psnr_db": self.min_psnr_db,
            "psnr_db": {
                "mean": self.mean_psnr,
                "minimum": float(self.psnr.min()),
                "worst_frame": int(self.psnr.argmin()),
                "frames": self.psnr.tolist(),
            },
            "ssim": {"mean": float(self.ssim.mean()), "minimum": float(self.ssim.min()), "frames": self.ssim.tolist()},
        }

    def __str__(self) -> str:
        if self.bit_identical:
            return "bit-identical: every value of every frame is equal\nPASS"
        comparison = "at least" if self.passed else "not at least"
        return "\n".join(
            (
                f"PSNR  mean {self.mean_psnr:.2f} dB, minimum {self.psnr.min():.2f} dB (frame {self.psnr.argmin()})",
                f"SSIM  mean {self.ssim.mean():.6f}, minimum {self.ssim.min():.6f} (frame {self.ssim.argmin()})",
                f"{'PASS' if self.passed else 'FAIL'}: the worst frame has {comparison} {self.min_psnr_db:g} dB",
            )
        )


def judge(stock: np.ndarray, patched: np.ndarray, min_psnr_db: float) -> Verdict:
    """Compare two clips ``[F, H, W, C]`` in 0..1.

    Raises:
        ValueError: they differ in shape, or are too small for SSIM's window.
    """
    identical = stock.shape == patched.shape and np.array_equal(stock, patched)
    return Verdict(psnr(stock, patched), ssim(stock, patched), identical, min_psnr_db)
