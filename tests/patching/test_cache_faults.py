"""Caches that cannot be used: the clip is right, one warning says what is wrong, what fell back has a row.

Nothing is compiled under the interpreter, and nothing is measured without a GPU. So one process without it plays clips
in which every op does what its first call on a GPU does, but for the launch: it compiles a kernel for a Hopper GPU
through Triton's cache, and asks the cache of measured choices; then it returns what the reference does.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from tiny_pipelines import latte
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vidaccel import patch_pipeline
from vidaccel.kernels import choice
from vidaccel.kernels.compile_cache import ensure_writable
from vidaccel.kernels.ffn.geglu import _geglu_kernel
from vidaccel.kernels.op import Implementation, Op, ops

pytestmark = pytest.mark.slow

NOWHERE = "/proc/vidaccel"  # where not even root can write
SAID = {
    "usable": "",
    "used before": "",
    "several processes": "",
    "kernels read-only": f"Triton cannot write into {NOWHERE} (",
    "choices read-only": f"{NOWHERE} cannot be written",
    "choices full": "cannot be written (No space left on device)",
    "choices corrupt": "holds choices that cannot be read",
}
FELL_BACK = {
    "kernels full": "planted: OSError: [Errno 28] No space left on device",
    "kernels corrupt": "planted: JSONDecodeError: ",
}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By case: what the process tells of its clip."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "VIDACCEL_IMPL": "planted,torch", "VIDACCEL_TUNE": "1"}
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("caches"))]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.parametrize("case", SAID)
def test_nothing_falls_back(played: dict[str, Any], case: str) -> None:
    clips = played[case]
    assert len(clips) == (3 if case == "several processes" else 1)
    for clip in clips:
        assert clip["same"] and not clip["reasons"] and not clip["half_written"]
        assert len(clip["warnings"]) == bool(SAID[case])
        assert SAID[case] in "".join(clip["warnings"])


@pytest.mark.parametrize("case", FELL_BACK)
def test_pytorch_runs_instead(played: dict[str, Any], case: str) -> None:
    (clip,) = played[case]
    assert clip["same"] and not clip["half_written"]
    if case == "kernels corrupt" and not triton.__version__.startswith(("3.6.", "3.7.")):
        assert not clip["reasons"] and not clip["warnings"]  # Triton 3.8 compiles such a kernel anew
        return
    assert clip["reasons"] and all(reason.startswith(FELL_BACK[case]) for reason in clip["reasons"])
    assert clip["warnings"] and all(FELL_BACK[case] in warning for warning in clip["warnings"])
    assert len(clip["warnings"]) == len({warning.partition(":")[0] for warning in clip["warnings"]}), "one for each op"


# in the process


def plant(op: Op) -> Op:
    """Have ``op`` compile a kernel, then ask an op whose ways are measured, which is returned."""
    ways = {"first": Implementation(op.reference), "second": Implementation(op.reference)}
    measured = Op(
        f"measured_{op.name}",
        reference=op.reference,
        implementations=ways,
        fake=op.fake,
        costs=op.costs,
        measures=lambda *args: True,
        key=lambda *args: {"shape": tuple(args[0].shape)},
    )

    def run(*args: Any) -> Any:
        ensure_writable()
        constants = {"ACTIVATION": "gelu", "BLOCK": 128}
        signature = {"x_ptr": "*fp16", "y_ptr": "*fp16", "dim": "i32", "size": "i32"} | dict.fromkeys(
            constants, "constexpr"
        )
        source = ASTSource(_geglu_kernel, signature, constants)
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
        return measured(*args)

    op.implementations["planted"] = Implementation(run)  # type: ignore[index]
    return measured


class Clips:
    """Plays the same clip with the caches in ``folder``, as another process would."""

    def __init__(self) -> None:
        self.pipe, self.call = latte()
        self.records: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.records.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("vidaccel").addHandler(handler)
        self.expected = self.clip()
        self.ops = [*ops().values(), *map(plant, ops().values())]

    def clip(self) -> Any:
        return self.pipe(**self.call, generator=torch.Generator().manual_seed(0), output_type="pt").frames

    def forget(self, choices: Path) -> None:
        """What is not on disk."""
        files = {path: path.read_bytes() for path in choices.rglob("*.json")} if choices.exists() else {}
        choice.drop()
        for path, content in files.items():
            path.write_bytes(content)
        for op in self.ops:
            op.forget()

    def play(self, kernels: Path | str, choices: Path | str) -> dict[str, Any]:
        return self.told(kernels, choices) | {"half_written": half_written(kernels, choices)}

    def told(self, kernels: Path | str, choices: Path | str) -> dict[str, Any]:
        os.environ["VIDACCEL_CACHE_DIR"] = str(choices)
        triton.knobs.cache.dir = str(kernels)
        self.records.clear()
        self.forget(Path(choices))
        with patch_pipeline(self.pipe) as report:
            same = torch.allclose(self.clip(), self.expected, rtol=1e-4, atol=1e-5)
            reasons = sorted({reason for *_, reason in report.fallbacks})
        return {"same": same, "warnings": [*self.records], "reasons": reasons}


def half_written(*folders: Path | str) -> list[str]:
    """Files; of folders that nobody else is writing into by now."""
    return [str(path) for folder in folders for path in Path(folder).rglob("*.part")]


def full(*args: Any) -> None:
    raise OSError(28, "No space left on device")


def main(folder: Path) -> None:
    choice.gpu_milliseconds = lambda run: 1.0
    clips, told = Clips(), {}
    usable = folder / "kernels", folder / "choices"
    together = folder / "kernels of several", folder / "choices of several"
    told["several processes"] = several(clips, together)
    told["usable"] = [clips.play(*usable)]
    told["used before"] = [clips.play(*usable)]
    told["kernels read-only"] = [clips.play(NOWHERE, usable[1])]
    told["choices read-only"] = [clips.play(usable[0], NOWHERE)]
    replace = os.replace
    os.replace = os.link = full  # one of these puts a file in place
    told["kernels full"] = [clips.play(folder / "full", usable[1])]
    told["choices full"] = [clips.play(usable[0], folder / "full choices")]
    os.replace = replace
    for path in together[0].rglob("__grp__*.json"):
        path.write_bytes(path.read_bytes()[:10])
    told["kernels corrupt"] = [clips.play(together[0], usable[1])]
    for path in together[1].rglob("*.json"):
        path.write_bytes(path.read_bytes()[:10])
    told["choices corrupt"] = [clips.play(usable[0], together[1])]
    print(json.dumps(told))


def several(clips: Clips, folders: tuple[Path, Path]) -> list[dict[str, Any]]:
    """Three processes that find both folders empty, at the same time."""
    pipes = []
    for _ in range(3):
        readable, writable = os.pipe()
        if not os.fork():
            os.write(writable, json.dumps(clips.told(*folders)).encode())
            os._exit(0)
        os.close(writable)
        pipes.append(os.fdopen(readable))
    told = [json.loads(pipe.read()) for pipe in pipes]
    for _ in pipes:
        os.wait()
    return [clip | {"half_written": half_written(*folders)} for clip in told]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
