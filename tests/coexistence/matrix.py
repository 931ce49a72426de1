"""One cell of the coexistence matrix: a feature, a family, an order; what comes of it, and what must not.

A cell is tried twice on new pipelines, patched and unpatched, step by step alike: with the feature on, with the
patch taken away while it is on, with it undone; then once more the other way round: undone under the patch, the patch
taken away at last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from coexistence.families import ROUNDED, build
from coexistence.feature import MATH_EXACT, Feature, Subject, Undo
from torch import Tensor

from vidaccel import patch_pipeline
from vidaccel.kernels.op import listening
from vidaccel.patching.report import PatchReport

__all__ = ["ORDERS", "Outcome", "outcome"]

SEEN = 5e-6  # of the norm of a stock clip: a feature of one of two transformers changes it by 1e-5, none by nothing
ORDERS = ("before", "after")  # the feature is turned on before the patch, or after it
EIGHT_BITS = 1e-3  # where its pixels have been rounded, of which few may be rounded another way


class Outcome(NamedTuple):
    """What came of a cell.

    Attributes:
        kind: ``same`` (bit for bit), ``equal`` (within the class of the sites), ``partly`` (equal; some sites went the
            original way), ``original`` (equal; every site did), ``n/a`` (stock diffusers cannot do it either).
        reasons: Why sites went the original way, or why stock cannot.
    """

    kind: str
    reasons: tuple[str, ...] = ()


class _Unable(Exception):
    """Stock diffusers cannot do it."""


class _Stock(NamedTuple):
    """What the unpatched pipeline gives with the feature on, and when it has been undone."""

    on: Tensor
    undone: Tensor


def outcome(feature: Feature, family: str, order: str) -> Outcome:
    """Try a cell.

    Raises:
        AssertionError: It is silently different, or goes the original way for a reason that ``feature`` does not name.
    """
    try:
        stock = _stock(feature, family)
    except _Unable as reason:
        return Outcome("n/a", (str(reason),))
    subject = build(family)
    report, undo = _both(feature, subject, order)
    first = feature.run(subject)
    with listening() as events:
        second = feature.run(subject)
    gold = _plain(family) if feature.rounds else None
    for out, which in ((first, "first"), (second, "second")):
        _assert_near(out, stock.on, f"in the {which} run with it on", _limit(feature.limit, family), gold)
    reasons = _reasons(report) - _plain_reasons(family)
    _assert_documented(feature, report, reasons)
    report.restore()
    _assert_stocks(feature, feature.run(subject), stock.on, "restored with it on")
    if undo is not None:
        undo()
        _assert_stocks(feature, subject.clip(), stock.undone, "undone")
        if not feature.slow and not feature.drifts:
            _second_round(feature, subject, order, stock.undone)
    if reasons:
        return Outcome("partly" if events else "original", tuple(sorted(reasons)))
    return Outcome("same" if torch.equal(first, stock.on) and torch.equal(second, stock.on) else "equal")


def _second_round(feature: Feature, subject: Subject, order: str, plain: Tensor) -> None:
    """The feature is undone while the pipeline is patched, and the patch is taken away last."""
    report, undo = _both(feature, subject, order)
    assert undo is not None
    undo()
    _assert_near(subject.clip(), plain, "undone under the patch", _limit(MATH_EXACT, subject.family))
    assert not any(site.state == "failed" for site in report.sites), str(report)
    report.restore()
    _assert_stocks(feature, subject.clip(), plain, "undone, then restored")


def _both(feature: Feature, subject: Subject, order: str) -> tuple[PatchReport, Undo | None]:
    """Patch, and turn the feature on, in this order or that."""
    if order == "before":
        undo = feature.turn_on(subject)
        return patch_pipeline(subject.pipe), undo
    report = patch_pipeline(subject.pipe)
    subject.clip()
    return report, feature.turn_on(subject)


@cache
def _plain(family: str) -> Tensor:
    return build(family).clip()


@cache
def _plain_reasons(family: str) -> frozenset[str]:
    """Why sites go the original way without any feature."""
    subject = build(family)
    report = patch_pipeline(subject.pipe)
    subject.clip()
    return frozenset(_reasons(report))


@lru_cache(maxsize=1)  # for the other order
def _stock(feature: Feature, family: str) -> _Stock:
    subject = build(family)
    if reason := feature.needs(subject):
        raise _Unable(reason)
    plain = _plain(family)  # first: a feature may change what the whole process does
    try:
        undo = feature.turn_on(subject)
        on = feature.run(subject)
    except Exception as error:
        raise _Unable(f"stock raises {type(error).__name__}: {str(error).strip().splitlines()[0][:100]}") from error
    if feature.shows:
        assert on.shape != plain.shape or _distance(on, plain) > SEEN, "the feature does nothing"
    if undo is None or not feature.drifts:
        return _Stock(on, plain)
    undo()
    return _Stock(on, subject.clip())


def _distance(out: Tensor, expected: Tensor) -> float:
    assert out.shape == expected.shape, f"{tuple(out.shape)} and not {tuple(expected.shape)}"
    assert bool((out.isfinite() == expected.isfinite()).all()), "NaN or infinity in one of the two"
    return float((out - expected).norm() / expected.norm())


def _limit(limit: float, family: str) -> float:
    return max(limit, EIGHT_BITS) if family in ROUNDED else limit


def _assert_near(out: Tensor, expected: Tensor, when: str, limit: float, gold: Tensor | None = None) -> None:
    """``gold``: the clip in float32, where stock's own is of low precision."""
    error = _distance(out, expected)
    if gold is not None:
        error, limit = _distance(out, gold), 2 * _distance(expected, gold)
    assert error <= limit, f"silently different, {when}: {error:.1e} off, {limit:.0e} allowed"


def _assert_stocks(feature: Feature, out: Tensor, expected: Tensor, when: str) -> None:
    if feature.keeps_order:
        return _assert_near(out, expected, when, feature.limit)
    assert torch.equal(out, expected), f"not exactly stock's, {when}: {_distance(out, expected):.1e} off"


def _reasons(report: PatchReport) -> set[str]:
    left = {site.reason for site in report.sites if site.state == "left alone"}
    return left | {reason for site in report.sites for reason in site.fallbacks}


def _assert_documented(feature: Feature, report: PatchReport, reasons: Iterable[str]) -> None:
    assert not any(site.state == "failed" for site in report.sites), str(report)
    unknown = [reason for reason in reasons if not feature.fallback or not re.search(feature.fallback, reason)]
    assert not unknown, f"reasons that the feature does not name: {unknown}"
