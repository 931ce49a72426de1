"""That the kernels of a model's first call are those that its blocks foretell when it is patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from denoiser_calls import denoised, first_call
from tiny_models import (
    tiny_autoencoder_kl,
    tiny_autoencoder_kl_ltx_video,
    tiny_svd_pipeline,
    tiny_synthetic_pipeline,
)
from torch import Tensor

from vidaccel import patch_module, patch_pipeline
from vidaccel.blocks.unet.resnet import FusedResnetBlock2D
from vidaccel.kernels import compile_ahead
from vidaccel.kernels.compile_ahead import foreseen
from vidaccel.kernels.launch import Launch
from vidaccel.kernels.op import ops

UNTOLD = {"_softmax_kernel"}  # it depends on the number of keys


class Kernels:
    """Names of kernels with their constants: what is launched, with no result, and what is foretold."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launched: set[tuple[Any, ...]] = set()
        self.foretold: set[tuple[Any, ...]] = set()
        monkeypatch.setattr(Launch, "_through_triton", lambda launch, tensors: self.launched.add(_of(launch)))
        monkeypatch.setattr(Launch, "compile_ahead", lambda launch, *args: self.foretold.add(_of(launch)))

    @classmethod
    def running(cls, monkeypatch: pytest.MonkeyPatch) -> Kernels:
        """The same of kernels that run; what is launched before it is foretold counts as untold."""
        run, kernels = Launch._through_triton, cls(monkeypatch)
        late: set[tuple[Any, ...]] = set()

        def launch(launched: Launch, tensors: Any) -> Any:
            kernels.launched.add(_of(launched))
            if _of(launched) not in kernels.foretold:
                late.add(("late", *_of(launched)))
            return run(launched, tensors)

        monkeypatch.setattr(Launch, "_through_triton", launch)
        monkeypatch.setattr(kernels, "untold", lambda: sorted(late))
        return kernels

    def untold(self) -> list[tuple[Any, ...]]:
        return sorted(kernel for kernel in self.launched - self.foretold if kernel[0] not in UNTOLD)


def _of(launch: Launch) -> tuple[Any, ...]:
    return launch._kernel.fn.__name__, *sorted((name, str(value)) for name, value in launch._constants.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "frames"), [("svd", 14), ("animatediff", 16), ("modelscope", 16), ("i2vgen-xl", 16)])
def test_a_denoisers_kernels_are_foretold(
    name: str, frames: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, given = first_call(name, frames)
    kernels = Kernels(monkeypatch)
    pipe.to(dtype)
    given = {key: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in given.items()}
    patch_pipeline(pipe, self_check=False)
    denoised(pipe, given)
    assert len(kernels.launched) > 5
    assert not kernels.untold()


@pytest.mark.parametrize(
    ("make", "options"),
    [(tiny_autoencoder_kl, {}), (lambda: tiny_svd_pipeline().vae, {"num_frames": 3})],
    ids=["frames", "clip"],
)
def test_a_decoders_kernels_are_foretold(
    make: Callable[[], Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = make().half()
    kernels = Kernels(monkeypatch)
    patch_module(vae, self_check=False)
    with torch.no_grad():
        vae.decode(torch.randn(3, vae.config.latent_channels, 8, 8).half(), **options)
    assert len(kernels.launched) > 5
    assert not kernels.untold()


def test_an_encoders_kernels_are_foretold_in_the_dtype_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        FusedResnetBlock2D, "compile_ahead", lambda block: told.append((name_of[block], foreseen().upcast))
    )
    vae = tiny_svd_pipeline().vae.half()
    name_of = {module: name for name, module in vae.named_modules()}
    patch_module(vae)
    parts = [(name.split(".")[0], of_float32) for name, of_float32 in told]
    assert parts == sorted(parts, key=lambda part: part[0] != "encoder")  # and these come first
    assert set(parts) == {("encoder", True), ("decoder", False)}


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that had kernels to compile."""
    monkeypatch.setattr(compile_ahead, "is_cold", lambda: True)
    for op in ops().values():
        op.forget()


def test_what_a_decoder_runs_is_foretold_from_a_corner(cold: None, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = tiny_autoencoder_kl_ltx_video()
    kernels = Kernels.running(monkeypatch)
    report = patch_module(vae)
    with torch.no_grad():
        vae.decode(torch.randn(1, vae.config.latent_channels, 3, 8, 8))
    assert len(kernels.launched) > 5
    assert not kernels.untold()
    assert not report.fallbacks


def test_what_a_transformer_runs_is_foretold_from_a_corner(cold: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = tiny_synthetic_pipeline("ltx-video-2b")
    kernels = Kernels.running(monkeypatch)
    patch_pipeline(pipe)
    pipe(**call, output_type="latent")
    assert len(kernels.launched) > 3
    assert not kernels.untold()
