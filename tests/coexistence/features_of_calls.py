"""What users turn on in a pipeline, hang on its modules, put in their place, and how they call it."""

from __future__ import annotations

import inspect
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import peft
import torch
from coexistence.families import build
from coexistence.feature import Feature, Needs, Subject, Undo, blocks_of, has, seeded, takes
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.utils._pytree import tree_map

__all__ = ["FEATURES"]

HOOKED = (
    "a hook replaced the forward|has forward hooks|somebody hooked it|looks at the rows|goes on where stock has begun"
)
SEEN = "may look at the padding|may tell rows apart"
REPLACED = f"was replaced by|{SEEN}"
PROCESSOR = "its processor is a|a processor of its own|has a processor"


# torch.compile


def quickly_traced(subject: Subject) -> str | None:
    slow = "unet" in subject.pipe.components and subject.family not in ("AnimateDiff", "SVD")
    return "not tried: a UNet takes minutes to trace" if slow else None


def of_two_families(subject: Subject) -> str | None:
    return None if subject.family in ("LTX", "Wan 2.1") else "not tried: it takes long; LTX and Wan 2.1 stand for all"


def compiled(subject: Subject, backend: str) -> Undo:
    torch.compiler.reset()
    denoiser = subject.denoiser
    subject.set_denoiser(torch.compile(denoiser, fullgraph=True, backend=backend))
    return lambda: subject.set_denoiser(denoiser)


def compiled_in_place(subject: Subject) -> Undo:
    torch.compiler.reset()
    subject.denoiser.compile(fullgraph=True, backend="eager")
    return lambda: setattr(subject.denoiser, "_compiled_call_impl", None)


def compiled_blocks(subject: Subject) -> Undo:
    torch.compiler.reset()
    subject.denoiser.compile_repeated_blocks(fullgraph=True, backend="eager")
    return lambda: [setattr(module, "_compiled_call_impl", None) for module in list(subject.denoiser.modules())[1:]]


# what diffusers offers


def switched(on: str, off: str, *args: Any, model: str = "", **options: Any) -> Callable[[Subject], Undo | None]:
    """Call method ``on`` of the pipeline or of its ``model``; ``off`` undoes that, if it is there."""

    def turn_on(subject: Subject) -> Undo | None:
        def owner() -> Any:
            return {"": subject.pipe, "denoiser": subject.denoiser, "vae": subject.pipe.vae}[model]

        getattr(owner(), on)(*args, **options)
        return (lambda: getattr(owner(), off)()) if hasattr(owner(), off) else None

    return turn_on


def of_vae(method: str) -> Needs:
    return lambda subject: None if hasattr(subject.pipe.vae, method) else f"the VAE has no {method}"


def cached(make: Callable[[Subject], Any]) -> Callable[[Subject], Undo]:
    """A step cache; ``make`` returns its configuration."""

    def turn_on(subject: Subject) -> Undo:
        subject.denoiser.enable_cache(make(subject))
        return subject.denoiser.disable_cache

    return turn_on


def pyramid_attention_broadcast(subject: Subject) -> Undo:
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        temporal_attention_block_skip_range=2,
        current_timestep_callback=lambda: 500,
    )
    if hasattr(subject.denoiser, "enable_cache"):
        return cached(lambda subject: config)(subject)
    diffusers.apply_pyramid_attention_broadcast(subject.denoiser, config)
    return lambda: _unhooked(subject.denoiser)


def _unhooked(model: nn.Module) -> None:
    """Without any of diffusers' own hooks."""
    for module in model.modules():
        if registry := getattr(module, "_diffusers_hook", None):
            for name in list(registry.hooks):
                registry.remove_hook(name, recurse=False)


def faster_cache(subject: Subject) -> Any:
    args, kwargs = subject.call
    first = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        unconditional_batch_skip_range=2,
        attention_weight_callback=lambda module: 0.3,
        current_timestep_callback=lambda: subject.pipe.current_timestep,
        is_guidance_distilled=len(first) == 1,  # or the two of a guidance come one after the other
    )


def taylor_seer(subject: Subject) -> Any:
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
    )


def mag_cache(subject: Subject) -> Any:
    return diffusers.MagCacheConfig(
        threshold=10.0, retention_ratio=0.0, num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS)
    )


def sea_cache(subject: Subject) -> Any:
    return diffusers.SeaCacheConfig(threshold=100.0, retention_steps=1, cache_end_steps=0)


