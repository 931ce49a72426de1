"""How a call of a fused block goes: what is checked and when, what is counted, what can be switched."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from block_checks import fused, relative_error
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from vidaccel.blocks.unet.activations import FusedGEGLU
from vidaccel.blocks.unet.normalization import FusedGroupNorm
from vidaccel.kernels.ffn import geglu as geglu_file
from vidaccel.kernels.ffn.geglu import GEGLU as GEGLU_OP
from vidaccel.kernels.op import Implementation
from vidaccel.sites.block import MOST_WHOLE, SITES
from vidaccel.sites.plain import plain_reason
from vidaccel.sites.rules import Swap


@pytest.fixture
def block() -> GEGLU:
    torch.manual_seed(0)
    return GEGLU(16, 32).eval().requires_grad_(False)


def rows(seed: int = 0, samples: int = 3) -> Tensor:
    return torch.randn(samples, 50, 16, generator=torch.Generator().manual_seed(seed))


def plant(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Let the op ``geglu`` prefer a faulty implementation, and the block use that op."""
    monkeypatch.setenv("VIDACCEL_IMPL", "geglu=faulty")
    monkeypatch.setitem(GEGLU_OP.implementations, "faulty", Implementation(run))
    GEGLU_OP.forget()


OPS = ("geglu",)  # without linear_geglu, whose implementations run it


