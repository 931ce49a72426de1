"""Plan, apply, report, restore: what ``patch_pipeline`` and ``patch_module`` do.

The plan is a walk over a model's modules with the rules of its family (``pipelines/<family>.py``); applying is what
each rule does to each module it matches; the report holds every site and the way back.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal, get_args

from torch import nn

from vidaccel.config import check_environment, self_check_enabled
from vidaccel.errors import UsageError, did_you_mean, nearest
from vidaccel.kernels.op import check_wishes
from vidaccel.kernels.settings import FIDELITIES, Fidelity
from vidaccel.parallel.asked import CALL_SLOT
from vidaccel.patching.cuda_capture import CudaCapture
from vidaccel.patching.cuda_graph import Graphs, GraphSite, is_denoiser
from vidaccel.patching.families import off_reason, reason_unserved, rules_for, unserved_denoiser, unwrapped
from vidaccel.patching.first_calls import compile_first_calls, start_compiler
from vidaccel.patching.model_call import DecodeCall, ModelCall, unwrap_call, wrap_call, wrap_decode
from vidaccel.patching.parallel import Parallel, ParallelCall, check_alike, parallel_calls
from vidaccel.patching.premises import capture_reason
from vidaccel.patching.report import PatchReport, path_pattern
from vidaccel.sites.rules import Patch, Rule, patches_of
from vidaccel.sites.site import Site

__all__ = ["CudaGraph", "check_choice", "patch_module", "patch_pipeline"]

logger = logging.getLogger(__name__)

CudaGraph = Literal["auto"] | bool
Names = str | Sequence[str] | None
DENOISERS = ("unet", "transformer", "transformer_2")  # the components that a pipeline's steps run


def patch_pipeline(
    pipe: Any,
    *,
    only: Names = None,
    skip: Names = None,
    allow: Fidelity = "math-exact",
    strict: bool = False,
    self_check: bool | None = None,
    cuda_graph: CudaGraph = "auto",
    parallel: Parallel | None = None,
) -> PatchReport:
    """Make a diffusers video pipeline faster, in place; the clip stays the same within each site's fidelity class.

    If an error or Ctrl-C ends this in the middle, the pipeline is as it was before.

    Args:
        pipe: A loaded pipeline of a supported family (``vidaccel env`` lists them).
        only: Patch nothing but these: ops (``"temporal_attention"``), components (``"vae"``), module paths or
            patterns (``"unet.down_blocks.*"``), or ``"path:op"``. None: everything.
        skip: The same, for what to leave out.
        allow: The loosest fidelity class that may run: ``"bit-exact"``, ``"math-exact"`` or ``"lossy"``.
        strict: Raise, leaving the pipeline as it was, if any chosen site cannot be patched.
        self_check: Hold every op and block against its reference the first time that it sees a signature, and now and
            then later. None: yes, unless ``VIDACCEL_SELF_CHECK=0``.
        cuda_graph: Capture the denoiser's calls as CUDA graphs, one for each kind of arguments: the same bits without
            the time that the GPU waits for launches, at the price of the memory that a call works in. "auto": where
            launches are what a call waits for. True: wherever that can be done. False: nowhere.
        parallel: Split every clip over the ranks of a process group, which all run the same program (``torchrun``):
            "guidance", its two halves on two ranks; "frames" of a UNet and its ControlNet; "sequence", the tokens of a
            transformer; "auto": guidance if the pipeline has it, then frames or tokens. All ranks share the decodes of
            its VAE, too. None: each process by itself.

    Returns:
        The report: printable, restorable, usable as a context manager. Patching a patched pipeline again changes
        nothing, and reports the sites that are there.

    Raises:
        UsageError: No component of the pipeline belongs to a supported family; ``only``, ``skip``, ``allow`` or an
            environment variable names nothing that exists; with ``strict``, a site cannot be patched; or, with
            ``cuda_graph=True``, no call could be captured as things are (there is no GPU, or an offload hook); or, with
            ``parallel``, the model or the number of ranks does not allow it, or there is no process group.
    """
    models, off = _models_of(pipe)
    vaes = [name for name, model in models.items() if hasattr(model, "decode") and hasattr(model, "decoder")]
    if parallel is not None:
        _check_uncompiled(pipe, _denoisers(models))
    calls = {} if parallel is None else parallel_calls(pipe, parallel, _denoisers(models), vaes)
    return _patch(models, off, only, skip, allow, strict, self_check, cuda_graph, calls)


def patch_module(
    model: nn.Module,
    *,
    only: Names = None,
    skip: Names = None,
    allow: Fidelity = "math-exact",
    strict: bool = False,
    self_check: bool | None = None,
    cuda_graph: CudaGraph = "auto",
) -> PatchReport:
    """:func:`patch_pipeline` for those who hold only a denoiser or a VAE; paths are relative to ``model``."""
    if not isinstance(model, nn.Module) or not rules_for(unwrapped(model)):
        raise UsageError(reason_unserved(model))
    return _patch({"": unwrapped(model)}, [], only, skip, allow, strict, self_check, cuda_graph, {})


def check_choice(pipe: Any, only: Names, skip: Names) -> None:
    """Raise what :func:`patch_pipeline` would if there is nothing to patch, or a name is wrong; change nothing.

    Names are those of ``only``, ``skip`` and environment variables. The pipeline's models may be on the meta device.
    """
    models, off = _models_of(pipe)
    sites = [site for place in _places(models, "lossy") for site in place.sites]
    _selection(only, skip, [*off, *sites])
    _check_environment(sites)


def _models_of(pipe: Any) -> tuple[dict[str, nn.Module], list[Site]]:
    """The parts of a pipeline that have an adapter, by name, and a site for each other part that should have one."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        raise UsageError(reason_unserved(pipe))
    parts = {name: unwrapped(part) for name, part in components.items() if isinstance(part, nn.Module)}
    models = {name: model for name, model in parts.items() if rules_for(model)}
    if not models:
        raise UsageError(reason_unserved(pipe))
    reasons = {name: off_reason(part) for name, part in parts.items()}
    for name in DENOISERS:
        if name in parts and name not in models and not reasons[name]:
            reasons[name] = unserved_denoiser(type(pipe).__name__, parts[name])
    off = [Site(name, "adapter", "math-exact", reason) for name, reason in reasons.items() if reason]
    names: dict[nn.Module, str] = {}  # one model may be two components
    for name, model in models.items():
        names.setdefault(model, name)
    return {name: model for model, name in names.items()}, off