def skipped_layer(subject: Subject) -> Undo:
    apply_layer_skip(subject.denoiser, LayerSkipConfig(indices=[1]))
    return lambda: _unhooked(subject.denoiser)


def free_noise(subject: Subject) -> Undo:
    config = SimpleNamespace(motion_max_seq_length=32)  # what the pipeline asks an adapter for
    subject.pipe.motion_adapter = SimpleNamespace(config=config)
    subject.pipe.enable_free_noise(context_length=2, context_stride=1)
    return subject.pipe.disable_free_noise


def ip_adapter(subject: Subject) -> Undo:
    denoiser, generator = subject.denoiser, torch.Generator().manual_seed(3)
    width = denoiser.config.cross_attention_dim

    def noise(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    sizes = [
        module.to_k.out_features for path, module in denoiser.named_modules()
        if path.endswith("attn2") and "motion" not in path
    ]  # fmt: skip
    weights = {f"{2 * k + 1}.to_{x}_ip.weight": noise(size, width) for k, size in enumerate(sizes) for x in "kv"}
    image = {"proj.weight": noise(4 * width, 8), "proj.bias": noise(4 * width),
             "norm.weight": 1 + noise(width), "norm.bias": noise(width)}  # fmt: skip
    denoiser._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": weights}])
    before, subject.arguments = subject.arguments, subject.arguments | {"ip_adapter_image_embeds": [noise(2, 1, 8)]}

    def undo() -> None:
        subject.pipe.unload_ip_adapter()
        subject.arguments = before

    return undo


def attention_backend(subject: Subject) -> Undo:
    subject.denoiser.set_attention_backend("_native_math")
    return lambda: subject.denoiser.set_attention_backend("native")


# what users hang on modules, or put in their place


def _some_layers(subject: Subject, start: int = 0) -> list[nn.Module]:
    """Every third, from ``start``, of those that blocks call, and that code of ours may stand for."""
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, RMSNorm, nn.SiLU)
    layers = [module for block in blocks_of(subject) for module in block.modules() if isinstance(module, kinds)]
    return list(dict.fromkeys(layers))[start::3]


def _hooked(modules: Callable[[Subject], list[nn.Module]], hook: Callable[..., Any]) -> Callable[[Subject], Undo]:
    def turn_on(subject: Subject) -> Undo:
        handles = [module.register_forward_hook(hook) for module in modules(subject)]
        return lambda: [handle.remove() for handle in handles]

    return turn_on


def _read(module: nn.Module, args: Any, out: Any) -> None:
    tree_map(lambda x: x.sum() if isinstance(x, Tensor) else x, (args, out))


def _shift(module: nn.Module, args: Any, out: Any) -> Any:
    """Other in each place of a row, or a norm behind it would take it away."""
    return tree_map(lambda x: x + torch.linspace(-0.1, 0.1, x.shape[-1]) if isinstance(x, Tensor) else x, out)


def _halve_in_place(module: nn.Module, args: Any, out: Any) -> None:
    tree_map(lambda x: x.data.mul_(0.5) if isinstance(x, Tensor) else x, out)


def saved_layers(subject: Subject) -> Tensor:
    return torch.cat([_saved(subject, _some_layers(subject, start)) for start in range(3)])


def saved_blocks(subject: Subject) -> Tensor:
    return _saved(subject, blocks_of(subject))


def _saved(subject: Subject, modules: list[nn.Module]) -> Tensor:
    """All that hooks keep of a clip, and its shapes; without a copy, looked at when the clip is done."""
    overwritten = _overwritten(subject.family)
    kept = _kept(subject, modules, copies=False), _kept(subject, modules, copies=True)
    paths = {module: path for path, module in subject.denoiser.named_modules()}
    activations = [x for module in modules for x in kept[paths[module] in overwritten][module]]
    shapes = torch.tensor([size for x in activations for size in x.shape])
    return torch.cat([x.flatten() for x in (*activations, shapes)])


def _kept(subject: Subject, modules: list[nn.Module], copies: bool) -> dict[nn.Module, list[Tensor]]:
    kept: dict[nn.Module, list[Tensor]] = {module: [] for module in modules}

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        kept[module] += [x.clone() if copies else x for x in _tensors(out)]

    handles = [module.register_forward_hook(keep) for module in modules]
    subject.clip(num_inference_steps=1 if "unet" in subject.pipe.components else 2)
    for handle in handles:
        handle.remove()
    return kept


