"""A patched pipeline does what the unpatched one does, whatever users do with it: the matrix, and a part of it.

``make matrix`` runs every feature on every family, and writes the table; ``make test`` runs one family of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from coexistence import features_on_a_gpu
from coexistence.families import FAMILIES
from coexistence.feature import Feature
from coexistence.features import FEATURES
from coexistence.matrix import ORDERS, outcome

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("plain_pytorch"),
    pytest.mark.filterwarnings("ignore"),  # of PEFT, accelerate, the quantisers: not ours, which we only log
]

# One transformer, whose cells take a third of a second, each feature in one of the orders; of the UNets, only what has
# no like there.
CHEAP = "Wan 2.1"
ON_A_GPU = ("AnimateDiff", "SVD", "LTX", "Wan 2.1")
UNETS_OWN = {"AnimateDiff": ("sequential offload", "forward chunking", "a replaced block")}


def _named(x: Any) -> str:
    return x.name if isinstance(x, Feature) else str(x)


def _is_cheap(feature: Feature, family: str, order: str) -> bool:
    its_own = feature.name in UNETS_OWN.get(family, ())
    whose_turn = ORDERS[FEATURES.index(feature) % len(ORDERS)]
    return order == whose_turn and (its_own or (family == CHEAP and not feature.slow))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    whole = metafunc.config.getoption("--matrix")
    cells = [
        (feature, family, order)
        for family in FAMILIES
        for feature in FEATURES
        for order in ORDERS
        if whole or _is_cheap(feature, family, order)
    ]
    if "record_property" not in metafunc.fixturenames:
        features = features_on_a_gpu.FEATURES if whole else ()
        cells = [(feature, family, order) for family in ON_A_GPU for feature in features for order in ORDERS]
    metafunc.parametrize(("feature", "family", "order"), cells, ids=_named)


def test_cell(feature: Feature, family: str, order: str, record_property: Callable[[str, Any], None]) -> None:
    record_property("cell", (feature.name, family, order, "failed", ()))
    found = outcome(feature, family, order)
    record_property("cell", (feature.name, family, order, found.kind, found.reasons))


@pytest.mark.gpu
def test_cell_on_a_gpu(feature: Feature, family: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found = outcome(feature, family, order)
    if found.kind == "n/a" and feature.name.startswith("group offload"):  # in diffusers, of some VAEs
        pytest.skip(found.reasons[0])
    assert found.kind != "n/a", found.reasons
