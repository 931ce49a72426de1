"""The tokens of a video transformer over ranks: from its first block to its last one, each rank has its share.

What comes before and behind the blocks is small, and every rank does all of it. A block whose original forward runs
instead gets all tokens, and keeps its share of what that returns: slower, and right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vidaccel.parallel.layout import Tokens, spread
from vidaccel.parallel.ranks import Ranks
from vidaccel.sites.block import FusedBlock

__all__ = ["Sequence"]


class Sequence:
    """How the tokens of one class of transformers are spread.

    Args:
        lists: The names of the lists that its blocks are in, in their order.
        heads: What its configuration calls the numbers of heads of the attentions that ranks share.
    """

    axis = "sequence"

    def __init__(self, *lists: str, heads: tuple[str, ...] = ("num_attention_heads",)) -> None:
        self._lists, self._heads = lists, heads

    def reason(self, model: Any, size: int) -> str | None:
        """Why ``model`` cannot be spread over ``size`` ranks, or None."""
        for heads in (model.config[name] for name in self._heads):
            if heads % size:
                return f"its {heads} heads do not divide by {size}"
        return None

    def way(self, ranks: Ranks, count: Callable[[str], None]) -> _Way:
        return _Way(self._lists, ranks, count)


class _Way:
    def __init__(self, lists: tuple[str, ...], ranks: Ranks, count: Callable[[str], None]) -> None:
        self._lists, self._ranks, self._count = lists, ranks, count

    def call(self, run: Callable[..., Any], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        blocks: list[nn.Module] = [block for name in self._lists for block in getattr(model, name)]
        if reason := _whole_reason(model, blocks):
            self._count(reason)
            return run(*args, **kwargs)
        with spread(Tokens(self._ranks, blocks, self._count)):
            return run(*args, **kwargs)


def _whole_reason(model: Any, blocks: list[nn.Module]) -> str | None:
    """Why every rank runs a call on all tokens, or None."""
    if getattr(model, "is_cache_enabled", False):
        return "a step cache is on, which looks at the tokens between blocks"
    if not all(isinstance(block, FusedBlock) for block in blocks):
        return "a block is not patched"
    if any(block._forward_hooks or block._forward_pre_hooks or "forward" in vars(block) for block in blocks):
        return "a block has a hook, which may look at its tokens"
    return None