@cache
def _overwritten(family: str) -> set[str]:
    """Paths of the layers whose output stock code writes to, when they have returned it."""
    subject = build(family)
    layers = {module: path for path, module in subject.denoiser.named_modules() if not list(module.children())}
    kept, copies = (_kept(subject, list(layers), copies) for copies in (False, True))
    return {path for layer, path in layers.items() if not all(map(torch.equal, kept[layer], copies[layer]))}


def _tensors(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [part for part in x if isinstance(part, Tensor)]


def pre_hook(subject: Subject) -> Undo:
    """It changes what the denoiser is called with."""

    def other(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        text = kwargs["encoder_hidden_states"]
        return args, kwargs | {"encoder_hidden_states": text * torch.linspace(0.5, 1.5, len(text)).view(-1, 1, 1)}

    handle = subject.denoiser.register_forward_pre_hook(other, with_kwargs=True)
    return handle.remove


class ScaledLinear(nn.Linear):
    """As of a library that makes something else of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0.9


def other_class(subject: Subject) -> Undo:
    layers = [layer for layer in _some_layers(subject) if type(layer) is nn.Linear]
    for layer in layers:
        layer.__class__ = ScaledLinear
    return lambda: [setattr(layer, "__class__", nn.Linear) for layer in layers]


class Halved(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return tree_map(lambda x: 0.5 * x if isinstance(x, Tensor) else x, self.module(*args, **kwargs))


def replaced_layers(subject: Subject) -> Undo:
    return _replaced(subject, {id(layer) for layer in _some_layers(subject) if not isinstance(layer, nn.SiLU)})


def replaced_block(subject: Subject) -> Undo:
    return _replaced(subject, {id(blocks_of(subject)[0])})


def _replaced(subject: Subject, which: set[int]) -> Undo:
    places = [(parent, name, child) for parent in subject.denoiser.modules()
              for name, child in parent.named_children() if id(child) in which]  # fmt: skip
    for parent, name, child in places:
        parent._modules[name] = Halved(child)
    return lambda: [parent._modules.__setitem__(name, child) for parent, name, child in places]


def users_processors(subject: Subject) -> Undo:
    attentions = [module for module in subject.denoiser.modules() if "processor" in vars(module)]
    kept = [attention.processor for attention in attentions]

    def mixed(kind: type) -> Any:
        class Mixed(kind):  # type: ignore[misc]
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                # not another scale alone, which a norm behind the attention would take away
                return tree_map(lambda x: x - 0.5 * x.roll(1, -1), super().__call__(*args, **kwargs))

        return Mixed

    for attention in attentions[::2]:
        kind = type(attention.processor)
        # one that comes from the patch stands for diffusers' own
        stock = next(base for base in kind.__mro__ if base.__module__.startswith("diffusers."))
        _set_processor(attention, mixed(stock)())

    def undo() -> None:
        for attention, processor in zip(attentions, kept, strict=True):
            _set_processor(attention, processor)

    return undo


def _set_processor(attention: Any, processor: Any) -> None:
    """As a user can; Mochi's attention has no method for it."""
    if hasattr(attention, "set_processor"):
        attention.set_processor(processor)
    else:
        attention.processor = processor


def wrapped_forwards(subject: Subject) -> Undo:
    """As DeepCache wraps blocks: every second call returns what the one before did."""
    undos: list[Undo] = []
    for block in blocks_of(subject)[1::2]:
        found, calls = block.forward, []

        def forward(*args: Any, found: Any = found, calls: list[Any] = calls, **kwargs: Any) -> Any:
            shapes = [x.shape for x in args if isinstance(x, Tensor)]
            if calls and calls[-1][0] == shapes:
                return calls.pop()[1]
            calls.append((shapes, found(*args, **kwargs)))
            return calls[-1][1]

        block.forward = forward
        undos.append(partial(block.__dict__.pop, "forward", None))
    return lambda: [undo() for undo in undos]


def stock_processors(subject: Subject) -> None:
    subject.denoiser.set_attn_processor(AttnProcessor2_0())


def default_processors(subject: Subject) -> None:
    subject.denoiser.set_attn_processor(AttnProcessor())


def takes_stock_processors(subject: Subject) -> str | None:
    kinds = {type(processor).__name__ for processor in getattr(subject.denoiser, "attn_processors", {}).values()}
    stock = kinds and kinds <= {"AttnProcessor2_0", "AttnProcessor"}
    return None if stock else "its attention has processors of its own"


# how a pipeline is called


def under(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[Subject], Tensor]:
    def run(subject: Subject) -> Tensor:
        with context():
            return subject.clip()

    return run


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _parameters(subject: Subject) -> Any:
    return inspect.signature(type(subject.pipe).__call__).parameters


def accepts(name: str) -> Needs:
    return lambda subject: None if name in _parameters(subject) else f"the pipeline takes no {name}"


def interrupted(subject: Subject) -> Tensor:
    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return tensors

    return subject.clip(callback_on_step_end=stop)


def changed_by_callback(subject: Subject) -> Tensor:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": 0.5 * tensors["latents"]}

    return subject.clip(callback_on_step_end=change)


def several(*changes: Callable[[Subject], dict[str, Any]]) -> Callable[[Subject], Tensor]:
    """Clip after clip, each with other arguments, and the first once more."""

    def run(subject: Subject) -> Tensor:
        clips = [subject.clip(**change(subject)) for change in (*changes, lambda subject: {})]
        return torch.cat([clip.flatten() for clip in clips])

    return run


def _frames_name(subject: Subject) -> str:
    return next(name for name in ("num_frames", "video_length", "frames") if name in _parameters(subject))


def other_size(subject: Subject) -> dict[str, Any]:
    return {"height": 2 * subject.arguments["height"]}


def other_frames(subject: Subject) -> dict[str, Any]:
    name = _frames_name(subject)
    rates = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "temporal_vae_scale_factor")
    rate = next((getattr(subject.pipe, rate) for rate in rates if hasattr(subject.pipe, rate)), 1)
    return {name: subject.arguments[name] + rate}


def no_guidance(subject: Subject) -> dict[str, Any]:
    return {"guidance_scale": 1.0}


def two_videos(subject: Subject) -> Tensor:
    """Of each prompt."""
    return _clips(subject, num_videos_per_prompt=2)


def two_prompts(subject: Subject) -> Tensor:
    prompts = {
        name: torch.cat([x, 0.5 * x if x.is_floating_point() else x])
        for name, x in subject.arguments.items()
        if isinstance(x, Tensor) and len(x) == 1
    }
    return _clips(subject, **prompts)


def _clips(subject: Subject, **changes: Any) -> Tensor:
    """All that the pipeline returns; some draw from PyTorch's own generator beside the given one."""
    generator = torch.Generator().manual_seed(0)
    call = partial(subject.pipe, **(subject.arguments | changes), generator=generator, output_type="np")
    return torch.from_numpy(np.asarray(seeded(call).frames))


def has_a_prompt(subject: Subject) -> str | None:
    return None if "prompt_embeds" in subject.arguments else "it has no prompt"


def after_an_exception(subject: Subject) -> Undo:
    """A call that ends in the middle of the denoiser."""

    class Stop(Exception):
        pass

    def stop(module: nn.Module, args: Any, out: Any) -> None:
        raise Stop

    handle = blocks_of(subject)[1].register_forward_hook(stop)
    try:
        subject.clip()
        raise AssertionError("it went through")
    except Stop:
        handle.remove()
    return lambda: None


def after_a_wrong_call(subject: Subject) -> Undo:
    """A call with latents that the denoiser cannot take."""
    args, kwargs = subject.call

    def cut(x: Any) -> Any:
        return x[..., :1] if isinstance(x, Tensor) and x.ndim > 1 else x

    try:
        with torch.no_grad():
            subject.denoiser(*tree_map(cut, args), **tree_map(cut, kwargs))
    except Exception:
        return lambda: None
    raise RuntimeError("it takes any")


def shared(subject: Subject) -> Undo:
    """A second pipeline of the same parts."""
    original, taken = subject.pipe, inspect.signature(type(subject.pipe).__init__).parameters
    options = {name: x for name, x in original.config.items() if name in taken and name not in original.components}
    subject.pipe = type(original)(**original.components, **options)
    subject.pipe.set_progress_bar_config(disable=True)
    return lambda: setattr(subject, "pipe", original)


@torch.no_grad()
def in_threads(subject: Subject) -> Tensor:
    with ThreadPoolExecutor(2) as pool:
        return torch.stack(list(pool.map(torch.no_grad()(lambda _: subject.noise()), range(4))))


def in_a_process(method: str) -> Callable[[Subject], Tensor]:
    def run(subject: Subject) -> Tensor:
        context = multiprocessing.get_context(method)
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_send_clip, args=(subject, theirs))
        process.start()
        theirs.close()
        try:
            return torch.from_numpy(ours.recv())
        finally:
            process.join(60)

    return run


