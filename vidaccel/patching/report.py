"""What a patch did: every site, what runs there, what fell back and why; and the way back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import nn

from vidaccel.patching.model_call import unwrap_call
from vidaccel.patching.parallel import AxisSite
from vidaccel.sites.rules import Patch, patches_of
from vidaccel.sites.site import Site

__all__ = ["PatchReport", "path_pattern"]


def path_pattern(path: str) -> str:
    """``unet.down_blocks.0.resnets.1`` -> ``unet.down_blocks.*.resnets.*``: the form in which sites are listed."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


class PatchReport:
    """The outcome of one ``patch_pipeline`` or ``patch_module`` call; also a context manager that restores on exit.

    Attributes:
        sites: Every site that the call considered: patched, found patched already, or left alone.
    """

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self._patched: list[tuple[nn.Module, Patch]] = []
        self._called: list[nn.Module] = []

    def adopt(self, module: nn.Module, patch: Patch) -> None:
        """Make ``patch`` one that :meth:`restore` undoes."""
        self._patched.append((module, patch))

    def adopt_calls(self, models: Sequence[nn.Module]) -> None:
        """Make the wrapped calls of ``models`` something that :meth:`restore` unwraps."""
        self._called += models

    @property
    def fallbacks(self) -> dict[tuple[str, str, str], int]:
        """How many calls of a site went another way than planned: ``{(path, op, reason): calls}``."""
        return {(site.path, site.op, reason): calls for site in self.sites for reason, calls in site.fallbacks.items()}

    @property
    def bytes_sent(self) -> int:
        """What this process has sent to other ranks so far, for clips that are split over them."""
        ranks = {site.ranks for site in self.sites if isinstance(site, AxisSite)}
        return sum(along.sent for along in ranks)

    def restore(self) -> None:
        """Put every patched module back as it was: same classes, same processors, same memory order, same bits out."""
        for module, patch in reversed(self._patched):
            if patch in patches_of(module):
                patch.undo(module)
        for model in self._called:
            if not any(patches_of(module) for module in model.modules()):  # nor by another report
                unwrap_call(model)
        self._patched, self._called = [], []

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()

    def summary(self) -> dict[str, Any]:
        """The report as plain JSON types, sites counted by op."""
        ops = {}
        for op in sorted({site.op for site in self.sites}):
            sites = [site for site in self.sites if site.op == op]
            ops[op] = {
                "fidelity": sites[0].fidelity,
                "states": dict(Counter(site.state for site in sites)),
                "implementations": sorted(set().union(*(site.implementations for site in sites))),
            }
        return {
            "active": sum(site.state == "active" for site in self.sites),
            "ops": ops,
            "left_alone": self._counted("left alone"),
            "failed": self._counted("failed"),
            "parallel": [
                {"path": site.path, "axis": site.op, "ranks": site.ranks.size, "bytes_sent": site.ranks.sent}
                for site in self.sites
                if isinstance(site, AxisSite)
            ],
            "fallbacks": [
                {"path": path, "op": op, "reason": reason, "calls": calls}
                for (path, op, reason), calls in self.fallbacks.items()
            ],
        }

    def _counted(self, state: str) -> list[dict[str, Any]]:
        counts = Counter((site.op, path_pattern(site.path), site.reason) for site in self.sites if site.state == state)
        return [
            {"op": op, "path": path, "reason": reason, "sites": count} for (op, path, reason), count in counts.items()
        ]

    def overview(self) -> str:
        """The report in a few lines: one for each op and outcome, one for each reason to fall back."""
        rows = Counter((site.op, *_outcome(site)) for site in self.sites)
        lines = _table(
            ("op", "runs as", "fidelity", "sites"), [(*row, str(count)) for row, count in sorted(rows.items())]
        )
        active = sum(site.state == "active" for site in self.sites)
        lines.append(f"{active} of {len(self.sites)} sites patched")
        fallbacks: Counter[tuple[str, str]] = Counter()
        for (_, op, reason), calls in self.fallbacks.items():
            fallbacks[op, reason] += calls
        lines += [f"fell back in {calls} calls: {op}: {reason}" for (op, reason), calls in fallbacks.items()]
        return "\n".join(lines)

    def __str__(self) -> str:
        rows = Counter((path_pattern(site.path), site.op, *_outcome(site)) for site in self.sites)
        table = [(*row, str(count)) for row, count in sorted(rows.items())]
        return "\n".join([*_table(("site", "op", "runs as", "fidelity", "sites"), table), "", self.overview()])


def _outcome(site: Site) -> tuple[str, str]:
    """What runs there, and its fidelity class."""
    if site.state == "active":
        return site.implementation, site.fidelity
    return (f"{site.state}: {site.reason}" if site.reason else site.state), ""


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *rows))
    return ["  ".join(row).rstrip() for row in padded]