def _patch(
    models: Mapping[str, nn.Module],
    off: list[Site],
    only: Names,
    skip: Names,
    allow: Fidelity,
    strict: bool,
    self_check: bool | None,
    cuda_graph: CudaGraph,
    parallel: Mapping[str, ParallelCall],
) -> PatchReport:
    start_compiler(models.values())
    checks = self_check_enabled() if self_check is None else self_check
    denoisers = _denoisers(models)
    places = _places(models, allow)
    chosen = _selection(only, skip, [*off, *(site for place in places for site in place.sites)])
    _check_environment([site for place in places for site in place.sites])
    _check_arguments(allow, cuda_graph, denoisers)
    report = PatchReport()
    report.sites += filter(chosen, off)
    before = _Before(models.values(), places)
    try:
        for place in places:
            _apply(place, chosen, checks, report)
        _check_strict(report, strict)
        for name, model in models.items():
            _wrap(name, model, report, allow, checks, cuda_graph if name in denoisers else False, parallel.get(name))
        compile_first_calls(models.values(), [place.module for place in places])
        if parallel:
            agreement = next(iter(parallel.values())).agreement
            check_alike(agreement, [(site.path, site.op, site.state == "left alone", site.on) for site in report.sites])
    except BaseException:  # nobody would have a report to restore with
        before.put_back()
        raise
    return report


def _check_uncompiled(pipe: Any, denoisers: Mapping[str, nn.Module]) -> None:
    for name, model in denoisers.items():
        compiled = not isinstance(vars(model).get(CALL_SLOT), ModelCall | None)
        if compiled or hasattr(pipe.components[name], "_orig_mod"):
            raise UsageError(f"parallel: the {name} is compiled, and what is compiled is not split over ranks")


def _denoisers(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: model for name, model in models.items() if is_denoiser(model)}


class _Place:
    """A module that a rule matches, or was applied to before, with the sites it has or would have."""

    def __init__(self, module: nn.Module, rule: Rule, sites: list[Site], patch: Patch | None) -> None:
        self.module, self.rule, self.sites, self.patch = module, rule, sites, patch


