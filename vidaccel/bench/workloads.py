"""What is timed: the denoiser's call, the VAE's decode and encode, and the whole pipeline.

The calls of the denoiser and the decoder are recorded from one real run of the pipeline, so they have its batch,
shapes, dtypes and extra arguments whatever the family; pixels of the shapes that the decoder gave are what is encoded.
For timing latents and pixels are drawn anew; text, image and time step stay, as the text and the image of a clip do
from step to step.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from vidaccel.bench.variants import measured_modules
from vidaccel.clips.generation import Timings, generate
from vidaccel.patching.model_call import DecodeCall

__all__ = ["SCOPES", "ModuleCall", "ModuleWorkload", "PipelineWorkload", "Workload", "workloads"]

# The whole pipeline comes last: it finds its parts compiled by the other scopes, and compiles nothing twice.
SCOPES = ("denoiser", "vae", "encode", "end-to-end")

_INPUT_SETS = 3


class ModuleCall(NamedTuple):
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def map(self, change: Callable[[Tensor], Tensor]) -> ModuleCall:
        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        return ModuleCall(tuple(map(changed, self.args)), {name: changed(value) for name, value in self.kwargs.items()})

    def with_other_latents(self, module: nn.Module, generator: torch.Generator) -> ModuleCall:
        """The same call, but for what ``module`` takes first: noise of the same spread."""
        first = next(iter(inspect.signature(module.forward).parameters))
        if self.args:
            return ModuleCall((_redrawn(generator, self.args[0]), *self.args[1:]), self.kwargs)
        return ModuleCall((), self.kwargs | {first: _redrawn(generator, self.kwargs[first])})

    def shapes(self, module: nn.Module) -> dict[str, str]:
        """``{"sample": "2x14x8x72x128", ...}``, named as ``module``'s forward names them."""
        named = dict(zip(inspect.signature(module.forward).parameters, self.args, strict=False)) | self.kwargs
        return {name: "x".join(map(str, x.shape)) for name, x in named.items() if isinstance(x, Tensor)}


