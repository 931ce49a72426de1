"""Plan, apply, report, restore: what ``patch_pipeline`` and ``patch_module`` do.

The plan is a walk over a model's modules with the rules of its family (``pipelines/<family>.py``); applying is what
each rule does to each module it matches; the report holds every site and the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from vidaccel.config import self_check_enabled
from vidaccel.errors import UsageError
from vidaccel.patching.cuda_graph import graph_calls, graphed_call, is_denoiser, why_not_graphed
from vidaccel.patching.families import reason_unserved, rules_for, unwrapped
from vidaccel.patching.report import PatchReport, path_pattern
from vidaccel.sites.rules import Patch, Rule, patches_of
from vidaccel.sites.site import FusedBlock, Site, State

__all__ = ["patch_module", "patch_pipeline"]


def patch_pipeline(
    pipe: Any,
    *,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    strict: bool = False,
    self_check: bool | None = None,
    cuda_graph: bool | Literal["auto"] = False,
) -> PatchReport:
    """Make a diffusers video pipeline faster, in place; the clip stays the same within each site's fidelity class.

    Args:
        pipe: A loaded pipeline of a supported family (``vidaccel env`` lists them).
        only: Patch nothing but these: ops (``"temporal_attention"``), components (``"vae"``), module paths or
            patterns (``"unet.down_blocks.*"``), or ``"path:op"``. None: everything.
        skip: The same, for what to leave out.
        strict: Raise, leaving the pipeline as it was, if any chosen site cannot be patched.
        self_check: Compare each site with the original code the first time it sees a shape. None: yes, unless
            ``VIDACCEL_SELF_CHECK=0``.
        cuda_graph: Also capture the denoiser's calls as CUDA graphs, one for each kind of arguments, whatever ``only``
            and ``skip`` choose: the same bits without the time that the GPU waits for launches, at the price of the
            memory that a call works in. "auto": where that can be done, and keep those that are faster.

    Returns:
        The report: printable, restorable, usable as a context manager. Patching a patched pipeline again changes
        nothing, and reports the sites that are there.

    Raises:
        UsageError: No component of the pipeline belongs to a supported family; ``only`` or ``skip`` names nothing
            that exists; with ``strict``, a site cannot be patched; or, with ``cuda_graph=True``, no call could be
            captured as things are (there is no GPU, or an offload hook).
    """
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise UsageError(reason_unserved(pipe))
    parts = {name: unwrapped(part) for name, part in components.items() if isinstance(part, nn.Module)}
    models = {name: part for name, part in parts.items() if rules_for(part)}
    if not models:
        raise UsageError(reason_unserved(pipe))
    return _patch(models, only, skip, strict, self_check, cuda_graph)


def patch_module(
    model: nn.Module,
    *,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    strict: bool = False,
    self_check: bool | None = None,
    cuda_graph: bool | Literal["auto"] = False,
) -> PatchReport:
    """:func:`patch_pipeline` for those who hold only a denoiser or a VAE; paths are relative to ``model``."""
    if not isinstance(model, nn.Module) or not rules_for(model):
        raise UsageError(reason_unserved(model))
    return _patch({"": unwrapped(model)}, only, skip, strict, self_check, cuda_graph)


def _patch(
    models: dict[str, nn.Module],
    only: str | Sequence[str] | None,
    skip: str | Sequence[str] | None,
    strict: bool,
    self_check: bool | None,
    cuda_graph: bool | Literal["auto"],
) -> PatchReport:
    self_check = self_check_enabled() if self_check is None else self_check
    denoisers = {name: model for name, model in models.items() if is_denoiser(model)}
    _check_cuda_graph(denoisers, cuda_graph)
    report = PatchReport()
    candidates = [found for name, model in models.items() for found in _plan(name, model)]
    chosen = _selection(only, skip, [site for _, _, sites in candidates for site in sites])
    for module, patch, sites in candidates:
        wanted = [site for site in sites if chosen(site)]
        report.sites += wanted
        new = [site for site in wanted if site.state == "active" and site not in patch.sites]
        if new:
            _apply(module, patch, new, self_check)
        if any(site in patch.sites for site in wanted):
            report.adopt(module, patch)
    _check_strict(report, strict)
    for module, _, _ in candidates:
        if isinstance(module, FusedBlock):
            module.compile_ahead()
    for name, model in denoisers.items():
        if cuda_graph or graphed_call(model):
            only_if_faster = cuda_graph == "auto"
            report.sites.append(graph_calls(model, name, self_check=self_check, only_if_faster=only_if_faster))
            report.adopt_graph(model)
    return report


def _plan(name: str, model: nn.Module) -> Iterator[tuple[nn.Module, Patch, list[Site]]]:
    """Every place a rule of the model's family matches, or was applied before, with the sites it is or would be."""
    rules = rules_for(model)
    for relative_path, module in list(model.named_modules()):
        path = ".".join(filter(None, (name, relative_path)))
        applied = module.__dict__.get("_vidaccel_patches", [])
        for patch in applied:
            there = {site.op for site in patch.sites}
            yield module, patch, patch.sites + [site for site in _sites(patch.rule, path, "") if site.op not in there]
        for rule in rules:
            if rule.matches(path, module) and not any(patch.rule == rule for patch in applied):
                yield module, Patch(rule, []), _sites(rule, path, rule.why_left_alone(module) or "")