class _Before:
    """What earlier calls have done, to put it back if the one under way fails or is interrupted, wherever that is."""

    def __init__(self, models: Iterable[nn.Module], places: list[_Place]) -> None:
        self._places = places
        self._patches = [(place.module, place.patch, list(place.patch.sites)) for place in places if place.patch]
        parts = [part for model in models for part in (model, *model.children())]
        self._calls = [(part, call, dict(vars(call)) if call else {}) for part in parts for call in [_wrapper(part)]]

    def put_back(self) -> None:
        for place in reversed(self._places):
            for patch in list(patches_of(place.module)):
                if patch.rule == place.rule:
                    patch.undo(place.module)
        for module, patch, sites in self._patches:
            patch.sites = sites
            patch.put(module)
        for part, call, state in self._calls:
            if _wrapper(part) is not call:
                unwrap_call(part)
            elif call:
                vars(call).update(state)


def _wrapper(part: nn.Module) -> ModelCall | DecodeCall | None:
    """What stands for the calls of ``part``, or for its decodes."""
    found = (vars(part).get(name) for name in (CALL_SLOT, "decode"))
    return next((call for call in found if isinstance(call, ModelCall | DecodeCall)), None)


def _places(models: Mapping[str, nn.Module], allow: Fidelity) -> list[_Place]:
    """Every place of all models; a module that several of them have is the first one's."""
    places: list[_Place] = []
    for name, model in models.items():
        taken = {place.module for place in places}
        places += [place for place in _plan(name, model, allow) if place.module not in taken]
    return places


def _plan(name: str, model: nn.Module, allow: Fidelity) -> Iterator[_Place]:
    """Every place of a model."""
    rules = rules_for(model)
    for relative_path, module in list(model.named_modules()):
        path = ".".join(filter(None, (name, relative_path)))
        for rule in rules:
            if not rule.matches(path, module):
                continue
            patch = _standing_patch(module, rule)
            there = {} if patch is None else {site.op: site for site in patch.sites}
            reason = "" if patch else rule.left_alone_reason(module) or ""
            sites = [
                there.get(op) or Site(path, op, fidelity, reason or _class_reason(fidelity, allow))
                for op, fidelity in rule.ops.items()
            ]
            yield _Place(module, rule, sites, patch)


def _standing_patch(module: nn.Module, rule: Rule) -> Patch | None:
    """What an earlier call did by ``rule``, unless somebody has put something else in its place since."""
    for patch in list(patches_of(module)):
        if patch.rule == rule:
            if patch.complete and patch.rule.in_place(module, patch.memo) is None:
                return patch
            patch.undo(module)
    return None


def _class_reason(fidelity: Fidelity, allow: Fidelity) -> str:
    if allow in FIDELITIES and FIDELITIES.index(fidelity) > FIDELITIES.index(allow):
        return f"it is {fidelity}, and allow={allow!r}"
    return ""


def _apply(place: _Place, chosen: Callable[[Site], bool], checks: bool, report: PatchReport) -> None:
    """Give a module the sites that are chosen, beside those that an earlier call of narrower choice gave it."""
    wanted = [site for site in place.sites if chosen(site)]
    report.sites += wanted
    there = place.patch.sites if place.patch else []
    new = [site for site in wanted if site not in there and site.state != "left alone"]
    if new and place.patch:
        place.patch.undo(place.module)
        place.patch.sites = [*there, *new]
        place.patch.put(place.module)
    elif new:
        place.patch = place.rule.put(place.module, new, checks)
    if place.patch and any(site in place.patch.sites for site in wanted):
        report.adopt(place.module, place.patch)


def _wrap(
    name: str,
    model: nn.Module,
    report: PatchReport,
    allow: Fidelity,
    checks: bool,
    cuda_graph: CudaGraph,
    parallel: ParallelCall | None,
) -> None:
    """Wrap the calls of a model, or of what of it is called, and let a denoiser's be captured."""
    if not any(patch.sites for module in model.modules() for patch in patches_of(module)):
        return
    called = [model] if is_denoiser(model) else [part for part in model.children() if isinstance(part, nn.Module)]
    calls = {part: wrap_call(part, allow) for part in called}
    report.adopt_calls([part for part, call in calls.items() if call])
    if not is_denoiser(model):
        _share_decode(name, model, report, parallel)
    call = calls.get(model)
    if call is not None and parallel is not None and call.parallel is None:
        call.parallel = parallel
        for axis in parallel.sites:
            axis.put_in_place(partial(_replaced_reason, weakref.ref(model)))
    if call is not None and call.parallel is not None:
        report.sites += call.parallel.sites
    if call is not None and call.graphs is not None:
        report.sites.append(call.graphs.site)
    elif cuda_graph:
        site = GraphSite(name, "cuda_graph", "bit-exact", _graph_reason(model) or "")
        if call is not None and site.state != "left alone":
            site.put_in_place(lambda: None)
            call.graphs = Graphs(site, checks, only_if_faster=cuda_graph == "auto")
        if CudaCapture.unavailable_reason() is None:  # without a GPU nobody expects a graph
            report.sites.append(site)


