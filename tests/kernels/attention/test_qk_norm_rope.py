from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import triton
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
from torch import Tensor, nn

from vidaccel.kernels import check
from vidaccel.kernels.attention import qk_norm_rope as op
from vidaccel.kernels.attention.qk_norm_rope import (
    QK_NORM_ROPE,
    HeadNorm,
    Rope,
    SecondStream,
    Tiling,
    choose_tiling,
    qk_norm_rope,
)
from vidaccel.kernels.op import listening

EPS = 1e-6


class Case(NamedTuple):
    """What a model, or a test, calls the op with."""

    tokens: int
    heads: int
    head_dim: int
    norm: str = "rms_all"
    rope: str = "pairs"
    batch: int = 1
    rounding: str = "once"
    start: int = 0
    tables: str = "shared"
    second: int = 0
    second_first: bool = False
    keys: bool = True
    layout: str = "contiguous"
    parameters: str = "alike"
    centre: float = 0.0


# the default settings of each
MODELS = {
    "wan-1.3b": Case(32760, 12, 128),
    "wan-5b": Case(27280, 24, 128),
    "wan-14b": Case(75600, 40, 128),
    "wan-1.3b-cross": Case(32760, 12, 128, rope="none", keys=False),
    "ltx": Case(7392, 32, 64, batch=2, tables="per-head"),
    "ltx-2": Case(6144, 32, 128, rope="halves", batch=2, tables="permuted"),
    "hunyuan-1.5": Case(49290, 16, 128, "rms_head", rounding="each", second=64),
    "hunyuan": Case(30000, 24, 128, "rms_head", rounding="each", second=256),
    "cogvideox-5b": Case(17776, 48, 64, "layer_head", batch=2, start=226),
    "cogvideox-2b": Case(17776, 30, 64, "layer_head", "none", batch=2),
    "cosmos": Case(6000, 16, 128, "rms_head", "halves"),
    "mochi": Case(6360, 24, 128, "rms_head", batch=2, tables="per-head"),
}
MODEL = pytest.mark.parametrize("model", MODELS)
FEW_TOKENS = {name: case._replace(tokens=3, start=min(case.start, 2), second=min(case.second, 2))
              for name, case in MODELS.items()}  # fmt: skip

