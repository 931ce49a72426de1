"""I2VGenXL: a tiny pipeline of the whole structure, patched against unpatched."""

from __future__ import annotations

import torch
from family_checks import check_clip
from tiny_models import tiny_synthetic_pipeline

from vidaccel.clips.generation import generate


def test_same_clip_and_exact_restore() -> None:
    report = check_clip(*tiny_synthetic_pipeline("i2vgen-xl"))
    sites = {(site.path, site.op) for site in report.sites}
    assert ("unet.transformer_in", "temporal_attention") in sites
    assert ("unet.up_blocks.1.temp_convs.0", "group_norm_silu") in sites


def test_a_seed_fixes_the_latents_of_the_image() -> None:
    """The pipeline draws them without the generator that it is given."""
    pipe, arguments = tiny_synthetic_pipeline("i2vgen-xl")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = (generate(pipe, arguments, seed=0).frames for _ in range(2))
    assert (first == second).all()
    assert (generate(pipe, arguments, seed=1).frames != first).any()
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers go on as before"
