"""The VAE decoders: memory and its order, what a decode that fails says, the stock switches."""

from __future__ import annotations

import gc
import resource
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from block_checks import all_fused, frozen, fused, relative_error
from copy_checks import Copies, Held, hollow_out
from diffusers.models.autoencoders.vae import Decoder
from kernel_checks import planted
from tiny_models import tiny_autoencoder_kl, tiny_svd_pipeline
from torch import Tensor, nn
from vae_checks import host_is_full

from vidaccel import environment, patch_module
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.blocks.unet.resnet import FusedResnetBlock2D
from vidaccel.blocks.unet.upsampling import FusedUpsample2D
from vidaccel.blocks.vae import vae as blocks
from vidaccel.blocks.vae.vae import FusedDecoder, FusedTemporalDecoder, decode_bytes, frames_that_fit
from vidaccel.kernels.conv.conv_epilogue import CONV_EPILOGUE_AND_STATISTICS
from vidaccel.kernels.conv.upsample_conv import UPSAMPLE_CONV_AND_STATISTICS
from vidaccel.kernels.op import REFERENCE, Op

GIB = 2**30


def decode_svd(vae: nn.Module, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return vae.decode(latents, num_frames=latents.shape[0]).sample


def decode_kl(vae: nn.Module, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return vae.decode(latents).sample


def svd_vae() -> nn.Module:
    return tiny_svd_pipeline().vae


VAES = pytest.mark.parametrize(
    ("make", "decode"), [(svd_vae, decode_svd), (tiny_autoencoder_kl, decode_kl)], ids=["svd", "kl"]
)


def latents(frames: int = 2) -> Tensor:
    return torch.randn(frames, 4, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hollow(monkeypatch: pytest.MonkeyPatch) -> None:
    hollow_out(monkeypatch)


@VAES
def test_no_tensor_is_copied(make: Callable[[], nn.Module], decode: Any, hollow: None) -> None:
    vae = make()
    with patch_module(vae, self_check=False):
        decode(vae, latents())
        with Copies(smallest=1024) as copies:
            decode(vae, latents())
    assert copies.found == []


@VAES
def test_memory_held(make: Callable[[], nn.Module], decode: Any, hollow: None) -> None:
    """Counted without the workspaces of convolutions: no more than the stock decoder, and what the estimate says."""
    vae, z = make(), torch.randn(2, 4, 32, 32)
    with Held() as stock:
        decode(vae, z)
    with patch_module(vae, self_check=False):
        decode(vae, z)
        with Held() as patched:
            decode(vae, z)
        estimate = z.shape[0] * decode_bytes(vae.decoder, z)
    assert patched.most <= stock.most
    assert 0.8 * estimate <= patched.most <= estimate


def image_decoder(device: torch.device) -> nn.Module:
    """Two groups in each norm, for the interpreter takes one after the other."""
    torch.manual_seed(0)
    blocks = {"up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"), "block_out_channels": (32, 64)}
    return frozen(Decoder(norm_num_groups=2, mid_block_add_attention=False, **blocks)).to(device)


LAYERS = FusedResnetBlock2D, FusedUpsample2D, FusedGroupNorm


@torch.no_grad()
def test_with_the_kernels(device: torch.device) -> None:
    decoder, z = image_decoder(device), torch.randn(1, 3, 3, 2, device=device)
    expected = decoder(z)
    with all_fused(decoder, FusedDecoder, *LAYERS) as sites:
        assert relative_error(decoder(z), expected) <= 1e-5
    assert not any(site.reason or site.fallbacks for site in sites)
    kernels = {site.op for site in sites if "triton" in site.implementations}
    assert {"group_norm_silu", "conv_epilogue"} <= kernels


@pytest.mark.parametrize("op", [CONV_EPILOGUE_AND_STATISTICS, UPSAMPLE_CONV_AND_STATISTICS], ids=lambda op: op.name)
@torch.no_grad()
def test_wrong_statistics_are_found(op: Op, device: torch.device) -> None:
    """Only if they are handed on is there something to find."""
    decoder, z = image_decoder(device), torch.randn(1, 3, 3, 2, device=device)
    expected = decoder(z)
    with ExitStack() as stack:
        for name in set(op.implementations) - {REFERENCE}:
            stack.enter_context(planted(op, name, lambda outputs: outputs[1].mul_(1.5)))
        sites = stack.enter_context(all_fused(decoder, FusedDecoder, *LAYERS))
        assert relative_error(decoder(z), expected) <= 1e-5
        assert any(site.state == "failed" and op.name.startswith(site.op) for site in sites)


@VAES
def test_what_the_decoder_forgets_is_found(
    make: Callable[[], nn.Module], decode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    vae = make()
    expected, kind = decode(vae, latents()), FusedDecoder if make is tiny_autoencoder_kl else FusedTemporalDecoder
    right = kind.fused_forward
    monkeypatch.setattr(kind, "fused_forward", lambda *args: right(*args).flip(0))
    with fused(vae.decoder, kind) as sites:
        assert torch.equal(decode(vae, latents()), expected)
    assert "differs from the original" in sites["decode_memory"].reason


class Releases(nn.Identity):
    """Stands for a layer: notes which of the tensors made before its input are still alive while it runs."""

    def __init__(self, made: list[weakref.ref[Tensor]], alive: list[int]) -> None:
        super().__init__()
        self.made, self.alive = made, alive

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        gc.collect()
        self.alive.append(sum(ref() is not None for ref in self.made))
        out = x + 1
        self.made.append(weakref.ref(out))
        return out


@VAES
def test_no_tensor_outlives_its_last_reader(make: Callable[[], nn.Module], decode: Any) -> None:
    vae, made, alive = make(), [], []
    for block in vae.decoder.up_blocks:
        block.resnets = nn.ModuleList(Releases(made, alive) for _ in block.resnets)
        for upsampler in block.upsamplers or ():
            upsampler.register_forward_hook(lambda _, __, out: made.append(weakref.ref(out)))
    vae.decoder.conv_norm_out = nn.GroupNorm(32, 64)  # the layers above change no width
    vae.decoder.conv_out = nn.Conv2d(64, 3, 3, padding=1)
    decode(vae, latents())
    assert max(alive) > 1, "the stock decoder holds the input of an up-block until it is done"
    made.clear()
    alive.clear()
    with patch_module(vae, only="decode_memory"):
        decode(vae, latents())
    assert max(alive) == 1, "its own input"


def test_hooks_on_an_up_block_still_run() -> None:
    vae, seen = tiny_autoencoder_kl(), []
    vae.decoder.up_blocks[0].register_forward_hook(lambda *_: seen.append(1))
    with patch_module(vae, only="decode_memory"):
        decode_kl(vae, latents())
    assert seen == [1]


class Louder(nn.Module):
    """Stands around a layer, whatever that is called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 1.5 * self.layer(*args, **kwargs)


@VAES
@pytest.mark.parametrize("layers", ["resnets", "upsamplers"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_layer_in_a_wrapper_is_called_as_the_up_block_calls_it(
    when: str, layers: str, make: Callable[[], nn.Module], decode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    vae = make()
    report = patch_module(vae) if when == "after" else None
    wrapped = getattr(vae.decoder.up_blocks[0], layers)
    wrapped[0] = Louder(wrapped[0])
    with report or patch_module(vae):
        found = decode(vae, latents())
    assert relative_error(found, decode(vae, latents())) <= 1e-5


def test_a_hook_on_a_blender_sees_the_names_of_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    vae, seen = svd_vae(), []
    mixer = vae.decoder.up_blocks[0].resnets[0].time_mixer
    mixer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((len(args), list(kwargs))), with_kwargs=True)
    decode_svd(vae, latents())
    with patch_module(vae):
        decode_svd(vae, latents())
    assert seen == [(0, ["x_spatial", "x_temporal", "image_only_indicator"])] * 2


@pytest.fixture
def full_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module, float], None]:
    """A call makes a decoder's last convolution run out of memory on a GPU that has room for so many frames."""

    def fill(vae: nn.Module, room: float) -> None:
        def raise_error(*args: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        vae.decoder.conv_out.forward = raise_error
        free = int(room * decode_bytes(vae.decoder, latents()))
        monkeypatch.setattr(blocks, "usable_bytes", lambda device: free)

    return fill


@VAES
@pytest.mark.parametrize(
    ("room", "advice"),
    [(3.5, "decode_chunk_size=3 would fit"), (9, "decode_chunk_size=4 would fit"), (0.5, "not even one frame fits")],
)
def test_out_of_memory_names_the_chunk_that_fits(
    make: Callable[[], nn.Module], decode: Any, room: float, advice: str, full_gpu: Callable[[nn.Module, float], None]
) -> None:
    vae = make()
    full_gpu(vae, room)
    patch_module(vae, only="decode_memory")
    with pytest.raises(torch.OutOfMemoryError, match=r"5 frames of 8 x 8 pixels .* about 0.00 GiB") as raised:
        decode(vae, latents(frames=5))
    assert advice in str(raised.value)
    assert "Tried to allocate" in str(raised.value.__cause__)


def test_out_of_memory_lets_the_attempt_go(full_gpu: Callable[[nn.Module, float], None]) -> None:
    vae, held = tiny_autoencoder_kl(), []
    full_gpu(vae, 2)
    vae.decoder.conv_norm_out.register_forward_hook(lambda _, __, out: held.append(weakref.ref(out)))
    patch_module(vae, only="decode_memory")
    with pytest.raises(torch.OutOfMemoryError, match="out of memory while decoding") as raised:
        decode_kl(vae, latents())
    assert raised.value.__cause__ is not None and held[0]() is None


@VAES
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, host_is_full], ids=["gpu", "host"])
def test_out_of_memory_is_explained_where_there_is_no_cuda(
    error: Callable[[str], Exception], make: Callable[[], nn.Module], decode: Any
) -> None:
    vae = make()

    def raise_error(*args: object) -> None:
        raise error("no memory is left")

    vae.decoder.conv_out.forward = raise_error
    patch_module(vae, only="decode_memory")
    with pytest.raises(torch.OutOfMemoryError, match="out of memory while decoding 2 frames"):
        decode(vae, latents())


OF_THE_HOST = {"/proc/meminfo": f"MemFree:  {GIB // 1024} kB\nMemAvailable:  {12 * GIB // 1024} kB\n"}
CONTAINER = {
    "/sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
    "/sys/fs/cgroup/memory.current": f"{6 * GIB}\n",
    "/sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {3 * GIB}\n",
}
OLD_CONTAINER = {
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{8 * GIB}\n",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{6 * GIB}\n",
    "/sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
}
UNLIMITED = CONTAINER | {"/sys/fs/cgroup/memory.max": "max\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [({}, 12), (CONTAINER, 5), (OLD_CONTAINER, 3), (UNLIMITED, 12)],
    ids=["host", "container", "old-container", "unlimited"],
)
def test_free_memory_of_a_host(files: dict[str, str], free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_text_of", lambda path: (OF_THE_HOST | files).get(path, ""))
    assert environment.usable_bytes(torch.device("cpu")) == free * GIB


def test_free_memory_of_a_process_that_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**50, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "getpagesize", lambda: 2**50)
    assert environment.usable_bytes(torch.device("cpu")) < 0


@pytest.mark.parametrize(("free", "fit"), [(10 * GIB, 4), (3 * GIB, 1), (GIB, 0), (-GIB, 0)])
def test_frames_that_fit(free: int, fit: int) -> None:
    assert frames_that_fit(5, 2 * GIB, free) == fit


@pytest.mark.parametrize(("frames", "num_frames"), [(5, 2), (5, 7), (4, 0)], ids=["remainder", "too-many", "zero"])
def test_num_frames_that_does_not_divide_raises_what_the_stock_vae_raises(
    frames: int, num_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    vae, raised = svd_vae(), []
    for patched in (False, True):
        if patched:
            patch_module(vae)
        with pytest.raises((RuntimeError, ZeroDivisionError)) as error, torch.no_grad():
            vae.decode(latents(frames), num_frames=num_frames)
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]


def test_chunks_of_zero_raise_what_the_stock_pipeline_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    pipe = tiny_svd_pipeline()
    patch_module(pipe.vae)
    with pytest.raises(ValueError, match=r"range\(\) arg 3 must not be zero"), torch.no_grad():
        pipe.decode_latents(latents()[None], num_frames=2, decode_chunk_size=0)


@torch.no_grad()
def test_chunks_and_dtype_flips_of_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one call of the pipeline has it: encode upcast, decode in chunks of which the last is shorter."""
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    pipe, z = tiny_svd_pipeline(), latents(5)[None]
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)

    def both() -> tuple[Tensor, Tensor]:
        pipe.vae.to(torch.float64)
        encoded = pipe.vae.encode(image).latent_dist.mode()
        pipe.vae.to(torch.float32)
        return encoded, pipe.decode_latents(z, num_frames=5, decode_chunk_size=2)

    expected = both()
    with patch_module(pipe.vae) as report:
        for _ in range(2):
            for out, gold in zip(both(), expected, strict=True):
                assert (out - gold).norm() <= 1e-5 * gold.norm()
    assert not report.fallbacks


@VAES
@pytest.mark.slow
def test_decoder_compiles_in_one_graph(
    make: Callable[[], nn.Module], decode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDACCEL_IMPL", "torch")
    vae = make()
    patch_module(vae)
    expected = decode(vae, latents())
    vae.decoder.compile(fullgraph=True, backend="eager")
    assert (decode(vae, latents()) - expected).norm() <= 1e-5 * expected.norm()
