"""What a family adapter is made of: rules that say which modules of a model are patched, how, and how it is undone.

A rule never changes a top-level model's class, and what it leaves behind on a module is one :class:`Patch` in the
instance's dictionary: no parameter, no buffer, and no hook but those of ``TextSource``. So a patched model deep-copies,
saves and loads like an unpatched one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from vidaccel.blocks.unet.attention_processor import FusedAttnProcessor2_0, why_attention_left_alone
from vidaccel.blocks.unet.normalization import FusedGroupNormSiLU, PassThroughSiLU
from vidaccel.blocks.unet.projections import QKV_PROJECTION
from vidaccel.sites.parameters import has_hook
from vidaccel.sites.site import BlockState, Fidelity, FusedBlock, Site

__all__ = ["ChannelsLastWeights", "NormOut", "Patch", "Processor", "Rule", "Swap", "patches_of"]

HOOKED = "a hook replaced its forward (offload, casting or cache): patch before turning that on"


@dataclass(eq=False)
class Patch:
    """One rule applied to one module: the sites it made, and what undoing it needs."""

    rule: Rule
    sites: list[Site]
    memo: Any = None


def patches_of(module: nn.Module) -> list[Patch]:
    """The patches on this very module (not its children), in the order they were applied."""
    patches: list[Patch] = module.__dict__.setdefault("_vidaccel_patches", [])
    return patches


class Rule:
    """Base of all rules. ``ops`` names the ops that a match is a site of, with their fidelity class."""

    @property
    def ops(self) -> dict[str, Fidelity]:
        raise NotImplementedError

    def matches(self, path: str, module: Any) -> bool:
        raise NotImplementedError

    def site_path(self, path: str) -> str:
        """The path that the site is listed under."""
        return path

    def why_left_alone(self, module: Any) -> str | None:
        return HOOKED if has_hook(module) else None

    def apply(self, module: Any, sites: list[Site], self_check: bool) -> Any:
        """Change the module; what is returned is handed to :meth:`undo`."""
        raise NotImplementedError

    def undo(self, module: Any, memo: Any) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Swap(Rule):
    """Give modules of exactly ``fused.original`` the fused class; with ``names``, only those their parent calls so."""

    fused: type[FusedBlock]
    names: tuple[str, ...] = ()

    @property
    def ops(self) -> dict[str, Fidelity]:
        return self.fused.ops

    def matches(self, path: str, module: Any) -> bool:
        named = not self.names or path.rpartition(".")[2] in self.names
        return named and type(module) is self.fused.original and self.fused.stands_for(module)

    def why_left_alone(self, module: Any) -> str | None:
        return super().why_left_alone(module) or self.fused.why_left_alone(module)

    def apply(self, module: Any, sites: list[Site], self_check: bool) -> None:
        module._vidaccel = BlockState(sites, self_check)
        module.__class__ = self.fused

    def undo(self, module: Any, memo: None) -> None:
        module.__class__ = self.fused.original
        del module._vidaccel


@dataclass(frozen=True)
class NormOut(Rule):
    """A model's last GroupNorm and the SiLU after it, which the model holds as ``conv_norm_out`` and ``conv_act``."""

    owner: type[nn.Module]

    @property
    def ops(self) -> dict[str, Fidelity]:
        return FusedGroupNormSiLU.ops

    def matches(self, path: str, module: Any) -> bool:
        # the owner itself may have been fused by an earlier patch of narrower choice
        stock = getattr(type(module), "original", type(module))
        return stock is self.owner and type(module.conv_norm_out) is nn.GroupNorm

    def site_path(self, path: str) -> str:
        return f"{path}.conv_norm_out".lstrip(".")

    def why_left_alone(self, module: Any) -> str | None:
        norm = module.conv_norm_out
        return (
            super().why_left_alone(norm)
            or FusedGroupNormSiLU.why_left_alone(norm)
            or PassThroughSiLU.why_left_alone(module.conv_act)
        )

    def apply(self, module: Any, sites: list[Site], self_check: bool) -> None:
        module.conv_norm_out._vidaccel = BlockState(sites, self_check)
        module.conv_norm_out.__class__ = FusedGroupNormSiLU
        module.conv_act.__class__ = PassThroughSiLU

    def undo(self, module: Any, memo: None) -> None:
        module.conv_norm_out.__class__ = nn.GroupNorm
        module.conv_act.__class__ = nn.SiLU
        del module.conv_norm_out._vidaccel


@dataclass(frozen=True)
class Processor(Rule):
    """Give stock attention the processor that runs the fastest kernel, and does not divide by 1.0."""

    @property
    def ops(self) -> dict[str, Fidelity]:
        return {"spatial_attention": "math-exact", QKV_PROJECTION: "math-exact", "unit_division": "bit-exact"}

    def matches(self, path: str, module: Any) -> bool:
        return type(module) is Attention

    def why_left_alone(self, module: Any) -> str | None:
        return why_attention_left_alone(module)

    def apply(self, module: Any, sites: list[Site], self_check: bool) -> AttnProcessor2_0:
        original = module.processor
        module.processor = FusedAttnProcessor2_0(sites)
        for site in sites:
            if site.op == "unit_division":  # not there rather than run
                site.implementations.add("torch")
        return original

    def undo(self, module: Any, memo: AttnProcessor2_0) -> None:
        # the user may have put another processor in its place since; that one stays
        if type(module.processor) is FusedAttnProcessor2_0:
            module.processor = memo


@dataclass(frozen=True)
class ChannelsLastWeights(Rule):
    """Store a model's convolution weights channels-last: cuDNN then answers in that order, and reorders no weight.

    One site for the whole model. Weights that are not plain floating-point parameters here (quantised, offloaded) stay.
    """

    owner: type[nn.Module]

    @property
    def ops(self) -> dict[str, Fidelity]:
        return {"channels_last": "math-exact"}

    def matches(self, path: str, module: Any) -> bool:
        return type(module) is self.owner

    def why_left_alone(self, module: Any) -> str | None:
        return None if any(True for _ in _plain_convolutions(module)) else "it has no convolution with a plain weight"

    def apply(self, module: Any, sites: list[Site], self_check: bool) -> None:
        for convolution in _plain_convolutions(module):
            order = torch.channels_last_3d if isinstance(convolution, nn.Conv3d) else torch.channels_last
            convolution.weight.data = convolution.weight.data.contiguous(memory_format=order)
        for site in sites:
            site.implementations.add("torch")

    def undo(self, module: Any, memo: None) -> None:
        for convolution in _plain_convolutions(module):
            convolution.weight.data = convolution.weight.data.contiguous()


def _plain_convolutions(model: nn.Module) -> Iterator[nn.Conv2d | nn.Conv3d]:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            weight = module.weight
            if type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta:
                yield module
