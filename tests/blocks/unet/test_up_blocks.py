"""Up-blocks whose skip connections are not concatenated, against the originals, and when they are concatenated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from block_checks import all_fused, frozen, fused, relative_error
from copy_checks import Copies
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_3d_blocks import (
    CrossAttnUpBlock3D,
    CrossAttnUpBlockSpatioTemporal,
    UpBlock3D,
    UpBlockSpatioTemporal,
)
from diffusers.models.unets.unet_motion_model import CrossAttnUpBlockMotion, UpBlockMotion
from kernel_checks import planted
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from vidaccel.blocks.unet.resnet import FusedResnetBlock2D, FusedSpatioTemporalResBlock, Joined
from vidaccel.blocks.unet.unet_3d_blocks import (
    FusedCrossAttnUpBlock3D,
    FusedCrossAttnUpBlockSpatioTemporal,
    FusedUpBlock3D,
    FusedUpBlockSpatioTemporal,
)
from vidaccel.blocks.unet.unet_motion_model import FusedCrossAttnUpBlockMotion, FusedUpBlockMotion
from vidaccel.kernels.conv.joined_projection import JOINED_PROJECTION
from vidaccel.sites.block import SITES, FusedBlock
from vidaccel.sites.site import Site

FRAMES, SIDE, CONTEXT = 2, 4, 32
WIDTH, NARROW = 64, 32  # of the block, and of its last skip connection


class Kind(NamedTuple):
    """How to make a block of its kind, and what its call takes beside the tensors that all of them do."""

    fused: type[FusedBlock]
    options: dict[str, Any]
    arguments: dict[str, Any]


_TEXT = torch.randn(FRAMES, 3, CONTEXT, generator=torch.Generator().manual_seed(1))
_SVD = {"image_only_indicator": torch.zeros(1, FRAMES)}
_FRAMES = {"num_frames": FRAMES}
_GROUPS = {"resnet_groups": 2}  # interpreted kernels take one after the other
_MOTION = _GROUPS | {"temporal_num_attention_heads": 2}
_ATTENTION = {"num_attention_heads": 2, "cross_attention_dim": CONTEXT}
KINDS = {
    UpBlockSpatioTemporal: Kind(FusedUpBlockSpatioTemporal, {}, _SVD),
    CrossAttnUpBlockSpatioTemporal: Kind(
        FusedCrossAttnUpBlockSpatioTemporal, _ATTENTION, _SVD | {"encoder_hidden_states": _TEXT[:, :1]}
    ),
    UpBlock3D: Kind(FusedUpBlock3D, _GROUPS, _FRAMES),
    CrossAttnUpBlock3D: Kind(FusedCrossAttnUpBlock3D, _GROUPS | _ATTENTION, _FRAMES | {"encoder_hidden_states": _TEXT}),
    UpBlockMotion: Kind(FusedUpBlockMotion, _MOTION, _FRAMES),
    CrossAttnUpBlockMotion: Kind(
        FusedCrossAttnUpBlockMotion, _MOTION | _ATTENTION, _FRAMES | {"encoder_hidden_states": _TEXT}
    ),
}
ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@pytest.fixture(autouse=True)
def norm_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a second for one; it runs in test_every_block.py, and where numbers are compared here."""
    monkeypatch.setenv("VIDACCEL_IMPL", "group_norm_silu=torch")


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU float32 convolutions would use it, and matrix products not."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    widths = {"in_channels": NARROW, "out_channels": WIDTH, "prev_output_channel": WIDTH, "temb_channels": 16}
    return frozen(kind(**widths, num_layers=2, **KINDS[kind].options))


RESNETS = FusedResnetBlock2D, FusedSpatioTemporalResBlock


@contextmanager
def patched(block: nn.Module) -> Iterator[Site]:
    with all_fused(block, *RESNETS), fused(block, KINDS[type(block)].fused) as sites:
        yield sites["skip_concat"]