def _send_clip(subject: Subject, pipe: Any) -> None:
    torch.set_num_threads(1)
    pipe.send(subject.clip().numpy())


def gradients_of_a_lora(subject: Subject) -> Tensor:
    """Of a LoRA that is trained by one call of the denoiser."""
    subject.denoiser.zero_grad()
    with torch.enable_grad():
        subject.noise().square().mean().backward()
    found = [weight.grad.flatten() for weight in subject.denoiser.parameters() if weight.grad is not None]
    subject.denoiser.zero_grad()
    return torch.cat(found)


def trained_lora(subject: Subject) -> Undo:
    layers = [path for path, module in subject.denoiser.named_modules()
              if isinstance(module, nn.Linear) and ("attn" in path or "attention" in path)]  # fmt: skip
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=layers)
    subject.denoiser.requires_grad_(False)
    seeded(lambda: subject.denoiser.add_adapter(config))
    return subject.denoiser.unload_lora


def checkpointed(subject: Subject) -> Undo:
    undo = trained_lora(subject)
    subject.denoiser.enable_gradient_checkpointing()
    subject.denoiser.train()

    def undo_both() -> None:
        subject.denoiser.eval()
        subject.denoiser.disable_gradient_checkpointing()
        undo()

    return undo_both


GRADIENT = 1e-4  # of the weights' memory order; stock's own to float64 is 5e-6 in AnimateDiff
TRAINS = "gradients are being recorded|" + HOOKED
STEPS = 2
MORE = {"num_inference_steps": 4}


