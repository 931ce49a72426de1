"""``vidaccel bench`` under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vidaccel.bench.variants import parse_variants
from vidaccel.errors import UsageError

pytestmark = pytest.mark.slow


def test_a_clip_split_over_ranks_is_a_variant(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "vidaccel", "bench"),
        *("--synthetic", "wan2.1-t2v-1.3b", "--size", "tiny", "--device", "cpu", "--no-reference", "--frames", "17"),
        *("--scope", "denoiser,vae,end-to-end", "--variants", "patched,patched+sequence,patched+parallel"),
        *("--out", str(tmp_path / "record.json")),
    ]
    plain = os.environ | {"VIDACCEL_IMPL": "torch", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, env=plain)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["ranks"] == 2 and record["complete"]
    rows = {(row["scope"], row["variant"]): row for row in record["results"]}
    assert len(rows) == 9 and all(row["status"] == "ok" for row in rows.values())
    for variant, axis in (("patched+sequence", "sequence"), ("patched+parallel", "guidance")):
        assert rows["end-to-end", variant]["step_speedup"] > 0
        assert rows["end-to-end", variant]["error_to_patched"] < 1e-4
        assert rows["end-to-end", variant]["sent_gb"] > 0 and rows["vae", variant]["sent_gb"] > 0
        sites = {site["axis"]: site for site in record["patch_reports"][variant]["parallel"]}
        assert set(sites) == {axis, "decode"} and sites[axis]["ranks"] == 2 and sites[axis]["bytes_sent"] > 0
    assert done.stdout.count("median ms") == 1, "one process prints"


@pytest.mark.parametrize("variant", ["patched+frames", "guidance", "patched+frames+sequence"])
def test_no_split_without_ranks(variant: str) -> None:
    with pytest.raises(UsageError, match=r"torchrun|goes with patched"):
        parse_variants(variant)