def inputs(block: nn.Module, side: int = SIDE) -> dict[str, Any]:
    """What ``block`` is called with, channels-last; the same numbers for every dtype and device."""
    generator, like = torch.Generator().manual_seed(0), next(block.parameters())

    def draw(channels: int) -> Tensor:
        x = torch.randn(FRAMES, channels, side, side, generator=generator)
        return x.to(like).contiguous(memory_format=torch.channels_last)

    # the last is the first block's
    tensors = {"hidden_states": draw(WIDTH), "temb": torch.randn(FRAMES, 16, generator=generator).to(like)}
    skips = {"res_hidden_states_tuple": (draw(NARROW), draw(WIDTH))}
    kind = KINDS[getattr(type(block), "original", type(block))]
    others = {name: x.to(like) if isinstance(x, Tensor) else x for name, x in kind.arguments.items()}
    return tensors | skips | others


@torch.no_grad()
def call(block: nn.Module, **changes: Any) -> Tensor:
    return block(**inputs(block) | changes)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@ALL_KINDS
def test_equals_the_original(
    kind: type[nn.Module], impl: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    if impl == "triton" and device.type == "cpu" and "SpatioTemporal" in kind.__name__:
        pytest.skip("its norms have 32 groups, which the interpreter takes one by one; test_every_block.py has one")
    monkeypatch.setenv("VIDACCEL_IMPL", impl)
    block = make(kind).to(device if impl == "triton" else "cpu")
    expected = call(block)
    with patched(block) as site:
        out = call(block)
        arguments = inputs(block)
        before = copy.deepcopy(arguments)
        with torch.no_grad(), Copies(smallest=FRAMES * NARROW * SIDE**2) as copies:
            assert torch.equal(block(**arguments), out)
        twin = copy.deepcopy(block)
    assert relative_error(out, expected) <= 1e-5
    assert torch.equal(call(block), expected)
    assert torch.equal(call(twin), expected)
    pairs = zip(arguments["res_hidden_states_tuple"], before["res_hidden_states_tuple"], strict=True)
    assert all(torch.equal(one, other) and type(one) is Tensor for one, other in pairs)
    assert torch.equal(arguments["hidden_states"], before["hidden_states"])
    assert not site.fallbacks and site.implementation == ("torch" if impl == "torch" else "in place")
    joined = [found for found in copies.found if found.startswith("cat ")]
    assert len(joined) == (2 if impl == "torch" else 0), joined


@ALL_KINDS
def test_in_float64(kind: type[nn.Module]) -> None:
    block = make(kind).double()
    expected = call(block)
    with patched(block) as site:
        assert relative_error(call(block), expected) <= 1e-13
    assert not site.reason


@pytest.fixture
def resnet(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return frozen(ResnetBlock2D(in_channels=96, out_channels=64, temb_channels=16, groups=2)).to(device)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        # the interpreter is wrong about its sums
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("size", "order"),
    [((5, 3), torch.channels_last), ((4, 4), torch.contiguous_format), ((1, 1), torch.channels_last)],
    ids=["odd-pixels", "contiguous", "one-pixel"],
)
@torch.no_grad()
def test_a_resnet_block_is_as_exact_as_eager(
    resnet: nn.Module,
    dtype: torch.dtype,
    size: tuple[int, int],
    order: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "")
    resnet = resnet.to(dtype)
    images = (torch.randn(2, channels, *size, device=device, dtype=dtype) for channels in (64, 32))
    x, skip = (image.contiguous(memory_format=order) for image in images)
    temb, joined = torch.randn(2, 16, device=device, dtype=dtype), torch.cat([x, skip], dim=1)
    gold = copy.deepcopy(resnet).double()(joined.double(), temb.double())
    eager = resnet(joined, temb)
    with fused(resnet, FusedResnetBlock2D) as sites:
        out = resnet(Joined(x, skip), temb)
        assert torch.equal(resnet(Joined(x, skip), temb), out)
    assert not any(site.fallbacks or site.reason for site in sites.values())
    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == dtype
    bound = 2 * (eager - gold).abs().max() + torch.finfo(dtype).eps * gold.abs().max()
    assert (out - gold).abs().max() <= bound


FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}


