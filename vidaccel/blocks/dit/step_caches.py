"""diffusers' step caches (FirstBlockCache, MagCache, layer skipping ...) look a block up by its class."""

from __future__ import annotations

import copy
from typing import TypeVar

from diffusers.hooks._helpers import TransformerBlockRegistry

from vidaccel.sites.block import FusedBlock

__all__ = ["known_to_step_caches"]

Block = TypeVar("Block", bound="type[FusedBlock]")


def known_to_step_caches(fused: Block) -> Block:
    """Class decorator, above ``@fuses``: what the caches know of the original class, they know of this one."""
    try:
        known = TransformerBlockRegistry.get(fused.original)
    except ValueError:  # they do not know the original either
        return fused
    TransformerBlockRegistry.register(fused, copy.copy(known))
    return fused