def _replaced_reason(model: weakref.ref[nn.Module]) -> str | None:
    """Why the calls of a model are not split any more, or None."""
    there = model()
    if there is None or isinstance(vars(there).get(CALL_SLOT), ModelCall):
        return None
    return "its call was compiled, or replaced, after it was patched"


def _share_decode(name: str, vae: Any, report: PatchReport, parallel: ParallelCall | None) -> None:
    """Let all ranks share the decodes of a VAE, if they are to, or do already."""
    call = vars(vae).get("decode")
    if parallel is not None and isinstance(vars(vae.decoder).get(CALL_SLOT), ModelCall):
        call = wrap_decode(vae, parallel)
    if isinstance(call, DecodeCall):
        report.adopt_calls([vae])
        report.sites += call.parallel.sites
    elif parallel is not None:
        reason = "somebody has replaced its decode, or compiled its decoder"
        report.sites.append(Site(name, "decode", "math-exact", reason))


def _graph_reason(model: nn.Module) -> str | None:
    """Why no call of ``model``, as it is now, could be captured, or None."""
    if not isinstance(vars(model).get(CALL_SLOT), ModelCall | None):
        return "it was compiled with module.compile(), which needs the same slot"
    return CudaCapture.unavailable_reason() or capture_reason(model)


def _selection(only: Names, skip: Names, sites: list[Site]) -> Callable[[Site], bool]:
    only, skip = _as_list("only", only), _as_list("skip", skip) or []
    for option, entries in (("only", only or []), ("skip", skip)):
        for entry in entries:
            if not any(_names(entry, site) for site in sites):
                raise UsageError(f"{option}={entry!r} names no site{_choices(entry, sites)}")

    def chosen(site: Site) -> bool:
        wanted = only is None or any(_names(entry, site) for entry in only)
        return wanted and not any(_names(entry, site) for entry in skip)

    return chosen


def _as_list(option: str, entries: Names) -> list[str] | None:
    if entries is None:
        return None
    names = [entries] if isinstance(entries, str) else list(entries) if isinstance(entries, Iterable) else [entries]
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"{option} must be a name or several names, got {entries!r}")
    return names


def _names(entry: str, site: Site) -> bool:
    path, colon, op = entry.partition(":")
    if colon:
        return op == site.op and _names(path, site)
    return entry == site.op or site.path.startswith(f"{entry}.") or fnmatchcase(site.path, entry)


def _choices(entry: str, sites: list[Site]) -> str:
    ops = {site.op for site in sites}
    components = {site.path.partition(".")[0] for site in sites}
    near = did_you_mean(entry, ops | components | {path_pattern(site.path) for site in sites})
    return near or f"; ops are: {', '.join(sorted(ops))}; components are: {', '.join(sorted(components))}"


def _check_environment(sites: list[Site]) -> None:
    check_environment()
    check_wishes([site.op for site in sites])  # shortcuts are no ops


def _check_arguments(allow: Fidelity, cuda_graph: CudaGraph, denoisers: Mapping[str, nn.Module]) -> None:
    if allow not in get_args(Fidelity):
        raise UsageError(f"allow={allow!r} is no fidelity class{nearest(str(allow), FIDELITIES)}")
    if cuda_graph not in (False, True, "auto"):
        raise UsageError(f"cuda_graph must be True, False or 'auto', got {cuda_graph!r}")
    if cuda_graph is True:
        if not denoisers:
            raise UsageError("cuda_graph: there is no denoiser whose calls could be captured")
        for name, model in denoisers.items():
            if reason := _graph_reason(model):
                raise UsageError(f"cuda_graph: {name or type(model).__name__}: {reason}")


def _check_strict(report: PatchReport, strict: bool) -> None:
    left = [site for site in report.sites if site.state == "left alone"]
    if strict and left:
        raise UsageError(f"strict: {len(left)} sites cannot be patched, first {left[0].path}: {left[0].reason}")