@pytest.mark.parametrize(
    "kind", [UpBlock3D, CrossAttnUpBlock3D, UpBlockMotion, CrossAttnUpBlockMotion], ids=lambda kind: kind.__name__
)
def test_freeu_goes_the_original_way(kind: type[nn.Module]) -> None:
    block = make(kind)
    block.resolution_idx = 0
    plain = call(block)
    with patched(block) as site:
        assert relative_error(call(block), plain) <= 1e-5
        for name, factor in FREEU.items():
            setattr(block, name, factor)
        out = call(block)
        assert dict(site.fallbacks) == {"FreeU is on, which changes what is concatenated": 1}
        block.s1 = None  # as disable_freeu() does
        assert relative_error(call(block), plain) <= 1e-5
        block.s1 = FREEU["s1"]
    assert relative_error(out, call(block)) <= 1e-5
    assert relative_error(out, plain) > 1e-3
    assert sum(site.fallbacks.values()) == 1


def test_gradients_go_the_original_way() -> None:
    block, arguments = make(UpBlockMotion), inputs(make(UpBlockMotion))
    skip = arguments["res_hidden_states_tuple"][0].requires_grad_(True)
    with patched(block) as site:
        block(**arguments).sum().backward()
    assert skip.grad is not None and skip.grad.any()
    assert [reason.partition(" (")[0] for reason in site.fallbacks] == ["gradients are being recorded"]


def test_autocast_goes_the_original_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "group_norm_silu=torch,conv_epilogue=torch")  # bfloat16, see above
    block = make(UpBlockMotion)
    with torch.autocast("cpu", torch.bfloat16):
        expected = call(block)
        with patched(block) as site:
            assert relative_error(call(block).float(), expected.float()) <= 1e-2
    assert dict(site.fallbacks) == {"autocast chooses the dtypes of matrix products": 1}


@pytest.mark.parametrize("kind", [UpBlockSpatioTemporal, UpBlockMotion], ids=lambda kind: kind.__name__)
def test_a_shortcut_with_lora_gets_them_concatenated(kind: type[nn.Module]) -> None:
    block = make(kind)
    plain = call(block)
    with patched(block) as site:
        target = r"resnets\.1\..*conv_shortcut|resnets\.1\.conv_shortcut"
        inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, target_modules=target), block)
        block.requires_grad_(False)
        out = call(block)
    assert relative_error(out, call(block)) <= 1e-5
    assert relative_error(out, plain) > 1e-3
    assert dict(site.fallbacks) == {"a Conv2d was replaced by Conv2d of peft": 1}
    assert "in place" in site.implementations, "the other"


def watch_shortcut(resnet: Any) -> None:
    resnet.conv_shortcut.register_forward_hook(lambda *_: None)


def watch_resnet(resnet: Any) -> None:
    resnet.register_forward_hook(lambda *_: None)


def offload_shortcut(resnet: Any) -> None:
    resnet.conv_shortcut.forward = partial(resnet.conv_shortcut.forward)


def offload_resnet(resnet: Any) -> None:
    resnet.forward = partial(resnet.forward)


def replace_norm(resnet: Any) -> None:
    resnet.norm1 = nn.Identity()


def widen_shortcut(resnet: Any) -> None:
    resnet.conv_shortcut = frozen(nn.Conv2d(resnet.in_channels, resnet.out_channels, 3, padding=1))


def drop_bias(resnet: Any) -> None:
    resnet.conv_shortcut.bias = None


def never_fuse(resnet: Any) -> None:
    resnet.__class__ = type("ResnetBlock2D", (ResnetBlock2D,), {})


