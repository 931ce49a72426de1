"""What holds for every fused block: it does what the original does, whatever its children have become since."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from block_checks import all_fused, frozen, fused, relative_error, tensor_of
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward, TemporalBasicTransformerBlock
from diffusers.models.resnet import (
    AlphaBlender,
    ResnetBlock2D,
    SpatioTemporalResBlock,
    TemporalConvLayer,
    TemporalResnetBlock,
)
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel, TransformerTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from diffusers.models.upsampling import Upsample2D
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from vidaccel.blocks.unet.activations import FusedGEGLU
from vidaccel.blocks.unet.attention import (
    FusedBasicTransformerBlock,
    FusedTemporalBasicTransformerBlock,
    FusedTextTransformerBlock,
)
from vidaccel.blocks.unet.convolution import FusedFewChannelConv2d
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.blocks.unet.resnet import (
    FusedAlphaBlender,
    FusedResnetBlock2D,
    FusedSpatioTemporalResBlock,
    FusedTemporalConvLayer,
    FusedTemporalResnetBlock,
)
from vidaccel.blocks.unet.transformer_2d import FusedTransformer2DModel
from vidaccel.blocks.unet.transformer_temporal import FusedTransformerSpatioTemporalModel, FusedTransformerTemporalModel
from vidaccel.blocks.unet.unet_motion_model import FusedAnimateDiffTransformer3D
from vidaccel.blocks.unet.upsampling import FusedUpsample2D
from vidaccel.sites.block import FusedBlock
from vidaccel.sites.rules import Swap

CLIPS, FRAMES, HEIGHT, WIDTH = 1, 3, 3, 5
C, TEXT = 32, 24


class Case(NamedTuple):
    """A block, the shapes of the tensors it is called with, what else it is called with, and what is fused below it."""

    fused: type[FusedBlock]
    make: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    options: Mapping[str, Any] = MappingProxyType({})
    below: tuple[type[FusedBlock], ...] = ()


N = CLIPS * FRAMES
IMAGE, CLIP, ROWS = (N, C, HEIGHT, WIDTH), (CLIPS, C, FRAMES, HEIGHT, WIDTH), (N, HEIGHT * WIDTH, C)
FRAME_COUNT = {"num_frames": FRAMES}
IMAGES_MIXED = {"image_only_indicator": torch.tensor([[0.0, 1.0, 0.0]])}
ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 16}
RESNETS = (FusedResnetBlock2D, FusedTemporalResnetBlock, FusedAlphaBlender)
SVD_BLOCKS = (FusedBasicTransformerBlock, FusedTemporalBasicTransformerBlock, FusedAlphaBlender)
LAYERS = (FusedGroupNorm, FusedGEGLU)

CASES = {
    "geglu": Case(FusedGEGLU, lambda: GEGLU(C, 48), (ROWS,)),
    "group-norm": Case(FusedGroupNorm, lambda: nn.GroupNorm(4, C), (IMAGE,)),
    "few-channels": Case(FusedFewChannelConv2d, lambda: nn.Conv2d(3, C, 3, padding=1), ((N, 3, HEIGHT, WIDTH),)),
    "upsample": Case(FusedUpsample2D, lambda: Upsample2D(C, use_conv=True), (IMAGE,)),
    "alpha-blend": Case(
        FusedAlphaBlender, lambda: AlphaBlender(0.7, "learned_with_images"), (CLIP, CLIP), IMAGES_MIXED
    ),
    "resnet": Case(
        FusedResnetBlock2D,
        lambda: ResnetBlock2D(in_channels=C, out_channels=64, temb_channels=16, groups=4),
        (IMAGE, (N, 16)),
    ),
    "temporal-resnet": Case(
        FusedTemporalResnetBlock, lambda: TemporalResnetBlock(C, C, temb_channels=16), (CLIP, (CLIPS, FRAMES, 16))
    ),
    "spatio-temporal-resnet": Case(
        FusedSpatioTemporalResBlock,
        lambda: SpatioTemporalResBlock(C, C, temb_channels=16, merge_factor=0.7),
        (IMAGE, (N, 16)),
        IMAGES_MIXED,
        RESNETS,
    ),
    "temporal-convolutions": Case(
        FusedTemporalConvLayer, lambda: TemporalConvLayer(C, norm_num_groups=4), (IMAGE,), FRAME_COUNT
    ),
    "one-token-block": Case(
        FusedBasicTransformerBlock, lambda: BasicTransformerBlock(C, 2, 16, cross_attention_dim=TEXT), (ROWS,),
        {"encoder_hidden_states": (N, 1, TEXT)}, LAYERS,
    ),
    "text-block": Case(
        FusedTextTransformerBlock, lambda: BasicTransformerBlock(C, 2, 16, cross_attention_dim=TEXT), (ROWS,),
        {"encoder_hidden_states": (N, 7, TEXT)}, LAYERS,
    ),
    "temporal-block": Case(
        FusedTemporalBasicTransformerBlock, lambda: TemporalBasicTransformerBlock(C, C, 2, 16, TEXT), (ROWS,),
        FRAME_COUNT | {"encoder_hidden_states": (CLIPS * HEIGHT * WIDTH, 1, TEXT)}, LAYERS,
    ),
    "temporal-block-with-a-text": Case(
        FusedTemporalBasicTransformerBlock, lambda: TemporalBasicTransformerBlock(C, C, 2, 16, TEXT), (ROWS,),
        FRAME_COUNT | {"encoder_hidden_states": (CLIPS * HEIGHT * WIDTH, 4, TEXT)}, LAYERS,
    ),
    "spatial-transformer": Case(
        FusedTransformer2DModel,
        lambda: Transformer2DModel(in_channels=C, norm_num_groups=4, cross_attention_dim=TEXT, **ATTENTION),
        (IMAGE, (N, 7, TEXT)), {"return_dict": False}, (FusedTextTransformerBlock, *LAYERS),
    ),
    "spatio-temporal-transformer": Case(
        FusedTransformerSpatioTemporalModel,
        lambda: TransformerSpatioTemporalModel(in_channels=C, cross_attention_dim=TEXT, **ATTENTION),
        (IMAGE, (N, 1, TEXT)), IMAGES_MIXED | {"return_dict": False}, (*SVD_BLOCKS, *LAYERS),
    ),
    "frame-transformer": Case(
        FusedTransformerTemporalModel, lambda: TransformerTemporalModel(in_channels=C, norm_num_groups=4, **ATTENTION),
        (IMAGE,), FRAME_COUNT | {"return_dict": False}, LAYERS,
    ),
    "motion-module": Case(
        FusedAnimateDiffTransformer3D,
        lambda: AnimateDiffTransformer3D(
            in_channels=C, norm_num_groups=4, positional_embeddings="sinusoidal", num_positional_embeddings=17,
            **ATTENTION,
        ),
        (IMAGE,), FRAME_COUNT, LAYERS,
    ),
}  # fmt: skip
OVER_FRAMES = {
    name: case for name, case in CASES.items() if case.options.keys() & {"num_frames", "image_only_indicator"}
}
EVERY_BLOCK = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def plain_pytorch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch implementations, but for the tests of the kernels: interpreted they are slow."""
    if "device" not in request.fixturenames:
        monkeypatch.setenv("VIDACCEL_IMPL", "torch")


