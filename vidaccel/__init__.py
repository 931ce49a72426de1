"""vidaccel: diffusers video pipelines, faster, with the same clip.

``import vidaccel`` is instant: neither triton nor diffusers is imported before something is patched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidaccel.fidelity.comparison import Comparison, compare
    from vidaccel.patching.patch import patch_module, patch_pipeline
    from vidaccel.patching.report import PatchReport

__all__ = ["Comparison", "PatchReport", "__version__", "compare", "patch_module", "patch_pipeline"]

__version__ = "0.1.0"

_HOMES = {
    "Comparison": "vidaccel.fidelity.comparison",
    "PatchReport": "vidaccel.patching.report",
    "compare": "vidaccel.fidelity.comparison",
    "patch_module": "vidaccel.patching.patch",
    "patch_pipeline": "vidaccel.patching.patch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vidaccel' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