@torch.no_grad()
def test_a_fault_fails_the_site_and_the_call_is_right(block: GEGLU, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda x: 1.01 * geglu_file.geglu_ref(x))
    expected = block(rows())
    with fused(block, FusedGEGLU, OPS) as sites:
        assert torch.equal(block(rows()), expected)
        assert sites["geglu"].state == "failed" and "off by" in sites["geglu"].reason
        assert torch.equal(block(rows(1)), GEGLU.forward(block, rows(1)))


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "behind"])
def test_an_op_that_writes_to_its_input_fails_and_the_call_is_right(
    when: str, block: GEGLU, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(x: Tensor) -> Tensor:
        out = geglu_file.geglu_ref(x.mul_(1.3) if when == "before" else x)
        x.mul_(1.3)
        return out

    plant(monkeypatch, run)
    expected = block(rows())
    with fused(block, FusedGEGLU, OPS) as sites:
        assert torch.equal(block(rows()), expected)
        assert sites["geglu"].state == "failed" and "changes its arguments" in sites["geglu"].reason


@torch.no_grad()
def test_a_fault_that_comes_and_goes_fails_the_block(block: GEGLU, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a kernel with a race: the second run, in which each op waits for its verdict, finds nothing."""
    calls = []

    def at_first(x: Tensor) -> Tensor:
        calls.append(1)
        return geglu_file.geglu_ref(x) * (1.01 if len(calls) == 1 else 1)

    plant(monkeypatch, at_first)
    expected = block(rows())
    with fused(block, FusedGEGLU, OPS) as sites:
        assert torch.equal(block(rows()), expected)
        assert sites["geglu"].state == "failed" and "something else" in sites["geglu"].reason


@torch.no_grad()
def test_a_check_of_what_is_right_runs_nothing_twice(block: GEGLU, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plant(monkeypatch, lambda x: (calls.append(1), geglu_file.geglu_ref(x))[1])
    with fused(block, FusedGEGLU, OPS) as sites:
        block(rows())
        assert len(calls) == 1 and sites["geglu"].state == "active"


def test_what_may_be_a_cache_is_given_to_one_run_alone() -> None:
    block, x = FusedGEGLU(16, 32), rows()
    assert block.can_run_again((x, None, 3, (x, "silu", (x, 0.5))), {"mask": None, "attn": block})
    for cache in ([], [x], {}, {"keys": x}, (x, []), object(), iter([x])):
        assert not block.can_run_again((x, cache), {})
        assert not block.can_run_again((x,), {"cache": cache})


@torch.no_grad()
def test_a_fault_of_another_shape_is_found(block: GEGLU, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, lambda x: geglu_file.geglu_ref(x) * (1.01 if len(x) == 5 else 1))
    with fused(block, FusedGEGLU, OPS) as sites:
        block(rows())
        assert sites["geglu"].state == "active"
        other = rows(samples=5)
        assert relative_error(block(other), GEGLU.forward(block, other)) < 1e-6
        assert sites["geglu"].state == "failed"


@torch.no_grad()
def test_a_fault_that_starts_later_is_found(block: GEGLU, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def later(x: Tensor) -> Tensor:
        calls.append(1)
        return geglu_file.geglu_ref(x) * (1.01 if len(calls) > 10 else 1)

    plant(monkeypatch, later)
    with fused(block, FusedGEGLU, OPS) as sites:
        for _ in range(200):
            block(rows())
        assert sites["geglu"].state == "failed"


@torch.no_grad()
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_check_that_was_broken_off_is_made_up_for(
    block: GEGLU, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    calls = []

    def broken_off(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return 1.01 * geglu_file.geglu_ref(x)

    expected = block(rows())
    plant(monkeypatch, broken_off)
    with fused(block, FusedGEGLU, OPS) as sites:
        with pytest.raises(error):
            block(rows())
        assert torch.equal(block(rows()), expected)
        assert sites["geglu"].state == "failed"


@torch.no_grad()
def test_what_lies_between_the_ops_is_checked(block: GEGLU, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = block(rows())
    right = FusedGEGLU.fused_forward
    monkeypatch.setattr(FusedGEGLU, "fused_forward", lambda self, x: right(self, x) + 0.01)
    with fused(block, FusedGEGLU) as sites:
        assert torch.equal(block(rows()), expected)
        assert {site.state for site in sites.values()} == {"failed"}


@torch.no_grad()
def test_an_output_that_is_missing_fails_the_block(block: GEGLU, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = block(rows())
    monkeypatch.setattr(FusedGEGLU, "fused_forward", lambda self, x: None)
    with fused(block, FusedGEGLU) as sites:
        assert torch.equal(block(rows()), expected)
        assert all("returns 0 tensors, the original 1" in site.reason for site in sites.values())


@torch.no_grad()
@pytest.mark.parametrize("tokens", [50, MOST_WHOLE // 16 + 1], ids=["whole", "cut"])
def test_a_block_that_writes_to_its_input_fails_and_the_call_is_right(
    tokens: int, block: GEGLU, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: FusedGEGLU, x: Tensor) -> Tensor:
        out = right(self, x)
        x.mul_(1.3)
        return out

    x = torch.randn(1, tokens, 16)
    given, expected, right = x.clone(), block(x), FusedGEGLU.fused_forward
    monkeypatch.setattr(FusedGEGLU, "fused_forward", run)
    with fused(block, FusedGEGLU) as sites:
        assert torch.equal(block(x), expected) and torch.equal(x, given)
        assert {site.state for site in sites.values()} == {"failed"}
        assert all("changes its arguments" in site.reason for site in sites.values())


@torch.no_grad()
def test_no_child_runs_twice_where_it_may_do_more(block: GEGLU) -> None:
    calls = []
    block.proj.register_forward_hook(lambda *args: calls.append(1))
    with fused(block, FusedGEGLU, OPS):
        block(rows())
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize("stateful", ["random numbers", "a buffer"])
def test_nothing_in_training_mode_runs_twice(block: GEGLU, stateful: str) -> None:
    """Once more for a check would give the next layer other random numbers, or another buffer."""
    if stateful == "a buffer":
        parametrizations.spectral_norm(block.proj)
    else:
        block.proj = nn.Sequential(block.proj, nn.AlphaDropout())
    twin = copy.deepcopy(block).train()
    block.train()
    torch.manual_seed(0)
    expected = [twin(rows()), torch.rand(3)]
    with fused(block, FusedGEGLU, OPS):
        torch.manual_seed(0)
        assert relative_error(block(rows()), expected[0]) <= 1e-5
        assert torch.equal(torch.rand(3), expected[1])
    assert all(map(torch.equal, block.buffers(), twin.buffers()))


@torch.no_grad()
def test_a_users_error_comes_through(block: GEGLU) -> None:
    def interrupt(*args: object) -> None:
        raise RuntimeError("the user says stop")

    block.proj.register_forward_hook(interrupt)
    with fused(block, FusedGEGLU, OPS), pytest.raises(RuntimeError, match="the user says stop"):
        block(rows())


@torch.no_grad()
def test_a_site_is_switched_in_place(block: GEGLU, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    plant(monkeypatch, lambda x: (ran.append(1), geglu_file.geglu_ref(x))[1])
    with fused(block, FusedGEGLU, OPS) as sites:
        site = sites["geglu"]
        for on, state, grows in ((True, "active", True), (False, "off", False), (True, "active", True)):
            site.on = on
            before = len(ran)
            block(rows())
            assert site.state == state and (len(ran) > before) == grows


@torch.no_grad()
def test_copies_and_new_ones_of_the_class_are_stock(block: GEGLU) -> None:
    expected = block(rows())
    with fused(block, FusedGEGLU):
        file = io.BytesIO()
        torch.save(block, file)
        file.seek(0)
        twins = [copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(file, weights_only=False)]
        new = type(block)(16, 32)
        new.load_state_dict(block.state_dict())
    for twin in twins:
        assert type(twin) is GEGLU and torch.equal(twin(rows()), expected)
    assert torch.equal(new(rows()), expected)


@torch.no_grad()
def test_a_bound_forward_outlives_the_site(block: GEGLU) -> None:
    expected = block(rows())
    with fused(block, FusedGEGLU):
        kept = block.forward
        kept(rows())
    assert type(block) is GEGLU
    assert torch.equal(kept(rows()), expected)


@torch.no_grad()
def test_a_module_that_was_replaced_stays(block: GEGLU) -> None:
    with fused(block, FusedGEGLU) as sites:
        block.__class__ = type("Mine", (GEGLU,), {})
        assert sites["geglu"].state == "left alone" and "Mine" in sites["geglu"].reason
    assert type(block).__name__ == "Mine" and isinstance(block, nn.Module)


@torch.no_grad()
def test_a_class_derived_from_the_fused_one(block: GEGLU) -> None:
    """As parametrizations make one: the fused code runs, the report says so, and leaves stock's class below."""
    expected = block(rows())
    with fused(block, FusedGEGLU) as sites:
        block.__class__ = type("Derived", (type(block),), {})
        assert plain_reason(block, GEGLU), "a parent calls it"
        assert relative_error(block(rows()), expected) <= 1e-5
        assert {site.state for site in sites.values()} == {"active"}
    assert type(block).__bases__ == (GEGLU,)
    assert torch.equal(block(rows()), expected)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


@torch.no_grad()
def test_a_copy_of_what_was_parametrized_has_no_sites_and_is_left_alone() -> None:
    """PyTorch copies it, with the class that is derived from the fused one, and with all attributes."""
    norm = nn.GroupNorm(4, 16)
    x = torch.randn(2, 16, 5, 5)
    with fused(norm, FusedGroupNorm):
        register_parametrization(norm, "weight", Half())
        expected = norm(x)
        twin = copy.deepcopy(norm)
        assert getattr(twin, SITES) is None
        assert Swap(FusedGroupNorm).left_alone_reason(twin)
        assert relative_error(twin(x), expected) <= 1e-6
    assert type(twin).__bases__ == (nn.GroupNorm,) and relative_error(twin(x), expected) <= 1e-6


@torch.no_grad()
def test_a_class_derived_twice_from_the_fused_one(block: GEGLU) -> None:
    """As parametrizations and FSDP together make it."""
    expected = block(rows())
    with fused(block, FusedGEGLU):
        block.__class__ = type("Derived", (type("Base", (type(block),), {}),), {})
    assert type(block).__mro__[2] is GEGLU
    assert torch.equal(block(rows()), expected)
