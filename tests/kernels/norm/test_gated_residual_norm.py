from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import (
    DTYPES,
    FAULTS,
    TARGETS,
    assert_close_to_gold,
    assert_no_spills,
    compile_for,
    narrow_accesses,
    planted,
)
from torch import Tensor

from vidaccel.kernels import check
from vidaccel.kernels.check import disagreement
from vidaccel.kernels.norm import gated_residual_norm as op
from vidaccel.kernels.norm.gated_residual_norm import (
    GATED_RESIDUAL_NORM,
    NO_NORM,
    Norm,
    gated_residual,
    gated_residual_norm,
    gated_residual_norm_ref,
    norm_modulate,
)
from vidaccel.kernels.op import listening
from vidaccel.kernels.settings import constants_overridden

EPS = 1e-6

SHAPES = [
    pytest.param((1, 1, 64), id="one-row"),
    pytest.param((2, 3, 1), id="one-channel"),
    pytest.param((3, 3, 42), id="odd-width"),
    pytest.param((2, 3, 320), id="ragged-blocks"),
    pytest.param((1, 4, 768), id="whole-blocks"),
]

Options = Mapping[str, Any]
DEFAULTS: Options = {
    "branch": True,
    "gate": True,
    "scale": True,
    "shift": True,
    "second": False,
    "row_of": "sample",  # of the modulation: "sample", "token", "stretch" (by rows), or "all": one for every sample
    "modulation": None,  # its dtype, if not that of x
    "kind": "layer",
    "weight": False,
    "bias": False,
    "branch_eps": None,
    "rounding": "once",
}
# What the blocks of the models call.
WAN = {"modulation": torch.float32}
MODELS: dict[str, Options] = {
    "wan-first": {**WAN, "branch": False, "gate": False},
    "wan": WAN,
    "wan-affine": {**WAN, "scale": False, "shift": False, "weight": True, "bias": True},
    "wan-plain-residual": {**WAN, "gate": False},
    "wan-last": {**WAN, "kind": "none", "scale": False, "shift": False},
    "wan-ti2v": {**WAN, "row_of": "stretch"},
    "ltx": {"kind": "rms", "rounding": "each"},
    "ltx-every-token": {"kind": "rms", "rounding": "each", "row_of": "token"},
    "ltx2": {"kind": "rms", "rounding": "each", "second": True},
    "hunyuan": {"rounding": "each"},
    "cogvideox": {"rounding": "each", "weight": True, "bias": True, "row_of": "stretch"},
    "mochi": {"kind": "rms", "rounding": "each", "shift": False, "branch_eps": 1e-5},
}
CHOICES: Mapping[str, tuple[Any, ...]] = {
    "branch": (True, False),
    "gate": (True, False),
    "scale": (True, False),
    "shift": (True, False),
    "second": (False, True),
    "row_of": ("sample", "token", "stretch", "all"),
    "modulation": (None, torch.float32),
    "kind": ("layer", "rms", "none"),
    "weight": (False, True),
    "bias": (False, True),
    "branch_eps": (None, 1e-5),
    "rounding": ("once", "each"),
}


def pairwise(draws: int = 1000) -> list[Options]:
    """Combinations in which every two choices that go together do so at least once."""
    generator, seen, found = random.Random(0), set(), []
    for _ in range(draws):
        options = {name: generator.choice(values) for name, values in CHOICES.items()}
        if not options["branch"]:
            options |= {"gate": False, "branch_eps": None, "kind": options["kind"].replace("none", "rms")}
        if options["kind"] == "none":
            options |= dict.fromkeys(("scale", "shift", "second", "weight"), False)
        if options["kind"] != "layer":
            options["bias"] = False
        pairs = set(itertools.combinations(options.items(), 2))
        if not pairs <= seen:
            seen |= pairs
            found.append(options)
    return found


COMBINATIONS = pairwise()


def called(options: Options) -> str:
    """Short names of what is not as in ``DEFAULTS``."""
    names = [
        name if value is True else f"no-{name}" if value is False else str(value).removeprefix("torch.")
        for name, value in options.items()
        if value != DEFAULTS[name]
    ]
    return "-".join(names) or "defaults"


