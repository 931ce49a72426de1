"""Rotary tables: diffusers' hold every angle twice, ours once."""

from __future__ import annotations

from torch import Tensor

from vidaccel.sites.memo import once_in_call

__all__ = ["half_tables"]


def half_tables(rotary_emb: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Tables of cosines and sines ``[..., D]``, every angle twice, as ``[..., D/2]``; made once in a call."""
    cos, sin = rotary_emb
    return (
        once_in_call("cos", cos, lambda: cos[..., 0::2].contiguous()),
        once_in_call("sin", sin, lambda: sin[..., 1::2].contiguous()),
    )
