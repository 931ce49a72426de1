"""Offload between a GPU and the CPU: the pipeline, on the CPU when it is patched, runs on the GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from coexistence.feature import Feature, Subject, Undo
from coexistence.features_of_weights import HOOKED, group_offload
from torch import Tensor

from vidaccel.patching.cuda_graph import CHANGED

__all__ = ["FEATURES"]


def on_the_gpu(turn_on: Callable[[Subject], Undo | None]) -> Callable[[Subject], Undo]:
    """``turn_on``, which may return what undoes it, for arguments on the GPU; undone, all is on the CPU again."""

    def moved(subject: Subject) -> Undo:
        arguments = subject.arguments
        subject.arguments = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in arguments.items()}
        undo_offload = turn_on(subject)

        def undo() -> None:
            if undo_offload is not None:
                undo_offload()
            subject.pipe.remove_all_hooks()
            subject.pipe.to("cpu")
            subject.arguments = arguments

        return undo

    return moved


def to_the_gpu(subject: Subject) -> None:
    subject.pipe.to("cuda")


def model_offload(subject: Subject) -> None:
    subject.pipe.enable_model_cpu_offload()


def sequential_offload(subject: Subject) -> None:
    subject.pipe.enable_sequential_cpu_offload()


def there_and_back(subject: Subject) -> Undo:
    undo = on_the_gpu(to_the_gpu)(subject)
    subject.clip()
    undo()
    return lambda: None


def by_group(subject: Subject, offload_type: str, **options: Any) -> Undo:
    return group_offload(subject, offload_type, "cuda", **options)


BY_BLOCK = partial(by_group, offload_type="block_level", num_blocks_per_group=1)
BY_LEAF = partial(by_group, offload_type="leaf_level")
OFFLOADS = {
    "enable_model_cpu_offload": model_offload,
    "enable_sequential_cpu_offload": sequential_offload,
    "group offload by block": BY_BLOCK,
    "group offload by leaf": BY_LEAF,
}
# a stream copies from pinned memory of its own, which has the memory order that the patch gave
STREAMS = {
    "group offload by block, streams": partial(BY_BLOCK, use_stream=True),
    "group offload by leaf, streams": partial(BY_LEAF, use_stream=True),
}
# CUDA graphs: not of a call on the CPU, and only one call later of a model whose weights have moved since its first;
# nor of a call that waits for the GPU, or gains nothing by it
MOVED = f"an argument is on cpu|{re.escape(CHANGED)}|stream is capturing|the GPU is the slower one|it is no faster"
FEATURES = [
    Feature("to(cuda)", on_the_gpu(to_the_gpu), fallback=MOVED),
    Feature("to(cuda) and back", there_and_back, fallback=MOVED),
    *(Feature(name, on_the_gpu(offload), fallback=f"{HOOKED}|{MOVED}") for name, offload in OFFLOADS.items()),
    *(
        Feature(name, on_the_gpu(offload), fallback=f"{HOOKED}|{MOVED}", keeps_order=True)
        for name, offload in STREAMS.items()
    ),
]