class _WholeDecode(nn.Module):
    """The decode of a VAE, which is timed where its decoder alone says too little.

    That is called for some frames at a time, with a cache in between, or for tiles; or ranks share the decode, and not
    the decoder.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shared = vars(self.vae).get("decode")  # not the stand-in, which calls this
        decode = shared if isinstance(shared, DecodeCall) else partial(type(self.vae).decode, self.vae)
        decoded: Tensor = decode(z, *args, **kwargs, return_dict=False)[0]
        return decoded

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Let the VAE's decode be a call of this module, so that hooks on it hear of that."""

        def decode(z: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
            decoded = self(z, *args, **kwargs)
            return DecoderOutput(decoded) if return_dict else (decoded,)

        self.vae.decode = decode
        try:
            yield
        finally:
            del self.vae.decode


class _WholeEncode(nn.Module):
    """The encode of a VAE, as image- and video-to-video begin with it: pixels to the mean of the latents."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(x, return_dict=False)[0].mode()
        return latents


def _decodes_in_pieces(vae: Any) -> bool:
    caches = {"feat_cache", "conv_cache"} & inspect.signature(vae.decoder.forward).parameters.keys()
    return bool(caches) or getattr(vae, "use_tiling", False)


class _AllRecordedError(Exception):
    """Ends a run of the pipeline of which nothing more is needed."""


def _recorded_calls(
    modules: dict[str, nn.Module], run: Callable[[], object]
) -> tuple[dict[str, list[ModuleCall]], list[Tensor]]:
    """What ``run`` calls.

    Returns:
        Copies of the arguments of one call of the denoiser, and of all those of a decode; and what these have given,
        on the meta device.
    """
    calls: dict[str, list[ModuleCall]] = {name: [] for name in modules}
    pixels: list[Tensor] = []

    def note_pixels(module: nn.Module, args: Any, out: Any) -> None:
        pixels.append((out if isinstance(out, Tensor) else out[0]).to("meta"))

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name != "denoiser" or not calls[name]:
            calls[name].append(ModuleCall(args, kwargs).map(torch.clone))
        if list(modules) == ["denoiser"]:  # which thus has not run when its first call is timed
            raise _AllRecordedError

    with ExitStack() as hooks, suppress(_AllRecordedError):
        for name, module in modules.items():
            if isinstance(module, _WholeDecode):
                hooks.enter_context(module.standing_in())
            hooks.callback(module.register_forward_pre_hook(partial(note, name), with_kwargs=True).remove)
            if name == "vae":
                hooks.callback(module.register_forward_hook(note_pixels).remove)
        run()
    return calls, pixels


class Workload(Protocol):
    """A unit of work that is repeated, and what it gives for fixed inputs."""

    shapes: Any

    def run(self) -> None:
        """One timed unit of work."""

    def output(self) -> Tensor:
        """What fixed inputs give, in float32 on the CPU."""

    def reference(self) -> Tensor | None:
        """As :meth:`output`, computed in float32 throughout, or None if there is no such thing."""

    def parts(self) -> dict[str, float]:
        """How the timed units divide, in milliseconds."""


class ModuleWorkload:
    """Recorded calls of one module, made again in order: one call of a denoiser, all chunks of a decode."""

    def __init__(self, module: nn.Module, calls: list[ModuleCall], seed: int) -> None:
        self.shapes = [call.shapes(module) for call in calls]
        self._module = module
        self._calls = calls
        generator = torch.Generator(next(module.parameters()).device).manual_seed(seed)
        redrawn = [[call.with_other_latents(module, generator) for call in calls] for _ in range(_INPUT_SETS)]
        self._rotation = itertools.cycle(redrawn)

    @torch.no_grad()
    def run(self) -> None:
        for call in next(self._rotation):
            self._module(*call.args, **call.kwargs)

    @torch.no_grad()
    def output(self) -> Tensor:
        return _output(self._module, self._calls)

    @torch.no_grad()
    def reference(self) -> Tensor | None:
        if next(self._module.parameters()).dtype == torch.float32:
            return None
        with _no_tf32():
            return _output(copy.deepcopy(self._module).float(), [call.map(_float32) for call in self._calls])

    def parts(self) -> dict[str, float]:
        return {}


class PipelineWorkload:
    """The whole pipeline on one seed, its denoising steps and its decode told apart."""

    def __init__(self, pipe: DiffusionPipeline, arguments: dict[str, Any], seed: int) -> None:
        self.shapes = {name: value for name, value in arguments.items() if isinstance(value, int | float)}
        self._pipe = pipe
        self._arguments = arguments
        self._seed = seed
        self._timings: list[Timings] = []

    def run(self) -> None:
        self._timings.append(generate(self._pipe, self._arguments, self._seed).timings)

    def output(self) -> Tensor:
        self._timings.clear()  # what has run so far was no timed unit
        return torch.from_numpy(generate(self._pipe, self._arguments, self._seed).frames)

    def reference(self) -> None:
        return None

    def parts(self) -> dict[str, float]:
        return {
            "step_ms": 1e3 * statistics.median(timings.step for timings in self._timings),
            "decode_ms": 1e3 * statistics.median(timings.decode for timings in self._timings),
        }


def workloads(
    pipe: DiffusionPipeline, arguments: dict[str, Any], scopes: tuple[str, ...], seed: int, whole_decode: bool = False
) -> dict[str, Workload]:
    """What there is to time in each of ``scopes``; of the VAE its decoder, or the ``whole_decode``."""
    end_to_end = PipelineWorkload(pipe, arguments, seed)
    recorded = {"vae" if scope == "encode" else scope for scope in scopes}
    modules = {name: module for name, module in measured_modules(pipe).items() if name in recorded}
    if "vae" in modules and (whole_decode or _decodes_in_pieces(pipe.vae)):
        modules["vae"] = _WholeDecode(pipe.vae)
    calls, pixels = _recorded_calls(modules, end_to_end.output) if modules else ({}, [])
    if "encode" in scopes:
        generator = torch.Generator(next(pipe.vae.parameters()).device).manual_seed(seed)
        modules["encode"] = _WholeEncode(pipe.vae)
        calls["encode"] = [ModuleCall((_drawn_like(x, generator),), {}) for x in pixels]
    made: dict[str, Workload] = {
        name: ModuleWorkload(modules[name], calls[name], seed) for name in SCOPES if name in modules and name in scopes
    }
    return made | ({"end-to-end": end_to_end} if "end-to-end" in scopes else {})


def _output(module: nn.Module, calls: list[ModuleCall]) -> Tensor:
    outputs = (module(*call.args, **call.kwargs) for call in calls)
    made = [(out if isinstance(out, Tensor) else out[0]).float().cpu() for out in outputs]
    alike = len({out.shape[1:] for out in made}) == 1
    return torch.cat(made if alike else [out.flatten() for out in made])  # tiles at the edges are smaller


def _drawn_like(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Random pixels, -1 to 1."""
    drawn = torch.rand(pixels.shape, generator=generator, device=generator.device, dtype=pixels.dtype)
    return 2 * drawn - 1


def _redrawn(generator: torch.Generator, x: Tensor) -> Tensor:
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return (noise * x.float().std() + x.float().mean()).to(x.dtype)


def _float32(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


@contextmanager
def _no_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
