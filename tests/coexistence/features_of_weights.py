"""What users do to the weights of a pipeline: LoRA, offload, casting, quantising, loading others, copies."""

from __future__ import annotations

import copy
import pickle
import re
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import accelerate
import peft
import torch
from accelerate.hooks import remove_hook_from_module
from coexistence.feature import Feature, Needs, Subject, Undo, seeded, takes
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

__all__ = ["FEATURES", "HOOKED", "group_offload"]

ATTENTION = re.compile(r".*(attn\d?|attention)\..*")
BY_KEYWORD = re.compile(r".*motion_modules\.\d+\.proj_(in|out)")  # called with input=, which LoRA does not take
CHILD = r"was replaced by \w*(Linear|Conv2d)|has no plain weight|no convolution with a plain weight|extra_repr"
HOOKED = "a hook replaced the forward|goes on where stock has begun|no convolution with a plain weight"


def _layers(model: nn.Module, names: re.Pattern[str] | None = None) -> list[str]:
    """The linear layers and convolutions that a LoRA can go to."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and (names is None or names.fullmatch(path))
        and not BY_KEYWORD.fullmatch(path)
    ]


def _lora(subject: Subject, names: re.Pattern[str] | None = ATTENTION) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, init_lora_weights=False, target_modules=_layers(subject.denoiser, names))


def _add(subject: Subject, name: str = "one", names: re.Pattern[str] | None = ATTENTION, seed: int = 7) -> Undo:
    seeded(lambda: subject.denoiser.add_adapter(_lora(subject, names), name), seed)
    return subject.denoiser.unload_lora


def lora_everywhere(subject: Subject) -> Undo:
    return _add(subject, names=None)


def lora_scaled(subject: Subject) -> Undo:
    undo = _add(subject)
    subject.clip()
    subject.denoiser.set_adapters("one", 0.3)
    return undo


def two_loras(subject: Subject) -> Undo:
    _add(subject, "one")
    undo = _add(subject, "two", None, seed=8)
    subject.denoiser.set_adapters(["one", "two"], [0.5, -0.8])
    return undo


def lora_disabled(subject: Subject) -> Undo:
    undo = _add(subject)
    subject.clip()
    subject.denoiser.disable_lora()
    return undo


def lora_fused(subject: Subject) -> Undo:
    _add(subject)
    subject.clip()
    subject.denoiser.fuse_lora()

    def undo() -> None:
        subject.denoiser.unfuse_lora()
        subject.denoiser.unload_lora()

    return undo


def lora_fused_and_unloaded(subject: Subject) -> None:
    _add(subject)
    subject.denoiser.fuse_lora()
    subject.clip()
    subject.denoiser.unload_lora()


def lora_unloaded(subject: Subject) -> Undo:
    undo = _add(subject)
    subject.clip()
    undo()
    return lambda: None


def lora_hotswapped(subject: Subject) -> Undo:
    states = [_state_of_a_lora(subject, seed) for seed in (7, 8)]
    for state, options in zip(states, ({}, {"hotswap": True}), strict=True):
        subject.denoiser.load_lora_adapter(state, prefix=None, adapter_name="one", **options)
        subject.clip()
    return subject.denoiser.unload_lora


def _state_of_a_lora(subject: Subject, seed: int) -> dict[str, Tensor]:
    twin = copy.deepcopy(subject.denoiser)
    seeded(lambda: twin.add_adapter(_lora(subject), "one"), seed)
    return peft.get_peft_model_state_dict(twin, adapter_name="one")


def peft_model(subject: Subject) -> Undo:
    """PEFT's wrapper of the denoiser, for those that take no adapter themselves."""
    denoiser = subject.denoiser
    subject.set_denoiser(seeded(lambda: peft.get_peft_model(denoiser, _lora(subject)).eval()))

    def undo() -> None:
        subject.denoiser.unload()
        subject.set_denoiser(denoiser)

    return undo


# where weights lie, and as what


def model_offload(subject: Subject) -> Undo:
    """As ``enable_model_cpu_offload``, whose hook has nothing to move here."""
    hooks: list[Any] = [None]
    for model in subject.models:
        hooks.append(accelerate.cpu_offload_with_hook(model, torch.device("cpu"), hooks[-1])[1])
    return lambda: [hook.remove() for hook in hooks[1:]]


def sequential_offload(subject: Subject) -> Undo:
    """As ``enable_sequential_cpu_offload``: the weights of a module are there while it is called."""
    for model in subject.models:
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
    return lambda: [remove_hook_from_module(model, recurse=True) for model in subject.models]