CALLED = "its ResNet block is not fused, or has to be called"
CHANGES = [
    (watch_shortcut, "a Conv2d has forward hooks, which only a call of it runs"),
    (watch_resnet, CALLED),
    (offload_shortcut, "a hook replaced the forward of a Conv2d (offload, casting or cache)"),
    (offload_resnet, CALLED),
    (replace_norm, CALLED),
    (widen_shortcut, "the convolution on its residual is not a 1x1 one"),
    (drop_bias, "a Conv2d has no plain bias"),
    (never_fuse, "its ResNet block is not fused"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_a_changed_resnet_block_gets_them_concatenated(change: Callable[[nn.Module], None], reason: str) -> None:
    block = make(UpBlockMotion)
    with patched(block) as site:
        change(block.resnets[0])
        out = call(block)
    vars(block.resnets[0]).pop("forward", None)  # that of the fused class
    assert dict(site.fallbacks) == {reason: 1}
    assert relative_error(out, call(block)) <= 1e-5
    assert "in place" in site.implementations, "the other"


def test_hooks_of_a_spatio_temporal_block_see_a_tensor() -> None:
    block, seen = make(UpBlockSpatioTemporal), []
    with patched(block) as site:
        block.resnets[0].register_forward_pre_hook(lambda _, args: seen.append(type(args[0])))
        call(block)
    assert seen == [Tensor]
    assert dict(site.fallbacks) == {"a SpatioTemporalResBlock has forward hooks, which only a call of it runs": 1}


def test_nothing_is_gained_without_fused_resnet_blocks() -> None:
    block = make(UpBlockSpatioTemporal)
    expected = call(block)
    with fused(block, FusedUpBlockSpatioTemporal) as sites:
        assert torch.equal(call(block), expected)
    assert dict(sites["skip_concat"].fallbacks) == {"its ResNet block is not fused": 2}


@pytest.mark.parametrize(
    ("ops", "reason"),
    [
        (["group_norm_silu"], "its ResNet block adds its biases in convolutions"),
        (["conv_epilogue"], "the first norm of its ResNet block is not fused"),
    ],
)
def test_a_resnet_block_needs_both_its_ops(ops: list[str], reason: str) -> None:
    block = make(UpBlock3D)
    expected = call(block)
    with ExitStack() as stack:
        for resnet in block.resnets:
            stack.enter_context(fused(resnet, FusedResnetBlock2D, ops))
        sites = stack.enter_context(fused(block, FusedUpBlock3D))
        assert relative_error(call(block), expected) <= 1e-5
    assert dict(sites["skip_concat"].fallbacks) == {reason: 2}


@pytest.mark.parametrize("kind", [UpBlockSpatioTemporal, UpBlockMotion], ids=lambda kind: kind.__name__)
def test_a_wrong_product_is_found(kind: type[nn.Module]) -> None:
    block = make(kind)
    expected = call(block)
    with planted(JOINED_PROJECTION, "in place", lambda out: out.mul_(1.01)), patched(block) as site:
        assert relative_error(call(block), expected) <= 1e-5
        assert not site.fallbacks
        assert relative_error(call(block), expected) <= 1e-5
    assert dict(site.fallbacks) == {CALLED: 2}


@ALL_KINDS
def test_what_the_fused_code_swaps_is_found(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    block, fused_class = make(kind), KINDS[kind].fused
    changes = {"res_hidden_states_tuple": tuple(inputs(block)["res_hidden_states_tuple"][1:] * 2)}  # of one width
    block.resnets[1] = copy.deepcopy(block.resnets[0])
    other = changes["res_hidden_states_tuple"][0] * 2
    changes["res_hidden_states_tuple"] = (changes["res_hidden_states_tuple"][0], other)
    expected, right = call(block, **changes), fused_class.fused_forward

    def swapping(self: Any, x: Tensor, skips: tuple[Tensor, ...], *args: Any) -> Tensor:
        return right(self, x, skips[::-1], *args)

    monkeypatch.setattr(fused_class, "fused_forward", swapping)
    with fused(block, fused_class) as sites:
        assert torch.equal(call(block, **changes), expected)
    assert "differs from the original" in sites["skip_concat"].reason


def test_upsampling_to_another_size() -> None:
    block = make(CrossAttnUpBlockMotion)
    expected = call(block, upsample_size=(7, 9))
    with patched(block) as site:
        assert relative_error(call(block, upsample_size=(7, 9)), expected) <= 1e-5
    assert expected.shape[2:] == (7, 9) and not site.fallbacks


def test_a_deprecated_scale_is_ignored_as_before() -> None:
    block = make(UpBlockMotion)
    expected = call(block)
    with patched(block) as site:
        with pytest.warns(FutureWarning, match="`scale` argument is deprecated"):
            out = call(block, scale=0.5)
        assert relative_error(out, expected) <= 1e-5
    assert dict(site.fallbacks) == {"deprecated arguments were passed": 1}


def test_other_skips_do_as_before() -> None:
    block = make(UpBlock3D)
    first, second = inputs(block)["res_hidden_states_tuple"]
    expected = call(block, res_hidden_states_tuple=(second, first, second))
    with patched(block):
        assert relative_error(call(block, res_hidden_states_tuple=(second, first, second)), expected) <= 1e-5
        with pytest.raises(IndexError):
            call(block, res_hidden_states_tuple=(second,))
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            call(block, res_hidden_states_tuple=(first, second[..., 1:]))


@ALL_KINDS
def test_too_few_skips_are_the_original_error(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a ControlNet of another model gives residuals; not only where a check runs the original block."""
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    block = make(kind)
    with patched(block) as site:
        getattr(block, SITES).checks = False
        with pytest.raises(IndexError):
            call(block, res_hidden_states_tuple=inputs(block)["res_hidden_states_tuple"][1:])
    assert dict(site.fallbacks) == {"there are fewer skip connections than ResNet blocks": 1}


@ALL_KINDS
@pytest.mark.slow
def test_compiles_in_one_graph(kind: type[nn.Module], device: torch.device) -> None:
    block = make(kind).to(device)
    expected = call(block)
    with patched(block), torch.no_grad():
        out = torch.compile(block, fullgraph=True, backend="eager")(**inputs(block))
    assert relative_error(out, expected) <= 1e-5


@torch.no_grad()
def test_a_resnet_block_compiled_alone_takes_them_apart(resnet: nn.Module, device: torch.device) -> None:
    x, skip = (torch.randn(3, channels, 4, 4, device=device) for channels in (64, 32))
    temb = torch.randn(3, 16, device=device)
    expected = resnet(torch.cat([x, skip], dim=1), temb)
    with fused(resnet, FusedResnetBlock2D):
        out = torch.compile(resnet, fullgraph=True, backend="aot_eager")(Joined(x, skip), temb)
    assert relative_error(out, expected) <= 1e-5


@pytest.mark.gpu
def test_tf32_in_convolutions_only_is_faster(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    block = make(UpBlockMotion).to(device)
    with patched(block) as site:
        call(block)
    assert site.implementation == "torch" and not site.fallbacks


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@ALL_KINDS
@torch.no_grad()
def test_on_a_gpu(
    kind: type[nn.Module], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """The same within the dtype's rounding, in no more memory than with the ResNet blocks fused alone."""
    monkeypatch.setenv("VIDACCEL_IMPL", "")
    block = make(kind).to(device, dtype)
    arguments = inputs(block, side=128)
    expected = block(**arguments)

    def call_and_peak() -> tuple[Tensor, int]:
        block(**arguments)  # the first checks itself
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        return block(**arguments), torch.cuda.max_memory_allocated() - held

    with patched(block) as site:
        out, peak = call_and_peak()
    assert not site.fallbacks and site.implementation == "in place"
    with all_fused(block, *RESNETS):
        _, peak_concatenated = call_and_peak()
    assert relative_error(out, expected) <= 8 * torch.finfo(dtype).eps
    assert peak <= peak_concatenated