def make(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return frozen(case.make())


ORDERS = {4: torch.channels_last, 5: torch.channels_last_3d}


def draw(like: nn.Module, shape: tuple[int, ...], seed: int, orders: dict[int, torch.memory_format]) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(next(like.parameters()))
    return x.contiguous(memory_format=orders.get(x.ndim, torch.contiguous_format))


def call(case: Case, module: nn.Module, orders: dict[int, torch.memory_format] = ORDERS) -> Tensor:
    tensors = [draw(module, shape, seed, orders) for seed, shape in enumerate(case.inputs)]
    options = dict(case.options)
    for name, value in options.items():
        if isinstance(value, tuple):
            options[name] = draw(module, value, 9, orders)
        elif isinstance(value, Tensor):
            options[name] = value.to(tensors[0])
    return tensor_of(module(*tensors, **options))


@EVERY_BLOCK
@torch.no_grad()
def test_equals_the_original(case: Case) -> None:
    module = make(case)
    expected = call(case, module)
    with all_fused(module, case.fused, *case.below) as sites:
        out = call(case, module)
        assert torch.equal(call(case, module), out), "not the same without the check"
    assert relative_error(out, expected) <= 1e-5
    assert not any(site.fallbacks or site.reason for site in sites)
    assert torch.equal(call(case, module), expected)


@EVERY_BLOCK
@torch.no_grad()
def test_each_op_alone(case: Case) -> None:
    module = make(case)
    expected = call(case, module)
    for op in case.fused.ops:
        with fused(module, case.fused, [op]) as sites:
            assert relative_error(call(case, module), expected) <= 1e-5, op
        assert sites[op].implementations and not sites[op].reason and not sites[op].fallbacks


@EVERY_BLOCK
@torch.no_grad()
def test_with_the_kernels(case: Case, device: torch.device) -> None:
    """In float32: the interpreter is wrong about bfloat16."""
    module = make(case).to(device)
    for norm in module.modules():
        if isinstance(norm, nn.GroupNorm):
            norm.num_groups = 4  # the interpreter takes one after the other
    expected = call(case, module)
    with all_fused(module, case.fused, *case.below) as sites:
        assert relative_error(call(case, module), expected) <= 1e-5
    assert not any(site.fallbacks or site.reason for site in sites)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@EVERY_BLOCK
@torch.no_grad()
def test_on_a_gpu(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    module = make(case).to(device, dtype)
    gold, eager = call(case, copy.deepcopy(module).double()), call(case, module)
    with all_fused(module, case.fused, *case.below) as sites:
        out = call(case, module)
    assert (out - gold).norm() <= 2 * (eager - gold).norm() + torch.finfo(dtype).eps * gold.norm()
    assert not any(site.reason for site in sites)


@EVERY_BLOCK
@torch.no_grad()
def test_float64_runs_the_references(case: Case) -> None:
    module = make(case).double()
    expected = call(case, module)
    with all_fused(module, case.fused, *case.below) as sites:
        assert relative_error(call(case, module), expected) <= 1e-12
    assert not any(site.reason for site in sites)


@EVERY_BLOCK
def test_gradients_go_the_original_way(case: Case) -> None:
    module = make(case).requires_grad_(True)
    contiguous: dict[int, torch.memory_format] = {}  # the CPU's GroupNorm has no backward pass of the other order
    call(case, module, contiguous).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    with fused(module, case.fused) as sites:
        call(case, module, contiguous).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, expected[name]), name
    for site in sites.values():
        assert [reason.partition(" (")[0] for reason in site.fallbacks] == ["gradients are being recorded"]


@EVERY_BLOCK
@torch.no_grad()
def test_autocast(case: Case) -> None:
    module = make(case)
    with torch.autocast("cpu", torch.bfloat16):
        expected = call(case, module)
        with all_fused(module, case.fused, *case.below) as sites:
            out = call(case, module)
    assert (out.float() - expected.float()).norm() <= 2e-2 * expected.float().norm()
    assert not any(site.reason for site in sites)


@EVERY_BLOCK
@torch.no_grad()
def test_hooks_of_every_child_run_as_often_as_before(case: Case) -> None:
    module, ran = make(case), Counter[str]()
    for path, child in module.named_modules():
        if not path:
            continue
        ran.clear()
        hook = child.register_forward_hook(lambda _, __, out, path=path: ran.update([path]) or out * 1.25)
        expected, wanted = call(case, module), ran.copy()
        hook.remove()
        ran.clear()
        with all_fused(module, case.fused, *case.below):
            hook = child.register_forward_hook(lambda _, __, out, path=path: ran.update([path]) or out * 1.25)
            out = call(case, module)
            hook.remove()
        assert ran == wanted and relative_error(out, expected) <= 1e-5, path


def no_shift(module: Any) -> None:
    module.time_embedding_norm = "group"


def no_projection(module: Any) -> None:
    """What is passed is added as it is then."""
    module.time_emb_proj = None


@pytest.mark.parametrize("change", [no_shift, no_projection], ids=lambda change: change.__name__)
@torch.no_grad()
def test_a_resnets_other_ways_with_a_time_embedding(change: Callable[[Any], None]) -> None:
    module: Any = make(CASES["resnet"])
    with fused(module, FusedResnetBlock2D) as sites:
        change(module)
        given = (
            draw(module, IMAGE, 0, ORDERS),
            torch.randn(N, 16) if module.time_emb_proj else torch.randn(N, 64, HEIGHT, WIDTH),
        )
        out = module(*given)
    assert torch.equal(out, module(*given))
    assert not any(site.reason for site in sites.values())


@torch.no_grad()
def test_without_a_context_cross_attention_is_one_to_itself() -> None:
    module = frozen(TemporalBasicTransformerBlock(C, C, 2, 16, C))
    x = draw(module, ROWS, 0, {})
    expected = module(x, FRAMES)
    with fused(module, FusedTemporalBasicTransformerBlock) as sites:
        assert relative_error(module(x, FRAMES), expected) <= 1e-6
    assert not any(site.reason for site in sites.values())


@pytest.mark.parametrize(("name", "method"), [("geglu", "gelu"), ("alpha-blend", "get_alpha")])
@torch.no_grad()
def test_a_method_that_was_replaced_later_is_called(name: str, method: str) -> None:
    module = make(CASES[name])
    plain = call(CASES[name], module)
    with fused(module, CASES[name].fused):
        call(CASES[name], module)
        stock = getattr(module, method)
        setattr(module, method, lambda *args: stock(*args) / 2)
        out = call(CASES[name], module)
    assert relative_error(out, plain) > 1e-2
    assert torch.equal(out, call(CASES[name], module))


class Opaque(nn.Module):
    """Somebody's own layer: all that can be done with it is to call it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


@contextmanager
def opaque(module: nn.Module, path: str) -> Iterator[None]:
    layer = module.get_submodule(path)
    module.set_submodule(path, Opaque(layer))
    try:
        yield
    finally:
        module.set_submodule(path, layer)


@contextmanager
def fused_where_that_goes(case: Case, module: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for part in list(module.modules()):
            for kind in (case.fused, *case.below):
                if Swap(kind).matches("block", part) and Swap(kind).left_alone_reason(part) is None:
                    stack.enter_context(fused(part, kind))
        yield


@EVERY_BLOCK
@torch.no_grad()
def test_layers_of_which_nothing_is_known(case: Case) -> None:
    module = make(case)
    for path in [path for path, layer in module.named_modules() if path and not isinstance(layer, nn.ModuleList)]:
        try:
            with opaque(module, path):
                expected = call(case, module)
        except (AttributeError, TypeError):  # the original itself needs to know more of it
            continue
        with opaque(module, path), fused_where_that_goes(case, module):
            assert relative_error(call(case, module), expected) <= 1e-5, path
        with fused_where_that_goes(case, module), opaque(module, path):
            assert relative_error(call(case, module), expected) <= 1e-5, path


def called_with(case: Case, module: nn.Module, path: str) -> list[Any]:
    """What hooks on the layer at ``path`` see: its arguments and results, by shape."""
    seen: list[Any] = []
    layer = module.get_submodule(path)
    hook = layer.register_forward_hook(lambda _, *given: seen.append(given), with_kwargs=True)
    call(case, module)
    hook.remove()
    return tree_map(lambda x: x.shape if isinstance(x, Tensor) else x, seen)


@EVERY_BLOCK
@torch.no_grad()
def test_hooks_see_what_stock_code_shows_them(case: Case) -> None:
    """The same rows in the same order, by the same names: a hook may be about one frame, or one pixel."""
    module = make(case)
    layers = [path for path, layer in module.named_modules() if path and not isinstance(layer, nn.ModuleList)]
    expected = {path: called_with(case, module, path) for path in layers}
    with all_fused(module, case.fused, *case.below):
        for path in layers:
            assert called_with(case, module, path) == expected[path], path


class FramesApart(FeedForward):
    """A user's own: it tells frames apart, which stock code has in the second place."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states) * torch.arange(1, hidden_states.shape[1] + 1)[:, None]


@pytest.mark.parametrize("case", OVER_FRAMES.values(), ids=OVER_FRAMES)
@torch.no_grad()
def test_layers_that_tell_frames_apart_get_them_as_in_stock_code(case: Case) -> None:
    module = make(case)
    for layer in module.modules():
        if type(layer) is FeedForward:
            layer.__class__ = FramesApart
    expected = call(case, module)
    with all_fused(module, case.fused, *case.below):
        assert relative_error(call(case, module), expected) <= 1e-5


@EVERY_BLOCK
@torch.no_grad()
def test_adapters_on_every_layer_are_seen(case: Case) -> None:
    module = make(case)
    plain = call(case, module)
    layers = [path for path, child in module.named_modules() if path and isinstance(child, nn.Linear | nn.Conv2d)]
    if isinstance(module, AnimateDiffTransformer3D):  # whose stock code calls these two by an argument PEFT lacks
        layers = [path for path in layers if path not in ("proj_in", "proj_out")]
    if not layers:
        pytest.skip("it has no layer that takes an adapter")
    with all_fused(module, case.fused, *case.below) as sites:
        inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, target_modules=layers), module)
        module.eval().requires_grad_(False)
        out = call(case, module)
        merged = [part for part in module.modules() if isinstance(part, BaseTunerLayer)]
        for part in merged:
            part.merge()
        out_merged = call(case, module)
        assert not any(site.reason for site in sites)
    expected = call(case, module)
    for part in merged:
        part.unmerge()
    assert relative_error(call(case, module), plain) > 1e-3
    assert relative_error(out, call(case, module)) <= 1e-5
    assert relative_error(out_merged, expected) <= 1e-5


