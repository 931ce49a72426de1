"""A comparison as lines for a terminal."""

from __future__ import annotations

import dataclasses

from comparison_example import example_comparison

from vidaccel.fidelity.table import comparison_lines


def test_what_passed() -> None:
    lines = comparison_lines(example_comparison().summary())
    assert lines[0] == "4 frames of 48x32 pixels"
    assert lines[-1].startswith("PASS (the clip's worst frame): worst frame ") and lines[-1].endswith("needs 57.00 dB")
    assert any(line.split()[:3] == ["floor:", "math", "attention"] for line in lines)
    assert "single steps: 3.0e-04 at most, of equal maths 2.0e-04 (math attention)" in lines
    assert "left out: flash attention: No available kernel" in lines
    assert not any("--skip" in line for line in lines)


def test_what_failed() -> None:
    comparison = example_comparison(passed=False)
    lines = comparison_lines(comparison.summary())
    assert (
        lines[-2].startswith("FAIL (the clip's worst frame): ") and lines[-1].strip() == comparison.verdict.reasons[0]
    )
    site = next(line for line in lines if "--skip unet.down_blocks.0.resnets.0:group_norm_silu" in line)
    assert site.split()[:5] == ["unet.down_blocks.0.resnets.0", "group_norm_silu", "1.0e-02", "1.0e-03", "10"]
    assert "FAILS: a site failed its check: unet.conv_in: conv_epilogue: off by 1" in lines


def test_many_sites_at_fault_are_cut_short() -> None:
    example = example_comparison(passed=False)
    assert example.blame is not None
    blame = tuple(dataclasses.replace(example.blame[0], path=f"unet.blocks.{i}") for i in range(8))
    lines = comparison_lines(example_comparison(passed=False, blame=blame).summary())
    assert sum(line.startswith("unet.blocks.") for line in lines) == 5 and "and 3 more" in lines


def test_nothing_but_the_clip() -> None:
    bare = example_comparison(latents=None, vae_psnr_db=None, blame=None, floor=(), floor_left_out=(), guards=())
    assert comparison_lines(bare.summary())[-1].startswith("PASS")
