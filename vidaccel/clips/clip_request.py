"""What one clip is made from, as said by the command line, a line of a job file, or a model's own defaults."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vidaccel.errors import UsageError

__all__ = [
    "RANDOM_SEED",
    "ClipRequest",
    "add_clip_arguments",
    "add_model_arguments",
    "add_parallel_argument",
    "option_called",
    "pipeline_names",
    "request_from_arguments",
]

RANDOM_SEED = -1
_LARGEST = 2**63 - 1  # seed that PyTorch takes
MOST_FRAMES, MOST_PIXELS = 2**30, 2**16  # of a side: what a tensor's size can still be told by


def _option(
    kind: type,
    *pipeline_names: str,
    help: str,
    least: int | None = None,
    most: int = _LARGEST,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    metadata = {"kind": kind, "pipeline_names": pipeline_names, "help": help, "least": least, "most": most}
    return field(default=None, metadata=metadata | {"parse": parse or kind})


def parse_seed(text: str) -> int:
    """A whole number, or -1 for "random"."""
    try:
        return RANDOM_SEED if text == "random" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number or random, got {text!r}") from None


@dataclass(frozen=True)
class ClipRequest:
    """None leaves a choice to the model's defaults and then to the pipeline's.

    Raises:
        UsageError: a value is of the wrong type or out of its range.
    """

    image: str | None = _option(
        str, "image", help="image to start from; cut around its centre and resized to width x height"
    )
    prompt: str | None = _option(str, "prompt", help="text to start from")
    frames: int | None = _option(int, "num_frames", "video_length", least=1, most=MOST_FRAMES, help="number of frames")
    steps: int | None = _option(int, "num_inference_steps", least=1, help="number of denoising steps")
    seed: int | None = _option(
        int,
        least=RANDOM_SEED,
        parse=parse_seed,
        help="seed of the first clip's noise; the next clips add 1, 2, ...; random (or -1): another for each clip, "
        "which its record keeps",
    )
    fps: float | None = _option(
        float, "fps", "target_fps", "frame_rate", least=1, help="frames per second, such as 8 or 23.976"
    )
    height: int | None = _option(
        int, "height", least=1, most=MOST_PIXELS, help="pixels; a multiple of the VAE's factor"
    )
    width: int | None = _option(int, "width", least=1, most=MOST_PIXELS, help="pixels; a multiple of the VAE's factor")
    guidance_scale: float | None = _option(
        float, "guidance_scale", "max_guidance_scale", help="classifier-free guidance; SVD's for the last frame"
    )
    min_guidance_scale: float | None = _option(float, "min_guidance_scale", help="SVD's guidance for the first frame")
    motion_bucket_id: int | None = _option(int, "motion_bucket_id", least=0, help="SVD's amount of motion")
    noise_aug_strength: float | None = _option(
        float, "noise_aug_strength", least=0, help="SVD's noise on the image: more of it gives more motion"
    )
    decode_chunk_size: int | None = _option(
        int, "decode_chunk_size", least=1, help="frames decoded at a time: fewer need less memory"
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if value is not None:
                _check(option.name, value, *(option.metadata[limit] for limit in ("kind", "least", "most")))

    def filled_from(self, defaults: Mapping[str, Any]) -> ClipRequest:
        """The same request with ``defaults`` where it says None."""
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})


def _check(name: str, value: Any, kind: type, least: int | None, most: int) -> None:
    accepted: Any = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise UsageError(f"{name} must be {_NAMES_OF_KINDS[kind]}, got {value!r}")
    if kind is str:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} must be finite, got {value}")
    if least is not None and value < least:
        raise UsageError(f"{name} must be at least {least}, got {value}")
    if abs(value) > most:
        raise UsageError(f"{name} must be at most {most}, got {str(value)[:40]}")


_NAMES_OF_KINDS = {int: "a whole number", float: "a number", str: "text"}


def pipeline_names(option: str) -> tuple[str, ...]:
    """What diffusers pipelines call ``option``; the first that a pipeline takes counts."""
    return ClipRequest.__dataclass_fields__[option].metadata["pipeline_names"]


def option_called(name: str) -> str:
    """The option with this name, or with this name in a pipeline's call.

    Raises:
        UsageError: there is none.
    """
    for option in fields(ClipRequest):
        if name in (option.name, *option.metadata["pipeline_names"]):
            return option.name
    raise UsageError(f"unknown option {name!r}")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What to load, as what, to where."""
    parser.add_argument("--model", help="folder or Hugging Face hub id of a pipeline (default: the bundled one)")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="default: float16, float32 on a CPU"
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also load weights that are not safetensors: only from an author you trust, such a file can run any code",
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu, ... (default: the first GPU, else the CPU)")


def add_parallel_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parallel",
        choices=("auto", "guidance", "frames", "sequence"),
        help="how torchrun's processes, one for each GPU, split every clip: the halves of guidance, a UNet's frames or "
        "a transformer's tokens (default: auto under torchrun)",
    )


def add_clip_arguments(parser: argparse.ArgumentParser) -> None:
    """One ``--option`` for every field of :class:`ClipRequest`."""
    for option in fields(ClipRequest):
        parser.add_argument(
            f"--{option.name.replace('_', '-')}", type=option.metadata["parse"], help=option.metadata["help"]
        )


def request_from_arguments(args: argparse.Namespace) -> ClipRequest:
    """What was given for the options of :func:`add_clip_arguments`."""
    return ClipRequest(**{option.name: getattr(args, option.name) for option in fields(ClipRequest)})