def group_offload(subject: Subject, offload_type: str, onload: str = "cpu", **options: Any) -> Undo:
    for model in subject.models:
        apply_group_offloading(model, torch.device(onload), torch.device("cpu"), offload_type, **options)

    def undo() -> None:
        for model in subject.models:
            for module in model.modules():
                if registry := getattr(module, "_diffusers_hook", None):
                    for name in ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"):
                        registry.remove_hook(name, recurse=False)

    return undo


def layerwise_casting(subject: Subject, storage: torch.dtype) -> None:
    for denoiser in subject.denoisers:
        denoiser.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)


def cast(subject: Subject, *dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        subject.pipe.to(dtype)
    subject.arguments = {
        name: x.to(dtypes[-1]) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in subject.arguments.items()
    }


def channels_last(subject: Subject) -> Undo:
    for model in subject.models:
        model.to(memory_format=torch.channels_last)
    return lambda: [model.to(memory_format=torch.contiguous_format) for model in subject.models]


def _installed(package: str) -> Needs:
    def needs(subject: Subject) -> str | None:
        try:
            return None if find_spec(package) else f"{package} is not installed"
        except ModuleNotFoundError:  # nor what it is a part of
            return f"{package} is not installed"

    return needs


def torchao(subject: Subject) -> None:
    quantization = import_module("torchao.quantization")
    quantization.quantize_(subject.denoiser, quantization.Int8WeightOnlyConfig())


def of_quanto(subject: Subject) -> str | None:
    if subject.family == "Kandinsky 5":
        return "it multiplies in bfloat16, where quanto's product on a CPU (torch._weight_int8pack_mm) ends the process"
    return _installed("optimum.quanto")(subject)


def quanto(subject: Subject) -> None:
    quanto = import_module("optimum.quanto")
    quanto.quantize(subject.denoiser, weights=quanto.qint8)
    quanto.freeze(subject.denoiser)


def bitsandbytes(subject: Subject) -> None:
    kind = import_module("bitsandbytes.nn").Linear8bitLt

    def quantised(old: nn.Linear) -> nn.Module:
        new = kind(old.in_features, old.out_features, old.bias is not None, has_fp16_weights=False)
        new.load_state_dict(old.state_dict())
        return new

    _replace_linears(subject.denoiser, quantised)
    subject.clip()  # the first quantises the weights, and gives another one than those behind it


def gguf(subject: Subject) -> None:
    """As diffusers' quantiser for a file of Q8_0: the weight is blocks of 32 numbers and their scale."""
    gguf, utils = import_module("gguf"), import_module("diffusers.quantizers.gguf.utils")
    kind = gguf.GGMLQuantizationType.Q8_0

    def quantised(old: nn.Linear) -> nn.Module:
        if old.in_features % 32:
            return old
        new = utils.GGUFLinear(old.in_features, old.out_features, old.bias is not None, compute_dtype=torch.float32)
        blocks = torch.from_numpy(gguf.quantize(old.weight.detach().numpy(), kind))
        new.weight, new.bias = utils.GGUFParameter(blocks, quant_type=kind), old.bias
        return new

    for denoiser in subject.denoisers:
        _replace_linears(denoiser, quantised)


def _replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for path in _layers(model):
        parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        if type(layer := getattr(parent, name)) is nn.Linear:
            setattr(parent, name, make(layer).eval().requires_grad_(False))


# other weights in the same modules


def _weights(subject: Subject) -> list[Tensor]:
    return [weight for model in subject.models for weight in model.parameters()]


def _changing(change: Callable[[Subject], None]) -> Callable[[Subject], Undo]:
    """``change``, with the old numbers put back by ``load_state_dict`` when it is undone."""

    def turn_on(subject: Subject) -> Undo:
        states = [copy.deepcopy(model.state_dict()) for model in subject.models]
        change(subject)
        return lambda: [model.load_state_dict(state) for model, state in zip(subject.models, states, strict=True)]

    return turn_on


@_changing
@torch.no_grad()
def edited_in_place(subject: Subject) -> None:
    for weight in _weights(subject):
        weight.mul_(0.9)


@_changing
def edited_through_data(subject: Subject) -> None:
    for weight in _weights(subject):
        weight.data.mul_(0.9)


@_changing
def other_data(subject: Subject) -> None:
    for weight in _weights(subject):
        weight.data = weight.data * 0.9


@_changing
def other_parameters(subject: Subject) -> None:
    for model in subject.models:
        for module in model.modules():
            for name, weight in list(module._parameters.items()):
                if weight is not None:
                    setattr(module, name, nn.Parameter(0.9 * weight.detach(), requires_grad=weight.requires_grad))


@_changing
def other_state(subject: Subject) -> None:
    for model in subject.models:
        model.load_state_dict({name: 0.9 * x if x.is_floating_point() else x for name, x in model.state_dict().items()})


# copies: one of a patched pipeline is stock, but for the memory order of its weights


def _copied_by(copied: Callable[[Any], Any]) -> Callable[[Subject], Undo]:
    def turn_on(subject: Subject) -> Undo:
        subject.clip()
        original = subject.pipe
        subject.pipe = copied(original)
        subject.pipe.set_progress_bar_config(disable=True)
        return lambda: setattr(subject, "pipe", original)

    return turn_on


def saved_and_loaded(pipe: Any) -> Any:
    absent = {name: None for name, part in pipe.components.items() if part is None}
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        return type(pipe).from_pretrained(folder, **absent)


LORA = takes("add_adapter", "unload_lora")
FEATURES = [
    Feature("LoRA on attention", _add, LORA, fallback=CHILD, shows=True),
    Feature("LoRA on every layer", lora_everywhere, LORA, fallback=CHILD, shows=True),
    Feature("LoRA scaled", lora_scaled, LORA, fallback=CHILD, shows=True),
    Feature("two LoRAs", two_loras, LORA, fallback=CHILD, shows=True),
    Feature("LoRA disabled", lora_disabled, LORA, fallback=CHILD),
    Feature("LoRA fused", lora_fused, LORA, fallback=CHILD, shows=True, drifts=True),
    Feature("LoRA fused and unloaded", lora_fused_and_unloaded, LORA, fallback=CHILD, shows=True),
    Feature("LoRA unloaded", lora_unloaded, LORA, fallback=CHILD),
    Feature("LoRA hotswapped", lora_hotswapped, takes("load_lora_adapter"), fallback=CHILD, shows=True),
    Feature("PEFT's wrapper of the denoiser", peft_model, fallback=CHILD, shows=True),
    Feature("model offload", model_offload, fallback=HOOKED),
    Feature("sequential offload", sequential_offload, fallback=HOOKED),
    Feature("group offload by block", partial(group_offload, offload_type="block_level", num_blocks_per_group=1),
            fallback=HOOKED),
    Feature("group offload by leaf", partial(group_offload, offload_type="leaf_level"), fallback=HOOKED),
    Feature("layerwise casting, bfloat16", partial(layerwise_casting, storage=torch.bfloat16),
            takes("enable_layerwise_casting"), fallback=HOOKED, shows=True),
    Feature("layerwise casting, float8", partial(layerwise_casting, storage=torch.float8_e4m3fn),
            takes("enable_layerwise_casting"), fallback=HOOKED, shows=True),
    Feature("to(bfloat16)", lambda subject: cast(subject, torch.bfloat16), fallback="not float32",
            shows=True, rounds=True),
    Feature("to(bfloat16) and back", lambda subject: cast(subject, torch.bfloat16, torch.float32),
            fallback="rounded to bfloat16", shows=True),
    Feature("channels_last", channels_last, keeps_order=True),
    Feature("torchao, int8 weights", torchao, _installed("torchao"), fallback=CHILD, shows=True),
    Feature("quanto, int8 weights", quanto, of_quanto, fallback=CHILD, shows=True, keeps_order=True),
    Feature("bitsandbytes, 8 bits", bitsandbytes, _installed("bitsandbytes"), fallback=CHILD, shows=True, rounds=True),
    Feature("GGUF, Q8_0", gguf, _installed("gguf"), fallback=CHILD, shows=True),
    Feature("weights edited in place", edited_in_place, shows=True),
    Feature("weights edited through .data", edited_through_data, shows=True),
    Feature("another .data", other_data, shows=True),
    Feature("other parameters", other_parameters, shows=True),
    Feature("other state_dict", other_state, shows=True),
    Feature("save_pretrained, from_pretrained", _copied_by(saved_and_loaded),
            fallback="rounded to bfloat16", keeps_order=True),
    Feature("deepcopy", _copied_by(copy.deepcopy), keeps_order=True),
    Feature("pickle", _copied_by(lambda pipe: pickle.loads(pickle.dumps(pipe))), keeps_order=True),
]  # fmt: skip