def _sites(rule: Rule, path: str, reason: str) -> list[Site]:
    state: State = "left alone" if reason else "active"
    return [Site(rule.site_path(path), op, fidelity, state, reason) for op, fidelity in rule.ops.items()]


def _apply(module: nn.Module, patch: Patch, new: list[Site], self_check: bool) -> None:
    """Apply the patch with ``new`` sites, beside those that an earlier call of narrower choice gave it."""
    if patch.sites:
        patch.rule.undo(module, patch.memo)
    else:
        patches_of(module).append(patch)
    patch.sites = patch.sites + new
    patch.memo = patch.rule.apply(module, patch.sites, self_check)


def _selection(
    only: str | Sequence[str] | None, skip: str | Sequence[str] | None, sites: list[Site]
) -> Callable[[Site], bool]:
    only, skip = _as_list(only), _as_list(skip) or []
    for option, entries in (("only", only or []), ("skip", skip)):
        for entry in entries:
            if not any(_names(entry, site) for site in sites):
                raise UsageError(f"{option}={entry!r} names no site; {_choices(sites)}")

    def chosen(site: Site) -> bool:
        wanted = only is None or any(_names(entry, site) for entry in only)
        return wanted and not any(_names(entry, site) for entry in skip)

    return chosen


def _as_list(entries: str | Sequence[str] | None) -> list[str] | None:
    return [entries] if isinstance(entries, str) else entries if entries is None else list(entries)


def _names(entry: str, site: Site) -> bool:
    path, colon, op = entry.partition(":")
    if colon:
        return op == site.op and _names(path, site)
    return entry == site.op or site.path.startswith(f"{entry}.") or fnmatchcase(site.path, entry)


def _choices(sites: list[Site]) -> str:
    ops = ", ".join(sorted({site.op for site in sites}))
    paths = ", ".join(sorted({path_pattern(site.path) for site in sites}))
    return f"ops are: {ops}; sites are: {paths}"


def _check_strict(report: PatchReport, strict: bool) -> None:
    left = [site for site in report.sites if site.state == "left alone"]
    if strict and left:
        report.restore()
        raise UsageError(f"strict: {len(left)} sites cannot be patched, first {left[0].path}: {left[0].reason}")


def _check_cuda_graph(denoisers: dict[str, nn.Module], cuda_graph: bool | Literal["auto"]) -> None:
    if cuda_graph not in (False, True, "auto"):
        raise UsageError(f"cuda_graph must be True, False or 'auto', got {cuda_graph!r}")
    if cuda_graph is True:
        if not denoisers:
            raise UsageError("cuda_graph: there is no denoiser whose calls could be captured")
        for name, model in denoisers.items():
            if reason := why_not_graphed(model):
                raise UsageError(f"cuda_graph: {name or type(model).__name__}: {reason}")