@EVERY_BLOCK
@torch.no_grad()
def test_weights_changed_behind_pytorchs_back_are_seen(case: Case) -> None:
    module = make(case)
    with all_fused(module, case.fused, *case.below):
        before = call(case, module)
        for parameter in module.parameters():
            parameter.data *= 0.5  # same address, same version
        out = call(case, module)
    assert relative_error(out, before) > 1e-2
    assert relative_error(out, call(case, module)) <= 1e-5


class Packed(nn.Parameter):
    """As a quantised weight is: another class."""


@EVERY_BLOCK
@torch.no_grad()
def test_weights_of_another_class_are_not_read(case: Case) -> None:
    module = make(case)
    expected = call(case, module)
    with all_fused(module, case.fused, *case.below) as sites:
        for child in module.modules():
            if isinstance(child, nn.Linear | nn.Conv2d | nn.Conv3d):
                child.weight = Packed(child.weight.data, requires_grad=False)
        assert relative_error(call(case, module), expected) <= 1e-5
    assert not any(site.reason for site in sites)


@contextmanager
def changed(parameter: nn.Parameter, factor: float) -> Iterator[None]:
    right = parameter.data.clone()
    parameter.data *= factor
    try:
        yield
    finally:
        parameter.data.copy_(right)


@EVERY_BLOCK
@torch.no_grad()
def test_what_the_fused_code_forgets_is_found(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each bias, norm and weight in turn is forgotten, each blend turned round, by the fused forward alone."""
    module, right = make(case), case.fused.fused_forward
    expected = call(case, module)
    for name, parameter in module.named_parameters():
        factor = -1.0 if name.endswith("mix_factor") else 0.0  # swaps the two that are blended
        with changed(parameter, factor):
            if relative_error(call(case, module), expected) <= 1e-3:
                continue  # nothing depends on it, as on the query of an attention to one token

        def forgetful(self: Any, *args: Any, p: nn.Parameter = parameter, factor: float = factor, **kwargs: Any) -> Any:
            with changed(p, factor):
                return right(self, *args, **kwargs)

        monkeypatch.setattr(case.fused, "fused_forward", forgetful)
        with fused(module, case.fused) as sites:
            assert torch.equal(call(case, module), expected), name
            assert {site.state for site in sites.values()} == {"failed"}, name


@pytest.mark.parametrize(
    "case", [case for case in CASES.values() if case.options.keys() & {"num_frames", *IMAGES_MIXED}]
)
@torch.no_grad()
def test_frames_off_by_one_are_found(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    module, right = make(case), case.fused.fused_forward
    expected = call(case, module)
    dim = 2 if expected.ndim == 5 else 0

    def late(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return right(self, *args, **kwargs).roll(1, dim)

    monkeypatch.setattr(case.fused, "fused_forward", late)
    with fused(module, case.fused) as sites:
        assert torch.equal(call(case, module), expected)
        assert {site.state for site in sites.values()} == {"failed"}


@EVERY_BLOCK
@torch.no_grad()
@pytest.mark.slow
def test_compiles_in_one_graph(case: Case) -> None:
    module = make(case)
    expected = call(case, module)
    with all_fused(module, case.fused, *case.below):
        module.compile(fullgraph=True, backend="eager")
        out = call(case, module)
    assert relative_error(out, expected) <= 1e-5
