"""Is the patched clip the same clip, and by which rule."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Verdict"]


@dataclass(frozen=True)
class Verdict:
    """What the rules said.

    Attributes:
        passed: Whether every rule holds.
        rule: The rule that decided, in a few words.
        reasons: One line for each rule that failed, with its figures; empty if ``passed``.
        margin_db: How far below the worst floor control the worst frame may be.
        allowed_db: What that comes to for this clip: the PSNR that the worst frame must reach; None where the clip is
            chaotic and the steps decide instead.
        min_psnr_db: The hard gate, or None.
        require_bit_exact: Whether one bit that differs fails the clip.
        chaotic: Whether equal maths gives another clip here, so that a clip tells nothing.
    """

    passed: bool
    rule: str
    reasons: tuple[str, ...]
    margin_db: float
    allowed_db: float | None
    min_psnr_db: float | None = None
    require_bit_exact: bool = False
    chaotic: bool = False
