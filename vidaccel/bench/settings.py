"""How to measure, as the command line says it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Part of every record; ``vidaccel bench --help`` explains the options that these come from.

    Attributes:
        scopes: What to time, in this order.
        variants: How to run it, in this order; eager first.
        repeats: Timed calls at most.
        warmup: Untimed calls before them.
        budget_seconds: After how long to stop repeating.
        with_reference: Whether half-precision outputs are also held against float32 ones.
        compile_backend: Of torch.compile.
        new_process: Whether the first calls are measured in new processes, too.
        cpus: How many CPU cores the process is held to; None: as it is.
        empty_caches: Whether compiled code on disk is out of sight, so that nothing starts warm.
        only: For ``patch_pipeline``.
        skip: For ``patch_pipeline``.
        seed: Of weights, inputs and noise.
    """

    scopes: tuple[str, ...]
    variants: tuple[str, ...]
    repeats: int
    warmup: int
    budget_seconds: float
    with_reference: bool
    compile_backend: str
    new_process: bool
    cpus: int | None
    empty_caches: bool
    only: list[str] | None
    skip: list[str] | None
    seed: int