TABLES: dict[str, Callable[[Case, int, torch.device], Tensor]] = {
    "shared": lambda case, s, device: torch.rand(1, s, 1, case.head_dim // 2, device=device),
    "per-head": lambda case, s, device: torch.rand(1, s, case.heads, case.head_dim // 2, device=device),
    "per-sample": lambda case, s, device: torch.rand(case.batch, s, 1, case.head_dim // 2, device=device),
    "permuted": lambda case, s, device: torch.rand(
        case.batch, case.heads, s, case.head_dim // 2, device=device
    ).transpose(1, 2),
    "every-other": lambda case, s, device: torch.rand(1, s, 1, case.head_dim, device=device)[..., ::2],
}
LAYOUTS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "contiguous": lambda q, k, v: (q, k, v),
    "packed": lambda q, k, v: torch.cat([q, k, v], dim=-1).chunk(3, dim=-1),
    "strided-tokens": lambda q, k, v: tuple(x.repeat_interleave(2, 1)[:, ::2] for x in (q, k, v)),
    "strided-channels": lambda q, k, v: tuple(x.repeat_interleave(2, -1)[..., ::2] for x in (q, k, v)),
}


def draw(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments of :func:`qk_norm_rope`."""
    torch.manual_seed(0)
    channels = case.heads * case.head_dim

    def rows(tokens: int) -> tuple[Tensor, ...]:
        qkv = (torch.randn(case.batch, tokens, channels, device=device) + case.centre for _ in range(3))
        return LAYOUTS[case.layout](*(x.to(dtype) for x in qkv))

    def norm() -> HeadNorm:
        width = channels if case.norm == "rms_all" else case.head_dim
        of = torch.float32 if case.parameters == "float32" else dtype
        weights = [torch.randn(width, device=device).to(of) for _ in range(4)]
        if case.parameters == "none" or case.norm == "none":
            weights = [None] * 4  # type: ignore[list-item]
        biases = weights[2:] if case.norm == "layer_head" else (None, None)
        return HeadNorm(case.norm, EPS, *weights[:2], *biases, case.rounding)  # type: ignore[arg-type]

    q, k, v = rows(case.tokens)
    arguments: dict[str, Any] = {"q": q, "k": k, "num_heads": case.heads, "norm": norm()}
    if case.rope != "none":
        angles = TABLES[case.tables](case, case.tokens - case.start, device) * 6
        cos, sin = angles.cos(), angles.sin()
        if case.tables == "every-other":
            cos, sin = (t.repeat_interleave(2, -1)[..., ::2] for t in (cos, sin))
        arguments["rope"] = Rope(case.rope, cos, sin, case.start)  # type: ignore[arg-type]
    if case.second:
        arguments["v"] = v
        arguments["second"] = SecondStream(*rows(case.second), norm(), case.second_first)
    if not case.keys:
        arguments["k"] = None
    return arguments


def double(x: Any) -> Any:
    """``x`` with all the tensors in it in float64."""
    if isinstance(x, dict):
        return {name: double(value) for name, value in x.items()}
    if isinstance(x, tuple):
        return type(x)(*map(double, x))  # one of the op's named tuples
    return x.double() if isinstance(x, Tensor) else x


def assert_matches_reference(outputs: list[Tensor], arguments: dict[str, Any]) -> None:
    eager = qk_norm_rope(**arguments, impl="torch")
    gold = qk_norm_rope(**double(arguments), impl="torch")
    assert len(outputs) == len(eager)
    for ours, theirs, exact in zip(outputs, eager, gold, strict=True):
        assert ours.is_contiguous()
        assert_close_to_gold(ours, exact, theirs)
        assert_rounded_alike(ours, theirs)


def assert_rounded_alike(ours: Tensor, theirs: Tensor) -> None:
    """Rounded at other places, a good part of the numbers would differ; so few do where float32 lies near a tie."""
    if ours.dtype != torch.float32:
        assert int((ours != theirs).sum()) <= max(3, 0.01 * ours.numel())


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each sample, where it does not matter: the interpreter takes its time for each."""
    monkeypatch.setattr(op, "choose_tiling", lambda heads, *_: Tiling(16, triton.next_power_of_2(heads), 4))


FACTORS: dict[str, list[Any]] = {
    "norm": ["rms_all", "rms_head", "layer_head", "none"],
    "rope": ["pairs", "halves", "none"],
    "rounding": ["once", "each"],
    "start": [0, 3],
    "tables": list(TABLES),
    "second": [0, 4],
    "second_first": [False, True],
    "layout": list(LAYOUTS),
    "parameters": ["alike", "float32", "none"],
    "batch": [1, 2],
    "heads": [1, 3, 4],
    "head_dim": [4, 64, 72, 96, 128],
    "tokens": [4, 7],
    "dtype": DTYPES,
}


def pairwise(factors: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Few combinations in which every two values of two factors meet."""
    rng = random.Random(0)
    open_pairs = {
        ((one, i), (other, j))
        for one, other in itertools.combinations(factors, 2)
        for i in range(len(factors[one]))
        for j in range(len(factors[other]))
    }
    while open_pairs:
        drawn = [{name: rng.randrange(len(values)) for name, values in factors.items()} for _ in range(100)]
        # the first of them is made to hold an open pair, so that there will be an end
        drawn[0] |= dict(min(open_pairs))
        covered = [set(itertools.combinations(candidate.items(), 2)) & open_pairs for candidate in drawn]
        best = max(range(len(drawn)), key=lambda i: len(covered[i]))
        open_pairs -= covered[best]
        yield {name: factors[name][i] for name, i in drawn[best].items()}


def named(factors: dict[str, Any]) -> Any:
    factors = dict(factors)
    dtype = factors.pop("dtype")
    words = [name.replace("_", "-") if value is True else str(value) for name, value in factors.items() if value]
    return pytest.param(Case(**factors), dtype, id="-".join([*words, str(dtype).removeprefix("torch.")]))


@pytest.mark.parametrize(("case", "dtype"), [*map(named, pairwise(FACTORS))])
def test_matches_reference(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    arguments = draw(case, dtype, device)
    assert_matches_reference(qk_norm_rope(**arguments, impl="triton"), arguments)


@MODEL
def test_matches_reference_at_the_widths_of_models(model: str, device: torch.device) -> None:
    arguments = draw(FEW_TOKENS[model], torch.float16, device)
    assert_matches_reference(qk_norm_rope(**arguments, impl="triton"), arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["rms_all", "layer_head"])
def test_off_centre(norm: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = draw(Case(7, 3, 64, norm, centre=30.0), dtype, device)
    assert_matches_reference(qk_norm_rope(**arguments, impl="triton"), arguments)


def test_reference_norms_as_pytorch_does(device: torch.device) -> None:
    case = Case(5, 3, 8, rope="none")
    for kind, width in (("rms_all", 24), ("rms_head", 8), ("layer_head", 8)):
        arguments = draw(case._replace(norm=kind), torch.float64, device)
        module = nn.LayerNorm(width, EPS) if kind == "layer_head" else nn.RMSNorm(width, EPS)
        module.to(device, torch.float64)
        norm = arguments["norm"]
        module.weight.data = norm.weight_q
        if kind == "layer_head":
            module.bias.data = norm.bias_q
        rows = arguments["q"] if kind == "rms_all" else arguments["q"].unflatten(2, (3, 8))
        q, _ = qk_norm_rope(**arguments, impl="torch")
        torch.testing.assert_close(q, module(rows).view_as(q))


def test_reference_rounds_each_step_or_once(device: torch.device) -> None:
    arguments = draw(Case(5, 3, 64, "rms_head", "none"), torch.float16, device)
    norm, q = arguments["norm"], arguments["q"].unflatten(2, (3, 64))
    normed = nn.functional.rms_norm(q.float(), (64,), eps=EPS)
    once, _ = qk_norm_rope(**arguments, impl="torch")
    each, _ = qk_norm_rope(**{**arguments, "norm": norm._replace(rounding="each")}, impl="torch")
    assert torch.equal(once, (normed * norm.weight_q.float()).half().view_as(once))
    assert torch.equal(each, (normed.half() * norm.weight_q).view_as(each))
    assert not torch.equal(once, each)


def test_reference_turns_pairs_and_halves(device: torch.device) -> None:
    arguments = draw(Case(5, 3, 8, "none", batch=2, start=2), torch.float64, device)
    rope = arguments["rope"]
    q, _ = qk_norm_rope(**arguments, impl="torch")
    heads = arguments["q"].unflatten(2, (3, 4, 2))
    turned = torch.view_as_complex(heads[:, 2:].contiguous()) * torch.complex(rope.cos, rope.sin)
    torch.testing.assert_close(q[:, 2:], torch.view_as_real(turned).flatten(2))
    assert torch.equal(q[:, :2], arguments["q"][:, :2])
    # channel i beside channel i + D/2 is what the other kind turns
    apart = {**arguments, "rope": rope._replace(kind="halves"), "q": heads.transpose(3, 4).flatten(2)}
    halves, _ = qk_norm_rope(**apart, impl="torch")
    torch.testing.assert_close(halves.unflatten(2, (3, 2, 4)).transpose(3, 4).flatten(2), q)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("first", [False, True], ids=["behind", "before"])
def test_streams_lie_one_behind_the_other(first: bool, impl: str, device: torch.device) -> None:
    case = Case(3, 3, 64, "rms_head", batch=2, second=2, second_first=first)
    arguments = draw(case, torch.float16, device)
    second = arguments["second"]
    joint = qk_norm_rope(**arguments, impl=impl)
    own = qk_norm_rope(arguments["q"], arguments["k"], 3, arguments["norm"], arguments["rope"], impl=impl)
    other = qk_norm_rope(second.q, second.k, 3, second.norm, impl=impl)
    for out, *streams in zip(joint, [*own, arguments["v"]], [*other, second.v], strict=True):
        assert torch.equal(out, torch.cat(streams[::-1] if first else streams, dim=1))


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("rope", ["pairs", "none"])
def test_queries_alone(rope: str, impl: str, device: torch.device) -> None:
    arguments = draw(Case(5, 3, 64, rope=rope), torch.float16, device)
    q, _ = qk_norm_rope(**arguments, impl=impl)
    (alone,) = qk_norm_rope(**{**arguments, "k": None}, impl=impl)
    assert torch.equal(alone, q)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_change_the_result(layout: str, device: torch.device) -> None:
    case = Case(3, 3, 64, "rms_head", batch=2, second=2)
    expected = qk_norm_rope(**draw(case, torch.float16, device), impl="triton")
    arguments = draw(case._replace(layout=layout), torch.float16, device)
    norm, rope = arguments["norm"], arguments["rope"]
    arguments["norm"] = norm._replace(weight_q=norm.weight_q.repeat_interleave(2)[::2])
    arguments["rope"] = rope._replace(sin=rope.sin.expand(2, 3, 3, 32))
    for ours, theirs in zip(qk_norm_rope(**arguments, impl="triton"), expected, strict=True):
        assert torch.equal(ours, theirs) and ours.is_contiguous()


TILINGS = [
    pytest.param(Tiling(1, 4, 2), id="one-token"),
    pytest.param(Tiling(4, 1, 1), id="tokens-of-one-head"),
    pytest.param(Tiling(16, 2, 4), id="more-tokens-than-there-are"),
    pytest.param(Tiling(2, 2, 2), id="tokens-of-two-heads"),
    pytest.param(Tiling(1, 8, 2), id="more-heads-than-there-are"),
]


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(5, 3, 64, batch=2, tables="per-head", start=2), id="per-head"),
        pytest.param(Case(3, 3, 64, "layer_head", "halves", batch=2, second=2), id="joint"),
    ],
)
def test_result_does_not_depend_on_the_cut(case: Case, tiling: Tiling, device: torch.device) -> None:
    arguments = draw(case, torch.float16, device)
    with mock.patch.object(op, "choose_tiling", return_value=tiling):
        outputs = qk_norm_rope(**arguments, impl="triton")
    assert_matches_reference(outputs, arguments)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning:triton.runtime.interpreter")
def test_tokens_that_do_not_turn_stay_as_they_are(device: torch.device) -> None:
    """Infinite ones too, which a multiplication by 0 would make NaN."""
    arguments = draw(Case(5, 3, 64, "none", start=2), torch.float16, device)
    arguments["q"][:, 0, 7] = torch.inf
    q, _ = qk_norm_rope(**arguments, impl="triton")
    assert torch.equal(q[:, :2], arguments["q"][:, :2])


@pytest.mark.parametrize("case", [Case(0, 3, 64), Case(5, 3, 64, batch=0)], ids=["no-tokens", "no-samples"])
def test_empty_input(case: Case, device: torch.device) -> None:
    arguments = draw(case, torch.float16, device)
    outputs = qk_norm_rope(**arguments)
    assert [out.shape for out in outputs] == [arguments["q"].shape] * 2
    with pytest.raises(ValueError, match="impl='triton' cannot run: there is nothing to norm"):
        qk_norm_rope(**arguments, impl="triton")


def test_an_empty_second_stream(device: torch.device) -> None:
    arguments = draw(Case(5, 3, 64, second=1), torch.float16, device)
    second = arguments["second"]
    arguments["second"] = second._replace(q=second.q[:, :0], k=second.k[:, :0], v=second.v[:, :0])
    assert [out.shape for out in qk_norm_rope(**arguments)] == [(1, 5, 192)] * 3


def _gradient(arguments: dict[str, Any]) -> None:
    arguments["norm"].weight_q.requires_grad_(True)


def _wide_values(arguments: dict[str, Any]) -> None:
    arguments["v"] = arguments["v"].float()


def _one_weight(arguments: dict[str, Any]) -> None:
    arguments["norm"] = arguments["norm"]._replace(weight_k=None)


def _nothing(arguments: dict[str, Any]) -> None:
    pass


@pytest.mark.parametrize(
    ("case", "dtype", "change", "reason"),
    [
        pytest.param(Case(3, 2, 8), torch.float64, _nothing, "x is torch.float64", id="float64"),
        pytest.param(Case(3, 65, 128), torch.float16, _nothing, "up to H*D=8192, got H*D=8320", id="wide"),
        pytest.param(Case(3, 2, 7, rope="none"), torch.float16, _nothing, "an even number of", id="odd-heads"),
        pytest.param(Case(3, 2, 8), torch.float16, _gradient, "no backward pass", id="gradient"),
        pytest.param(
            Case(3, 2, 8, second=2), torch.float16, _wide_values,
            "must have the dtype of q, torch.float16, got torch.float32", id="mixed-dtypes",
        ),
        pytest.param(Case(3, 2, 8), torch.float16, _one_weight, "where that of k has none", id="one-weight"),
    ],
)  # fmt: skip
def test_unserved_input_runs_in_torch(
    case: Case, dtype: torch.dtype, change: Callable[[dict[str, Any]], None], reason: str, device: torch.device
) -> None:
    arguments = draw(case, dtype, device)
    change(arguments)
    with listening() as events:
        outputs = qk_norm_rope(**arguments)
    assert [event.implementation for event in events] == ["torch"] and reason in events[0].reason
    assert all(map(torch.equal, outputs, qk_norm_rope(**arguments, impl="torch")))
    with pytest.raises(ValueError, match=f"qk_norm_rope: impl='triton' cannot run: .*{re.escape(reason)}"):
        qk_norm_rope(**arguments, impl="triton")


ROWS = torch.ones(2, 3, 32)
TABLE = torch.ones(1, 3, 1, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(3, 32)}, r"q must be \[B, S, H\*D\], got \(3, 32\)"),
        ({"k": torch.ones(2, 4, 32)}, r"q and k must be \[B, S, H\*D\] alike, got \(2, 3, 32\) .* and \(2, 4, 32\)"),
        ({"k": ROWS.half()}, r"alike, got \(2, 3, 32\) torch.float32 and \(2, 3, 32\) torch.float16"),
        ({"num_heads": 3}, r"num_heads=3 must divide the H\*D=32 channels"),
        ({"num_heads": 0}, r"num_heads=0 must divide"),
        ({"norm": HeadNorm("rms")}, r"norm must be one of rms_all, rms_head, layer_head, none, got 'rms'"),
        ({"norm": HeadNorm("rms_all", rounding="twice")}, r"rounding must be one of once, each, got 'twice'"),
        ({"norm": HeadNorm("rms_all", 0, torch.ones(16))}, r"weight_q must be \[32\], got \(16,\)"),
        ({"norm": HeadNorm("rms_head", 0, None, torch.ones(32))}, r"weight_k must be \[16\], got \(32,\)"),
        ({"norm": HeadNorm("layer_head", 0, bias_q=torch.ones(1))}, r"bias_q must be \[16\], got \(1,\)"),
        ({"rope": Rope("thirds", TABLE, TABLE)}, r"rope must be one of pairs, halves, none, got 'thirds'"),
        ({"rope": Rope("pairs", TABLE[:, 1:], TABLE)}, r"cos must be \[B, 3, H, D/2\], got \(1, 2, 1, 8\)"),
        ({"rope": Rope("pairs", TABLE, TABLE, 1)}, r"cos must be \[B, 2, H, D/2\], got \(1, 3, 1, 8\)"),
        ({"rope": Rope("pairs", TABLE, TABLE[0])}, r"sin must be \[B, 3, H, D/2\], got \(3, 1, 8\)"),
        ({"rope": Rope("pairs", TABLE.expand(3, 3, 1, 8), TABLE)}, r"cos must be \[B, 3, H, D/2\], got \(3, 3, 1, 8\)"),
        ({"rope": Rope("pairs", TABLE, TABLE[..., :4])}, r"sin must hold D/2=8 angles, got 4"),
        ({"rope": Rope("pairs", TABLE, TABLE, -1)}, r"start must be a token of q, 0 to 3, got -1"),
        ({"second": SecondStream(ROWS, ROWS, ROWS[:, 1:], HeadNorm("none"))}, r"of the second stream must be"),
        ({"second": SecondStream(*[ROWS[..., :16]] * 3, HeadNorm("none"))}, r"of the second stream must be"),
        ({"second": SecondStream(ROWS, ROWS, ROWS, HeadNorm("none"))}, r"with a second stream, k and v must be given"),
        (
            {"second": SecondStream(ROWS, ROWS, ROWS, HeadNorm("none")), "v": ROWS, "k": None},
            r"with a second stream, k and v must be given",
        ),
        (
            {"second": SecondStream(ROWS, ROWS, ROWS, HeadNorm("none", 0, torch.ones(3))), "v": ROWS},
            r"second_weight_q must be \[32\], got \(3,\)",
        ),
        ({"impl": "cuda"}, r"impl must be one of triton, torch, got 'cuda'"),
    ],
)
def test_rejects(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"q": ROWS, "k": ROWS, "num_heads": 2, "norm": HeadNorm("rms_all")}
    with pytest.raises(ValueError, match=f"qk_norm_rope: .*{message}"):
        qk_norm_rope(**arguments | change)


REGISTERED = [
    pytest.param(Case(5, 3, 8, batch=2), id="pair"),
    pytest.param(Case(5, 3, 8, "layer_head", "halves", start=2, layout="packed"), id="packed"),
    pytest.param(Case(5, 3, 8, "rms_head", second=4, layout="strided-channels"), id="joint"),
    pytest.param(Case(5, 3, 8, rope="none", keys=False), id="alone"),
]


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("case", REGISTERED)
def test_registration(case: Case, device: torch.device) -> None:
    heard: list[tuple[Any, ...]] = []
    with mock.patch.object(op, "QK_NORM_ROPE", lambda *args, impl: heard.append(args)):
        qk_norm_rope(**draw(case, torch.float32, device))
    torch.library.opcheck(QK_NORM_ROPE.registered["triton"], heard[0])


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("case", REGISTERED)
def test_compiles_fullgraph(case: Case, device: torch.device) -> None:
    arguments = draw(case, torch.float32, device)

    def combine(q: Tensor) -> Tensor:
        outputs = qk_norm_rope(**{**arguments, "q": q}, impl="triton")
        return outputs[0] + 2 * outputs[-1]

    compiled = torch.compile(combine, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments["q"]), combine(arguments["q"]))


CHECKED = [
    pytest.param(Case(9, 3, 64, batch=2, start=2, tables="per-sample"), id="pair"),
    pytest.param(Case(9, 3, 64, "rms_head", batch=2, second=4, tables="per-head"), id="text-behind"),
    pytest.param(Case(9, 3, 64, "layer_head", batch=2, second=4, second_first=True, start=3), id="text-before"),
]
PARTS = pytest.mark.parametrize("most", [2**23, 1000, 200], ids=["whole", "some-tokens", "one-token"])


@pytest.mark.usefixtures("few_programs")
@PARTS
@pytest.mark.parametrize("case", [*CHECKED, pytest.param(Case(9, 3, 64, keys=False), id="alone")])
def test_a_right_result_is_found_right(
    case: Case, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    arguments = draw(case, torch.float16, device)
    with listening(checks=True) as events:
        outputs = qk_norm_rope(**arguments)
    assert [(event.implementation, event.problem) for event in events] == [("triton", "")]
    tables = sum(table.nbytes for table in arguments["rope"][1:3])
    assert events[0].costs.bytes == 2 * sum(out.nbytes for out in outputs) + tables


@PARTS
@pytest.mark.parametrize("case", CHECKED)
def test_parts_are_the_whole(case: Case, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    heard: list[tuple[Any, ...]] = []
    with mock.patch.object(op, "QK_NORM_ROPE", lambda *args, impl: heard.append(args)):
        qk_norm_rope(**draw(case, torch.float64, device))
    outputs = tuple(QK_NORM_ROPE.reference(*heard[0]))
    assert QK_NORM_ROPE.parts is not None
    parts = list(QK_NORM_ROPE.parts(*heard[0]))
    assert len(parts) > 1 or most == 2**23
    for part in parts:
        for ours, theirs in zip(part.of(outputs), QK_NORM_ROPE.reference(*part.args), strict=True):
            assert torch.equal(ours, theirs)
    assert sum(part.of(outputs)[0].numel() for part in parts) == outputs[0].numel()


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("most", [2**23, 1000], ids=["whole", "in-parts"])
@pytest.mark.parametrize("output", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(
    fault: str, output: int, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", most)
    arguments = draw(Case(9, 3, 64, "rms_head", batch=2, second=4), torch.float16, device)
    spoil = FAULTS[fault]
    with (
        planted(QK_NORM_ROPE, "triton", lambda outputs: spoil(outputs[output])),
        listening(checks=True) as events,
    ):
        outputs = qk_norm_rope(**arguments)
    assert events[0].problem
    assert all(map(torch.equal, outputs, qk_norm_rope(**arguments, impl="torch")))


def _turned_the_other_way(arguments: dict[str, Any]) -> None:
    rope = arguments["rope"]
    arguments["rope"] = rope._replace(sin=-rope.sin)


def _turned_by_the_angle_before(arguments: dict[str, Any]) -> None:
    rope = arguments["rope"]
    arguments["rope"] = rope._replace(cos=rope.cos.roll(1, 1), sin=rope.sin.roll(1, 1))


def _other_kind(arguments: dict[str, Any]) -> None:
    arguments["rope"] = arguments["rope"]._replace(kind="halves")


def _starts_later(arguments: dict[str, Any]) -> None:
    kind, cos, sin, start = arguments["rope"]
    arguments["rope"] = Rope(kind, cos[:, 1:], sin[:, 1:], start + 1)


def _other_weight(arguments: dict[str, Any]) -> None:
    norm = arguments["norm"]
    arguments["norm"] = norm._replace(weight_q=norm.weight_k, weight_k=norm.weight_q)


def _normed_by_head(arguments: dict[str, Any]) -> None:
    norm = arguments["norm"]
    arguments["norm"] = HeadNorm("rms_head", EPS, norm.weight_q[:64], norm.weight_k[:64])


@pytest.mark.parametrize(
    "mistake",
    [
        _turned_the_other_way,
        _turned_by_the_angle_before,
        _other_kind,
        _starts_later,
        _other_weight,
        _normed_by_head,
    ],
)
def test_a_mistake_is_found(mistake: Callable[[dict[str, Any]], None], device: torch.device) -> None:
    arguments = draw(Case(9, 3, 64, start=2), torch.float16, device)
    mistaken = dict(arguments)
    mistake(mistaken)
    wrong = qk_norm_rope(**mistaken, impl="torch")

    def plant(outputs: list[Tensor]) -> None:
        for out, instead in zip(outputs, wrong, strict=True):
            out.copy_(instead)

    with planted(QK_NORM_ROPE, "triton", plant), listening(checks=True) as events:
        outputs = qk_norm_rope(**arguments)
    assert events[0].problem
    assert all(map(torch.equal, outputs, qk_norm_rope(**arguments, impl="torch")))


FOR_ALL_TARGETS = ["wan-14b", "hunyuan-1.5"]
FOR_NVIDIA = ["ltx", "ltx-2", "cogvideox-5b"]


def compiled(case: Case, target: str) -> dict[str, str]:
    operands = 1 + case.keys + bool(case.second)
    per_head = case.tables in ("per-head", "permuted")
    with mock.patch.object(op, "WARP_SIZE", TARGETS[target].warp_size):
        tiling = choose_tiling(case.heads, case.head_dim, 2, operands, case.rope == "halves", per_head)
    tables = () if case.rope == "none" else ("cos_ptr", "sin_ptr")
    names = op._qk_norm_rope_kernel.arg_names
    numbers = [name for name in names if name.startswith("stride_")]
    return compile_for(
        target,
        op._qk_norm_rope_kernel,
        {
            **dict.fromkeys((name for name in names if name.endswith("_ptr")), "*bf16:16"),
            **dict.fromkeys(tables, "*fp32:16"),
            **dict.fromkeys(("batch", "tokens", "start", "out_tokens", "out_start"), "i32"),
            **dict.fromkeys(numbers, "i32:16"),
            "eps": "fp32",
        },
        {
            **{"stride_t_d": 1, "OPERANDS": operands, "HEADS": case.heads, "HEAD_DIM": case.head_dim},
            **{"NORM": case.norm, "ROUNDS_EACH": case.rounding == "each"},
            **{"HAS_WEIGHT": True, "HAS_BIAS": case.norm == "layer_head"},
            **{"ROPE": case.rope, "TABLE_PER_HEAD": per_head, "HAS_START": case.start > 0},
            **{"BLOCK_M": tiling.block_m, "BLOCK_H": tiling.block_h},
            **{"BLOCK_D": triton.next_power_of_2(case.head_dim)},
        },
        num_warps=tiling.num_warps,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "target"),
    [
        *itertools.product(FOR_ALL_TARGETS, TARGETS),
        *itertools.product(FOR_NVIDIA, ("sm_80", "sm_90")),
        *itertools.product(sorted(MODELS.keys() - {*FOR_ALL_TARGETS, *FOR_NVIDIA}), ["sm_90"]),
    ],
)
def test_accesses_are_16_bytes_wide_and_pairs_stay_in_their_threads(model: str, target: str) -> None:
    asm = compiled(MODELS[model], target)
    assert_no_spills(asm)
    assert not narrow_accesses(asm)
    if "sass" in asm:
        # a sum over all heads goes from warp to warp; nothing else does
        sums = 2 if MODELS[model].norm == "rms_all" else 0
        assert len(re.findall(r"\bSTS\b", asm["sass"])) <= 2 * sums


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@MODEL
def test_real_shapes(model: str, dtype: torch.dtype, device: torch.device) -> None:
    case = MODELS[model]._replace(layout="packed")
    arguments = draw(case, dtype, device)
    outputs = qk_norm_rope(**arguments, impl="triton")
    for ours, theirs in zip(outputs, qk_norm_rope(**arguments, impl="torch"), strict=True):
        assert_rounded_alike(ours, theirs)
    # in float64 a few tokens: the first, some that lie apart, the last
    few = torch.tensor([0, 1, case.tokens // 2, case.tokens - 2, case.tokens - 1], device=device)
    rope: Any = arguments.get("rope")
    for own in few.split(1):
        part = {**arguments, **{name: arguments[name][:, own] for name in "qk" if arguments[name] is not None}}
        part.pop("v", None), part.pop("second", None)
        if rope is not None:
            turning = own[own >= rope.start] - rope.start
            part["rope"] = Rope(rope.kind, rope.cos[:, turning], rope.sin[:, turning], int(len(turning) == 0))
        eager = qk_norm_rope(**part, impl="torch")
        gold = qk_norm_rope(**double(part), impl="torch")
        for ours, theirs, exact in zip(outputs, eager, gold, strict=False):
            assert_close_to_gold(ours[:, own], exact, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("tables", ["shared", "per-head"])
def test_offsets_beyond_int32(tables: str, device: torch.device) -> None:
    arguments = draw(Case(2**17, 8, 128, batch=17, tables=tables), torch.bfloat16, device)
    assert arguments["q"].numel() > 2**31
    rope = arguments["rope"]
    outputs = qk_norm_rope(**arguments, impl="triton")
    last = qk_norm_rope(
        arguments["q"][-1:, -64:], arguments["k"][-1:, -64:], 8, arguments["norm"],
        rope._replace(cos=rope.cos[:, -64:], sin=rope.sin[:, -64:]), impl="triton",
    )  # fmt: skip
    assert all(torch.equal(out[-1:, -64:], part) for out, part in zip(outputs, last, strict=True))