def more_steps(subject: Subject) -> Tensor:
    return subject.clip(num_inference_steps=4)


FEATURES = [
    Feature("torch.compile, fullgraph", partial(compiled, backend="eager"), quickly_traced, slow=True),
    Feature("torch.compile, aot_eager", partial(compiled, backend="aot_eager"), of_two_families, slow=True),
    Feature("module.compile()", compiled_in_place, of_two_families, slow=True),
    Feature("compile_repeated_blocks", compiled_blocks, takes("compile_repeated_blocks"), slow=True),
    Feature("fuse_qkv_projections", switched("fuse_qkv_projections", "unfuse_qkv_projections", model="denoiser"),
            takes("fuse_qkv_projections"), fallback=PROCESSOR + "|fused"),
    Feature("fuse_qkv_projections of the VAE", switched("fuse_qkv_projections", "unfuse_qkv_projections", model="vae"),
            of_vae("fuse_qkv_projections"), fallback=PROCESSOR),
    Feature("IP-Adapter", ip_adapter, lambda subject: takes("_load_ip_adapter_weights")(subject)
            or has("unload_ip_adapter")(subject), fallback=PROCESSOR, shows=True),
    Feature("FreeU", switched("enable_freeu", "disable_freeu", s1=0.9, s2=0.2, b1=1.2, b2=1.4), has("enable_freeu"),
            fallback="FreeU is on", shows=True),
    Feature("FreeInit", switched("enable_free_init", "disable_free_init", num_iters=2), has("enable_free_init"),
            shows=True),
    Feature("FreeNoise", free_noise, has("enable_free_noise"), fallback="was replaced by", shows=True),
    Feature("attention slicing", switched("enable_attention_slicing", "disable_attention_slicing", 1),
            lambda subject: has("enable_attention_slicing")(subject) or takes("set_attention_slice")(subject),
            fallback=PROCESSOR),
    Feature("forward chunking", switched("enable_forward_chunking", "disable_forward_chunking", 1, 0, model="denoiser"),
            takes("enable_forward_chunking"), fallback="the feed-forward is chunked"),
    Feature("attention backend", attention_backend, takes("set_attention_backend")),
    Feature("VAE slicing", switched("enable_slicing", "disable_slicing", model="vae"), of_vae("enable_slicing")),
    Feature("VAE tiling", switched("enable_tiling", "disable_tiling", model="vae"), of_vae("enable_tiling")),
    Feature("FirstBlockCache", cached(lambda subject: diffusers.FirstBlockCacheConfig(threshold=1.0)),
            takes("enable_cache"), more_steps, fallback=HOOKED),
    Feature("Pyramid Attention Broadcast", pyramid_attention_broadcast, run=more_steps, fallback=HOOKED),
    Feature("FasterCache", cached(faster_cache), takes("enable_cache"), more_steps, fallback=HOOKED),
    Feature("TaylorSeer", cached(taylor_seer), takes("enable_cache"), more_steps, fallback=HOOKED),
    Feature("MagCache", cached(mag_cache), takes("enable_cache"), fallback=HOOKED),
    Feature("SeaCache", cached(sea_cache), takes("enable_cache"), more_steps, fallback=HOOKED),
    Feature("layer skip", skipped_layer, fallback=HOOKED, shows=True),
    Feature("a hook that reads layers", _hooked(_some_layers, _read), fallback=HOOKED),
    Feature("a hook that changes layers", _hooked(_some_layers, _shift), fallback=HOOKED, shows=True),
    Feature("a hook that writes to layers", _hooked(_some_layers, _halve_in_place), fallback=HOOKED, shows=True),
    Feature("a hook that reads blocks", _hooked(blocks_of, _read), fallback=HOOKED),
    Feature("a hook that changes blocks", _hooked(blocks_of, _shift), fallback=HOOKED,
            shows=True),
    Feature("hooks that save layers", run=saved_layers, fallback=HOOKED),
    Feature("hooks that save blocks", run=saved_blocks, fallback=HOOKED),
    Feature("a hook that changes the text", pre_hook,
            lambda subject: None if "encoder_hidden_states" in subject.call[1] else "its text comes by position",
            fallback=HOOKED, shows=True),
    Feature("layers of another class", other_class, fallback=REPLACED, shows=True),
    Feature("replaced layers", replaced_layers, fallback=REPLACED, shows=True),
    Feature("a replaced block", replaced_block, fallback=f"its module is gone|{REPLACED}", shows=True),
    Feature("processors of the user's", users_processors, fallback=f"{PROCESSOR}|{SEEN}", shows=True),
    Feature("AttnProcessor2_0 everywhere", stock_processors, takes_stock_processors, fallback=PROCESSOR),
    Feature("AttnProcessor everywhere", default_processors, takes_stock_processors, fallback=PROCESSOR),
    Feature("wrapped forwards (DeepCache)", wrapped_forwards, fallback=HOOKED, shows=True),
    Feature("a callback that interrupts", needs=accepts("callback_on_step_end"), run=interrupted),
    Feature("a callback that changes latents", needs=accepts("callback_on_step_end"), run=changed_by_callback),
    Feature("autocast", run=under(lambda: torch.autocast("cpu", torch.bfloat16)), rounds=True,
            fallback="autocast|goes on where stock has begun|float32 on cpu, its input torch.bfloat16"),
    Feature("deterministic mode", run=under(deterministic)),
    Feature("inference mode", run=under(torch.inference_mode)),
    Feature("another size, then the first", run=several(other_size)),
    Feature("more frames, then as many", run=several(other_frames)),
    Feature("no guidance, then guidance", needs=accepts("guidance_scale"), run=several(no_guidance),
            fallback="differ in batch size|spatial_attention: q must be"),
    Feature("two videos of a prompt", needs=accepts("num_videos_per_prompt"), run=two_videos,
            fallback="differ in batch size|spatial_attention: q must be"),
    Feature("two prompts", needs=has_a_prompt, run=two_prompts),
    Feature("an exception, then a clip", after_an_exception,
            fallback=REPLACED),
    Feature("a wrong call, then a clip", after_a_wrong_call),
    Feature("a second pipeline of the same parts", shared),
    Feature("threads", run=in_threads),
    Feature("a forked worker", run=in_a_process("fork")),
    Feature("a spawned worker", needs=of_two_families, run=in_a_process("spawn"), slow=True),
    Feature("a LoRA that is trained", trained_lora, takes("add_adapter"), gradients_of_a_lora,
            fallback=TRAINS, limit=GRADIENT),
    Feature("gradient checkpointing", checkpointed, takes("add_adapter", "enable_gradient_checkpointing"),
            gradients_of_a_lora, fallback=TRAINS, limit=GRADIENT),
]  # fmt: skip