def draw(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, options: Options, *, centre: float = 0.0
) -> tuple[Any, ...]:
    """The op's arguments; the modulation and the branch are slices of bigger tensors, as in the models."""
    chosen = {**DEFAULTS, **options}
    torch.manual_seed(0)
    samples, tokens, channels = shape
    count = {"sample": 1, "all": 1, "token": tokens, "stretch": 3}[chosen["row_of"]]
    modulations = torch.randn(1 if chosen["row_of"] == "all" else samples, count, 5, channels, device=device)
    names = ("gate", "scale", "shift", "scale2", "shift2")
    there = {**chosen, "scale2": chosen["second"], "shift2": chosen["second"]}
    row = {
        name: part if there[name] else None
        for name, part in zip(names, modulations.to(chosen["modulation"] or dtype).unbind(2), strict=True)
    }
    rows = None
    if chosen["row_of"] == "stretch":  # of the middle one, the last, the first, and the middle one again
        rows = torch.ones(tokens, dtype=torch.int32, device=device)
        rows[tokens // 3 : tokens // 2] = 2
        rows[tokens // 2 : 2 * tokens // 3] = 0
    x = (torch.randn(shape, device=device) + centre).to(dtype)
    branch = torch.randn(samples, tokens + 2, channels, device=device).to(dtype)[:, 2:]
    weight, bias = (torch.randn(channels, device=device).to(dtype) for _ in range(2))
    return (
        x, branch if chosen["branch"] else None, *row.values(), rows,
        chosen["kind"], EPS, weight if chosen["weight"] else None, bias if chosen["bias"] else None,
        chosen["branch_eps"], chosen["rounding"],
    )  # fmt: skip


def doubled(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def assert_matches_reference(outputs: list[Tensor], args: tuple[Any, ...]) -> None:
    eager = gated_residual_norm_ref(*args)
    call = op._Call(*args)
    assert len(outputs) == len(eager) and all(out.is_contiguous() for out in outputs)
    if call.branch is None:
        gold = gated_residual_norm_ref(*doubled(args))
    else:
        z = outputs[0]
        assert_close_to_gold(z, gated_residual_norm_ref(*doubled(args))[0], eager[0])
        exact = call.rounding == "each" or call.gate is None
        if exact and call.branch_eps is None and call.x.dtype != torch.float32:
            assert torch.equal(z, eager[0])
        # the norms are judged on the sum that both saw: its rounding would swamp the errors of the norms themselves
        alone = tuple(call._replace(x=z, branch=None, gate=None))
        gold = [z.double(), *(gated_residual_norm_ref(*doubled(alone)) if call.kind != "none" else ())]
        eager = [z, *(gated_residual_norm_ref(*alone) if call.kind != "none" else ())]
    for out, exact_out, eager_out in zip(outputs, gold, eager, strict=True):
        assert_close_to_gold(out, exact_out, eager_out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", COMBINATIONS, ids=called)
def test_matches_reference(options: Options, dtype: torch.dtype, device: torch.device) -> None:
    args = draw((2, 4, 42), dtype, device, options)
    assert_matches_reference(GATED_RESIDUAL_NORM(*args, impl="triton"), args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("model", ["wan", "cogvideox", "mochi"])
def test_matches_reference_at_any_size(
    model: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    args = draw(shape, dtype, device, MODELS[model], centre=30.0 if shape[2] > 1 else 0.0)
    assert_matches_reference(GATED_RESIDUAL_NORM(*args, impl="triton"), args)


def test_reference_is_what_its_docstring_says(device: torch.device) -> None:
    args = op._Call(*draw((2, 3, 42), torch.float64, device, {"second": True, "weight": True, "bias": True}))
    z, y, y2 = gated_residual_norm_ref(*args)
    torch.testing.assert_close(z, args.x + args.gate * args.branch)
    centred = z - z.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * args.weight + args.bias
    torch.testing.assert_close(y, normed * (1 + args.scale) + args.shift)
    torch.testing.assert_close(y2, normed * (1 + args.scale2) + args.shift2)
    z, y = gated_residual_norm_ref(*args._replace(kind="rms", bias=None, scale2=None, branch_eps=1e-3))
    small = args.branch / (args.branch.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(z, args.x + args.gate * small)
    normed = z / (z.square().mean(-1, keepdim=True) + EPS).sqrt() * args.weight
    torch.testing.assert_close(y, normed * (1 + args.scale) + args.shift)


def test_each_step_is_rounded_where_eager_stores_it(device: torch.device) -> None:
    """With these numbers each step that is not rounded, or two that are rounded as one, give another result."""
    torch.manual_seed(0)
    x, branch = (torch.randn(1, 4, 256, device=device).half() for _ in range(2))
    gate, scale, shift = (torch.randn(1, 1, 256, device=device).half() for _ in range(3))
    z = gated_residual(x, branch, gate, rounding="each", impl="triton")
    assert torch.equal(z, x + gate * branch)
    assert not torch.equal(z, gated_residual(x, branch, gate, rounding="once", impl="triton"))
    y = norm_modulate(z, Norm("rms", EPS), rounding="each", impl="triton")
    modulated = norm_modulate(z, Norm("rms", EPS), scale, shift, rounding="each", impl="triton")
    assert torch.equal(modulated, y * (1 + scale) + shift)
    assert not torch.equal(modulated, norm_modulate(z, Norm("rms", EPS), scale, shift, impl="triton"))


def test_public_functions_are_parts_of_one_op(device: torch.device) -> None:
    call = op._Call(*draw((2, 3, 42), torch.float16, device, {"second": True, "row_of": "stretch"}))
    norm, others = Norm("layer", EPS), {"rows": call.rows, "impl": "triton"}
    second = call.scale2, call.shift2
    z, y, y2 = gated_residual_norm(
        call.x, call.branch, call.gate, norm, call.scale, call.shift, second=second, **others
    )
    assert torch.equal(z, gated_residual(call.x, call.branch, call.gate, **others))
    assert torch.equal(y, norm_modulate(z, norm, call.scale, call.shift, **others))
    assert torch.equal(y2, norm_modulate(z, norm, *second, **others))


@pytest.mark.parametrize(("block_c", "programs", "stages"), [(64, 1, 3), (256, 1, 1), (512, 4, 2), (64, 99, 3)])
@pytest.mark.parametrize("row_of", ["sample", "token", "stretch"])
def test_result_does_not_depend_on_the_cut(
    row_of: str, block_c: int, programs: int, stages: int, device: torch.device
) -> None:
    """Rows of one block or several, one token or several to a program, a program for each token."""
    args = draw((2, 3, 200), torch.float32, device, {"row_of": row_of}, centre=30.0)
    with constants_overridden(BLOCK_C=block_c, PROGRAMS=programs, STAGES=stages):
        outputs = GATED_RESIDUAL_NORM(*args, impl="triton")
    assert_matches_reference(outputs, args)


def test_rows_may_change_at_every_token(device: torch.device) -> None:
    call = op._Call(*draw((1, 6, 42), torch.float16, device, {"row_of": "stretch"}))
    for dtype in (torch.int32, torch.int64):
        args = tuple(call._replace(rows=torch.tensor([2, 0, 1, 1, 2, 0], dtype=dtype, device=device)))
        with constants_overridden(PROGRAMS=1):
            assert_matches_reference(GATED_RESIDUAL_NORM(*args, impl="triton"), args)


def joint(x: Tensor) -> Tensor:
    """The last tokens of a longer tensor, and the first channels of a wider one."""
    return F.pad(x, (0, 24, 5, 0))[:, 5:, : x.shape[-1]]


LAYOUTS = {
    "slice": joint,
    "expanded": lambda x: x[:1, :1].expand(x.shape),
    "strided-channels": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "channels-first": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("row_of", ["token", "stretch"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_takes_any_strides(layout: Callable[[Tensor], Tensor], row_of: str, device: torch.device) -> None:
    call = op._Call(*draw((2, 2, 40), torch.float16, device, {"row_of": row_of, "second": True, "weight": True}))
    tensors = {name: getattr(call, name) for name in (*op._Call._fields[:7],)}
    laid_out = {name: layout(tensor) for name, tensor in tensors.items()}
    wide = torch.stack([call.weight, call.weight], 1)[:, 0]
    assert not laid_out["x"].is_contiguous() and not wide.is_contiguous()
    strided = GATED_RESIDUAL_NORM(*call._replace(**laid_out, weight=wide), impl="triton")
    same = {name: tensor.contiguous() for name, tensor in laid_out.items()}
    for out, expected in zip(strided, GATED_RESIDUAL_NORM(*call._replace(**same), impl="triton"), strict=True):
        assert torch.equal(out, expected) and out.is_contiguous()


def test_a_modulation_of_one_row_may_be_there_beside_one_of_every_token(device: torch.device) -> None:
    call = op._Call(*draw((2, 4, 42), torch.float16, device, {"row_of": "token"}))
    args = tuple(call._replace(gate=call.gate[:1, :1], shift=call.shift[:, :1].float()))
    assert_matches_reference(GATED_RESIDUAL_NORM(*args, impl="triton"), args)


@pytest.mark.parametrize("shape", [(0, 4, 64), (2, 0, 64)], ids=["no-samples", "no-tokens"])
def test_empty_input(shape: tuple[int, int, int], device: torch.device) -> None:
    args = draw(shape, torch.float16, device, {})
    with listening() as events:
        z, y = GATED_RESIDUAL_NORM(*args)
    assert z.shape == y.shape == shape and z.dtype == y.dtype == torch.float16
    assert [(event.implementation, event.reason) for event in events] == [("torch", "there are no rows")]


UNSERVED: dict[str, tuple[Callable[[op._Call], op._Call], str]] = {
    "float64": (lambda c: c._replace(x=c.x.double(), branch=c.branch.double()), "x is torch.float64"),
    "mixed-dtypes": (
        lambda c: c._replace(branch=c.branch.float()),
        "the branch must have the dtype of x, torch.float16, got torch.float32",
    ),
    "float64-modulation": (lambda c: c._replace(scale=c.scale.double()), "bfloat16 and float32, got torch.float64"),
    "gradient": (lambda c: c._replace(weight=c.gate[0, 0].clone().requires_grad_()), "no backward pass"),
    "wide": (
        lambda c: c._replace(x=c.x.repeat(1, 1, 129), branch=None, gate=None, scale=None, shift=None),
        "up to C=8192, got C=8256",
    ),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_unserved_input_runs_in_torch(case: str, device: torch.device) -> None:
    change, reason = UNSERVED[case]
    args = change(op._Call(*draw((1, 2, 64), torch.float16, device, {})))
    with listening() as events:
        outputs = GATED_RESIDUAL_NORM(*args)
    assert [event.implementation for event in events] == ["torch"] and reason in events[0].reason
    assert all(map(torch.equal, outputs, gated_residual_norm_ref(*args)))
    with pytest.raises(ValueError, match=f"gated_residual_norm: impl='triton' cannot run: .*{re.escape(reason)}"):
        GATED_RESIDUAL_NORM(*args, impl="triton")


def test_unserved_across_devices(device: torch.device) -> None:
    call = op._Call(*draw((1, 2, 64), torch.float16, device, {"row_of": "stretch"}))
    rows = torch.empty(2, dtype=torch.int32, device="meta")
    assert op._reason(*call._replace(rows=rows)) == f"x is on {call.x.device}, another tensor on meta"


X, ROW = torch.ones(2, 3, 32), torch.ones(2, 1, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 32)}, r"x must be \[B, S, C\], got \(2, 32\)"),
        ({"branch": torch.ones(2, 1, 32)}, r"branch must be \(2, 3, 32\), got \(2, 1, 32\)"),
        ({"gate": torch.ones(2, 2, 32)}, r"gate must be \[B, R, C\] with R=1 or S, or other R with rows"),
        ({"scale": torch.ones(3, 1, 32)}, r"scale must be \[B, R, C\] .*got \(3, 1, 32\) for x \(2, 3, 32\)"),
        ({"shift": torch.ones(2, 1, 16)}, r"shift must be \[B, R, C\]"),
        ({"second": (ROW, torch.ones(2, 32))}, r"shift2 must be \[B, R, C\]"),
        ({"second": (None, ROW)}, r"a second shift needs a second scale"),
        ({"rows": torch.ones(2, dtype=torch.int32)}, r"rows must be \[3\] int32, got \(2,\) torch.int32"),
        ({"rows": torch.ones(3)}, r"rows must be \[3\] int32, got \(3,\) torch.float32"),
        ({"norm": Norm("layer", EPS, torch.ones(16))}, r"weight must be \[32\], got \(16,\)"),
        ({"norm": Norm("layer", EPS, torch.ones(32), torch.ones(1))}, r"bias must be \[32\], got \(1,\)"),
        ({"norm": Norm("group", EPS)}, r"no such kind or rounding: 'group', 'once'"),
        ({"rounding": "twice"}, r"no such kind or rounding: 'layer', 'twice'"),
        ({"branch": None}, r"without a branch there is nothing to gate"),
        ({"branch": None, "gate": None, "norm": NO_NORM}, r"no norm means no work"),
        ({"impl": "cuda"}, r"impl must be one of triton, torch, got 'cuda'"),
    ],
)
def test_rejects(change: dict[str, Any], message: str) -> None:
    arguments = {"x": X, "branch": X, "gate": ROW, "norm": Norm("layer", EPS)}
    with pytest.raises(ValueError, match=f"gated_residual_norm: .*{message}"):
        gated_residual_norm(**{**arguments, **change})


TRACED = ["wan-first", "ltx2", "cogvideox", "wan-last"]


@pytest.mark.parametrize("model", TRACED)
def test_registration(model: str, device: torch.device) -> None:
    call = op._Call(*draw((2, 2, 42), torch.float16, device, MODELS[model]))
    for x in (call.x, call.x.mT.contiguous().mT):
        torch.library.opcheck(
            GATED_RESIDUAL_NORM.registered["triton"],
            tuple(call._replace(x=x)),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("model", TRACED)
def test_compiles_fullgraph(model: str, device: torch.device) -> None:
    args = draw((2, 2, 42), torch.float16, device, MODELS[model])

    def combine(x: Tensor) -> Tensor:
        outputs = GATED_RESIDUAL_NORM(x, *args[1:], impl="triton")
        return outputs[0] + 2 * outputs[-1]

    assert torch.equal(torch.compile(combine, fullgraph=True, backend="aot_eager")(args[0]), combine(args[0]))


@pytest.mark.parametrize(
    ("model", "most"),
    [*((model, 2**23) for model in MODELS), ("ltx2", 200), ("ltx-every-token", 200), ("wan-ti2v", 64)],
)
def test_a_right_result_is_found_right(
    model: str, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    args = draw((2, 3, 64), torch.float16, device, MODELS[model], centre=3.0)
    with listening(checks=True) as events:
        outputs = GATED_RESIDUAL_NORM(*args)
    assert [(event.implementation, event.problem) for event in events] == [("triton", "")]
    passes = args[0].nbytes * (1 + (args[1] is not None) + len(outputs))
    of_tokens = sum(t.nbytes for t in args[2:7] if t is not None and t.shape[1] > 1)
    assert events[0].costs.bytes == passes + of_tokens


@pytest.mark.parametrize("most", [2**23, 200], ids=["whole", "in-parts"])
@pytest.mark.parametrize("output", [0, 1, 2], ids=["sum", "norm", "second"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(
    fault: str, output: int, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    args = draw((2, 2, 64), torch.float16, device, MODELS["ltx2"])
    spoil = FAULTS[fault]
    with (
        planted(GATED_RESIDUAL_NORM, "triton", lambda outputs: spoil(outputs[output])),
        listening(checks=True) as events,
    ):
        outputs = GATED_RESIDUAL_NORM(*args)
    assert events[0].problem
    assert all(map(torch.equal, outputs, gated_residual_norm_ref(*args)))


TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}


def launch_of(channels: int, options: Options) -> tuple[op._Call, Any]:
    """A call of two clips, and what it launches."""
    call = op._Call(*draw((2, 32, 16), torch.bfloat16, torch.device("cpu"), options))
    wide = (
        torch.empty(*x.shape[:-1], channels, dtype=x.dtype, device="meta")
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in call
    )
    call = op._Call(*wide)
    return call, op._launch(call)


def compiled(target: str, channels: int, options: Options) -> tuple[Any, dict[str, str]]:
    """A launch, and what the compiler makes of its kernel."""
    call, launch = launch_of(channels, options)
    kernel = op._gated_residual_norm_kernel
    tensors = (*call[:8], call.weight, call.bias, None, None, None)
    types = [f"*{TYPES[(call.x if tensor is None else tensor).dtype]}:16" for tensor in tensors]
    types += ["i32", *("i32:16" for _ in launch._numbers[1:-2]), "fp32", "fp32"]
    constants = launch._constants
    asm = compile_for(
        target,
        kernel,
        dict(zip(kernel.arg_names, types, strict=False)),
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        num_warps=constants["num_warps"],
        enable_fp_fusion=constants["enable_fp_fusion"],
    )
    return launch, asm


WIDTHS = {"wan": 5120, "cogvideox": 3072, "wan-affine": 1536, "ltx-every-token": 2048, "ltx2": 4096, "mochi": 1920}
COMPILED = [
    *((target, "wan") for target in TARGETS),
    *((target, "cogvideox") for target in ("sm_80", "gfx942")),
    *(("sm_90", model) for model in WIDTHS if model != "wan"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "model"), COMPILED)
def test_accesses_are_16_bytes_wide_and_prefetched(target: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "LANES", TARGETS[target].warp_size)
    monkeypatch.setattr(op, "multiprocessors", lambda device: 2)  # one for each sample
    launch, asm = compiled(target, WIDTHS[model], MODELS[model])
    assert_no_spills(asm)
    # the row of the modulation that a token takes is one number
    scalars = ("LDG.E", "LDGSTS.E", "global_load_dword") if model == "cogvideox" else ()
    assert not [access for access in narrow_accesses(asm) if access not in scalars]
    if "sass" in asm:
        assert "LDGSTS" in asm["sass"], "the next rows are to be on their way while these are worked on"
    if target == "sm_90":
        registers = 8 * math.ceil((max(map(int, re.findall(r"\bR(\d+)\b", asm["sass"]))) + 1) / 8)
        programs = launch._grid[1]
        assert programs * registers * 32 * launch._constants["num_warps"] <= 2**16, "a second wave would come"


@pytest.mark.slow
def test_no_two_roundings_become_one_instruction() -> None:
    """On GPUs with products and sums in bfloat16 the compiler would make one fused operation of them."""
    _, asm = compiled("sm_90", 2048, MODELS["ltx"])
    assert "mul.rn.bf16" in asm["ptx"] and "add.rn.bf16" in asm["ptx"]
    assert not re.search(r"fma\.rn\.bf16", asm["ptx"])


REAL = {
    "wan-1.3b": ("wan", (1, 32760, 1536)),
    "wan-1.3b-first": ("wan-first", (1, 32760, 1536)),
    "wan-1.3b-affine": ("wan-affine", (1, 32760, 1536)),
    "wan-1.3b-last": ("wan-last", (1, 32760, 1536)),
    "wan-14b-720p": ("wan", (1, 75600, 5120)),
    "wan-14b-720p-affine": ("wan-affine", (1, 75600, 5120)),
    "wan-ti2v": ("wan-ti2v", (1, 27280, 3072)),
    "hunyuan-1.5": ("hunyuan", (1, 49290, 2048)),
    "ltx": ("ltx", (2, 7392, 2048)),
    "ltx-every-token": ("ltx-every-token", (2, 7392, 2048)),
    "ltx2": ("ltx2", (2, 6144, 4096)),
    "ltx2-audio": ("ltx2", (2, 126, 2048)),
    "cogvideox-2b": ("cogvideox", (2, 17776, 1920)),
    "cogvideox-5b": ("cogvideox", (2, 17776, 3072)),
    "mochi": ("mochi", (2, 6360, 3072)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL)
def test_real_shapes(case: str, device: torch.device) -> None:
    model, shape = REAL[case]
    args = draw(shape, torch.bfloat16, device, MODELS[model], centre=1.0)
    outputs = GATED_RESIDUAL_NORM(*args, impl="triton")
    assert disagreement(GATED_RESIDUAL_NORM, args, outputs, "math-exact") is None
    call, tokens = op._Call(*args), shape[1]
    some = torch.arange(0, tokens, max(tokens // 500, 1), device=device)
    some = torch.cat([some, torch.arange(tokens - 16, tokens, device=device)])
    part = call._replace(x=call.x[:, some], branch=None if call.branch is None else call.branch[:, some])
    if call.rows is not None:
        part = part._replace(rows=call.rows[some])
    elif call.scale is not None and call.scale.shape[1] > 1:
        part = part._replace(gate=call.gate[:, some], scale=call.scale[:, some], shift=call.shift[:, some])
    assert_matches_reference([out[:, some] for out in outputs], tuple(part))


@pytest.mark.gpu
def test_offsets_beyond_int32(device: torch.device) -> None:
    x = torch.randn(1, 2**17, 1024, device=device).half().repeat(17, 1, 1)
    assert x.numel() > 2**31
    gate = torch.randn(17, 1, 1024, device=device)
    z, y = gated_residual_norm(x, x, gate, Norm("rms", EPS), impl="triton")
    last = gated_residual_norm(x[-1:], x[-1:], gate[-1:], Norm("rms", EPS), impl="triton")
    assert torch.equal(z[-1:], last[0]) and torch.equal(y[-1:], last[1])
