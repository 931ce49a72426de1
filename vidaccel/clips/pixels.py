"""The pixels of a clip, brought from the GPU into NumPy's hands through pinned memory.

diffusers' ``postprocess_video(..., "np")`` copies them into fresh pageable memory and from there into other fresh
memory. Most of the time goes into pages that the system has to clear first: 0.2 s for 25 frames of 576 x 1024
(profiles-h200.txt). Pinned memory, which PyTorch keeps for the next clip, takes 4 ms; the first clip, for which it is
pinned, as long as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["pinned_pixels"]


@contextmanager
def pinned_pixels(pipe: Any) -> Iterator[None]:
    """Have ``pipe``'s ``video_processor`` return NumPy arrays that lie in pinned memory, inside the ``with`` block.

    They are what it returns otherwise, bit by bit. A pipeline without such a processor, and one whose method somebody
    has replaced, stay as they are.
    """
    processor: Any = getattr(pipe, "video_processor", None)
    original = getattr(processor, "postprocess_video", None)
    if original is None or "postprocess_video" in vars(processor):
        yield
        return

    def postprocess_video(video: Tensor, output_type: str = "np", **kwargs: Any) -> Any:
        pinned = _pinned(video) if output_type == "np" else None
        if pinned is None:
            return original(video, output_type, **kwargs)
        for clip, out in zip(original(video, "pt", **kwargs), pinned, strict=True):
            for frame, pixels in zip(clip, out, strict=True):
                pixels.copy_(frame.movedim(0, -1), non_blocking=True)
        torch.cuda.current_stream(video.device).synchronize()
        return pinned.numpy()

    processor.postprocess_video = postprocess_video
    try:
        yield
    finally:
        del processor.postprocess_video


def _pinned(video: Any) -> Tensor | None:
    """Pinned memory for the pixels of ``video``, ``[B, C, F, H, W]``: ``[B, F, H, W, C]`` float32.

    None: it is not on a GPU, or the system pins no more.
    """
    if not isinstance(video, Tensor) or not video.is_cuda:
        return None
    batch, channels, *size = video.shape
    try:
        return torch.empty(batch, *size, channels, dtype=torch.float32, pin_memory=True)
    except RuntimeError:
        return None
