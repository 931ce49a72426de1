"""What a model's call takes for granted: nothing that was replaced passes for what it was, or stays in memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import tiny_synthetic_pipeline
from torch import Tensor, nn

from vidaccel import patch_pipeline
from vidaccel.clips.generation import generate
from vidaccel.patching.premises import Premises


def twin(x: Tensor) -> Tensor:
    return nn.Parameter(x.detach().clone(), requires_grad=False) if isinstance(x, nn.Parameter) else x.clone()


@pytest.mark.usefixtures("plain_pytorch")
@pytest.mark.parametrize("name", ["svd", "wan2.1-t2v-1.3b"])  # the second has buffers
def test_a_replaced_weight_is_freed_at_once(name: str) -> None:
    pipe, arguments = tiny_synthetic_pipeline(name)
    with patch_pipeline(pipe):
        generate(pipe, arguments | {"num_inference_steps": 1}, seed=0)
        models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        tables = [table for model in models for part in model.modules() for table in (part._parameters, part._buffers)]
        gc.collect()
        gc.disable()  # to free the memory is not left to a collection that may come late
        try:
            left = []
            for table in tables:
                for key in [key for key, x in table.items() if x is not None]:
                    before = weakref.ref(table[key])
                    table[key] = twin(table[key])
                    left += [key] if before() is not None else []
        finally:
            gc.enable()
        assert tables and not left


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))
        self.register_buffer("shift", torch.ones(1))
        self.register_buffer("none", None)


def by_the_same_id(layer: Any) -> None:
    """Python puts an object where one was that is gone; here the new one has the numbers of the old, too."""
    numbers, so_far = layer.weight.data, id(layer.weight)
    del layer.weight
    elsewhere = []
    while id(weight := nn.Parameter(numbers)) != so_far and len(elsewhere) < 1000:
        elsewhere.append(weight)
    layer._parameters["weight"] = weight


def under_another_name(layer: Any) -> None:
    layer._parameters["scale"] = layer._parameters.pop("weight")


CHANGES: dict[str, Callable[[Any], None]] = {
    "an equal parameter": lambda layer: layer._parameters.update(weight=twin(layer.weight)),
    "an equal buffer": lambda layer: layer._buffers.update(shift=twin(layer.shift)),
    "another of the same id": by_the_same_id,
    "another over the same numbers": lambda layer: layer._parameters.update(weight=nn.Parameter(layer.weight.data)),
    "another name": under_another_name,
    "one more": lambda layer: layer.register_buffer("more", torch.ones(1)),
    "one less": lambda layer: delattr(layer, "shift"),
    "one for None": lambda layer: setattr(layer, "none", torch.ones(1)),
    "other numbers": lambda layer: setattr(layer.weight, "data", torch.ones(1)),
    "another dtype": lambda layer: layer.half(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_weight_is_noticed(change: Callable[[Any], None]) -> None:
    model = nn.Sequential(Layer(), Layer())
    premises = Premises(model)
    assert premises.hold()
    change(model[1])
    assert not premises.hold()
