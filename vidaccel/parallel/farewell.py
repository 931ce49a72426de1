"""What has to go before a process group does.

NCCL does not end a communicator while a CUDA graph lives that has one of its collectives: ``destroy_process_group``, or
the end of the process, would wait for ever (https://github.com/pytorch/pytorch/issues/115388). PyTorch calls nobody
before, so its function is wrapped as soon as there is such a graph.
"""

from __future__ import annotations

import atexit
import functools
import weakref
from typing import Any, Protocol

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

__all__ = ["forget_before_groups_end"]


class Forgets(Protocol):
    def forget(self) -> None: ...


_graphs: weakref.WeakSet[Any] = weakref.WeakSet()


def forget_before_groups_end(graphs: Forgets) -> None:
    """Have ``graphs.forget()`` called before a process group is destroyed, or this process ends."""
    _wrap_once()
    _graphs.add(graphs)


@functools.cache
def _wrap_once() -> None:
    destroy = c10d.destroy_process_group

    @functools.wraps(destroy)
    def destroy_process_group(*args: Any, **kwargs: Any) -> None:
        _forget_all()
        destroy(*args, **kwargs)

    for module in (dist, c10d):
        vars(module)["destroy_process_group"] = destroy_process_group
    atexit.register(_forget_all)


def _forget_all() -> None:
    for graphs in list(_graphs):
        graphs.forget()
    _graphs.clear()
