"""Make the benchmark records anew, spread over the GPUs of one machine.

python scripts/make_records.py records                      # all of them, one process per visible GPU at a time
python scripts/make_records.py records --only svd svd-vae   # some
python scripts/make_records.py records --minutes 9          # what fits; started again, it makes those that are missing
python scripts/make_records.py records --skip compile       # without what takes longest

Each record is a run of ``vidaccel bench``, which saves after every measurement: what time runs out on keeps what it
has. The CPU cores are divided among the GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from vidaccel.bench.variants import COMPILED

BENCH = Path(__file__).with_name("bench.py")
LEAST_SECONDS = 30  # with less than that nothing is begun
# What a run needs after its time limit: to finish the measurement that it is at.
GRACE_SECONDS = 20


class Record(NamedTuple):
    name: str
    options: str


def _model(name: str, scope: str, family: str, compiled: str, options: str) -> Record:
    ours = "patched,patched+no_graph" if scope == "denoiser" else "patched"
    variants = ",".join(filter(None, ("eager", ours, compiled)))
    return Record(name, f"--synthetic {family} --scope {scope} --variants {variants} --new-process {options}")


def _transformer(name: str, options: str, compiled: str = "compile_blocks,compile") -> Record:
    variants = ",".join(filter(None, ("eager,patched", compiled)))
    scope = "--scope denoiser --dtype bfloat16 --warmup 1"
    return Record(name, f"--synthetic {name} {scope} --variants {variants} {options}")


def _decoder(name: str, family: str, options: str, dtype: str = "bfloat16") -> Record:
    # the denoiser only leads up to a decode; fewer than two steps are too few for the schedulers of LTX and Mochi
    scope = f"--scope vae --dtype {dtype} --warmup 1 --steps 2"
    return Record(name, f"--synthetic {family} {scope} --variants eager,patched,{CHANNELS_LAST} {options}")


def _encoder(name: str, family: str, options: str = "") -> Record:
    scope = "--scope encode --dtype bfloat16 --warmup 1 --steps 2 --repeats 5 --budget 4 --no-reference"
    return Record(name, f"--synthetic {family} {scope} --variants eager,patched {options}")


# torch.compile as it comes, and the switches under which it was fastest; those that take long first.
WITH_BENCHMARK = "compile,compile+cudnn.benchmark"
CHANNELS_LAST = "compile,compile+channels_last+cudnn.benchmark"
RECORDS = (
    _model("i2vgen-xl", "denoiser", "i2vgen-xl", "compile", "--repeats 7 --budget 4 --no-reference"),
    _model("svd-xt", "denoiser", "svd-xt", WITH_BENCHMARK, "--repeats 8 --budget 3.5 --no-reference"),
    _model("svd", "denoiser", "svd", CHANNELS_LAST, "--repeats 12 --budget 3"),
    _model("animatediff-sdxl", "denoiser", "animatediff-sdxl", WITH_BENCHMARK, "--repeats 8 --budget 3 --no-reference"),
    _model("animatediff", "denoiser", "animatediff", CHANNELS_LAST, "--repeats 15 --budget 2.5"),
    _model("svd-xt-clip", "end-to-end", "svd-xt", "", "--repeats 3 --warmup 1 --budget 20"),
    Record("ops", "--op all"),
    _model("modelscope", "denoiser", "modelscope", WITH_BENCHMARK, "--repeats 20 --budget 1.5"),
    _model("zeroscope", "denoiser", "zeroscope", WITH_BENCHMARK, "--repeats 12 --budget 2.5"),
    _model("svd-xt-vae", "vae", "svd-xt", CHANNELS_LAST, "--repeats 5 --budget 3"),
    _model("svd-vae", "vae", "svd", CHANNELS_LAST, "--repeats 6 --budget 2.5"),
    _model("animatediff-vae", "vae", "animatediff", WITH_BENCHMARK, "--repeats 10 --budget 2"),
    _decoder("wan2.1-vae", "wan2.1-t2v-1.3b", "--repeats 3 --budget 8 --no-reference"),
    _decoder("wan2.1-vae-fp32", "wan2.1-t2v-1.3b", "--repeats 3 --budget 9 --no-reference", "float32"),
    _decoder("wan2.2-vae", "wan2.2-ti2v-5b", "--repeats 3 --budget 20 --no-reference"),
    _decoder("hunyuanvideo1.5-vae", "hunyuanvideo1.5-480p", "--repeats 3 --budget 25 --no-reference"),
    _decoder(
        "hunyuanvideo-vae",
        "hunyuanvideo",
        "--height 480 --width 848 --frames 61 --repeats 3 --budget 12 --no-reference",
    ),
    _decoder("mochi-vae", "mochi-1", "--frames 85 --repeats 3 --budget 12 --no-reference"),
    _decoder("cogvideox-5b-vae", "cogvideox-5b", "--repeats 3 --budget 12"),
    _decoder("ltx-video-vae", "ltx-video-2b", "--repeats 9 --budget 3"),
    _decoder("ltx-2-vae", "ltx-2", "--repeats 9 --budget 3"),
    _encoder("wan2.1-encode", "wan2.1-t2v-1.3b"),
    _encoder("wan2.2-encode", "wan2.2-ti2v-5b"),
    _encoder("hunyuanvideo1.5-encode", "hunyuanvideo1.5-480p"),
    _encoder("hunyuanvideo-encode", "hunyuanvideo", "--height 480 --width 848 --frames 61"),
    _encoder("cogvideox-5b-encode", "cogvideox-5b"),
    _encoder("ltx-video-encode", "ltx-video-2b"),
    _encoder("ltx-2-encode", "ltx-2"),
    _transformer("hunyuanvideo1.5-480p", "--repeats 3 --budget 20 --no-reference", "compile_blocks"),
    _transformer("wan2.1-t2v-14b", "--repeats 5 --budget 15 --no-reference", "compile_blocks"),
    _transformer("wan2.1-t2v-1.3b", "--repeats 7 --budget 5"),
    _transformer("wan2.2-ti2v-5b", "--repeats 7 --budget 7 --no-reference"),
    _transformer("cogvideox-5b", "--repeats 5 --budget 9 --no-reference", "compile"),
    _transformer("ltx-2", "--repeats 7 --budget 6 --no-reference"),
    _transformer("ltx-video-2b", "--repeats 9 --budget 3"),
    _transformer("mochi-1", "--repeats 7 --budget 5 --no-reference", "compile"),
    _model("modelscope-2-cores", "denoiser", "modelscope", "", "--cpus 2 --repeats 20 --budget 1.5 --no-reference"),
    _model("zeroscope-2-cores", "denoiser", "zeroscope", "", "--cpus 2 --repeats 12 --budget 2.5 --no-reference"),
    _model("animatediff-2-cores", "denoiser", "animatediff", "", "--cpus 2 --repeats 15 --budget 2.5 --no-reference"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the benchmark records anew on the GPUs of this machine.")
    parser.add_argument("folder", type=Path, help="where the records go; those that are complete there are kept")
    names = [record.name for record in RECORDS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--gpus", type=int, metavar="N", help="use the first N (default: all)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument(
        "--skip", nargs="+", choices=("compile", "new-process"), default=(), help="leave out these measurements"
    )
    parser.add_argument("--clip-steps", type=int, default=4, help="steps of the whole clip (default: %(default)s)")
    parser.add_argument("--commit", help="what to record as the commit where there is no checkout")
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    todo: queue.SimpleQueue[Record] = queue.SimpleQueue()
    for record in RECORDS:
        if (not args.only or record.name in args.only) and not _is_complete(args.folder / f"{record.name}.json"):
            todo.put(record)
    workers = 1 if args.tiny else torch.cuda.device_count() if args.gpus is None else args.gpus
    if not workers:
        parser.error("there is no GPU; --tiny makes a dry run on the CPU")
    cores = sorted(os.sched_getaffinity(0))
    share = max(len(cores) // workers, 1)
    threads = [
        threading.Thread(target=_work, args=(todo, gpu, cores[gpu * share :][:share], args, deadline))
        for gpu in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    missing = [n for n in args.only or names if not _is_complete(args.folder / f"{n}.json")]
    print("all records are complete" if not missing else f"not complete: {', '.join(missing)}")
    return 1 if missing else 0


def _work(
    todo: queue.SimpleQueue[Record], gpu: int, cores: list[int], args: argparse.Namespace, deadline: float
) -> None:
    """Make records on one GPU until there are none left, or no time."""
    os.sched_setaffinity(0, cores)  # of this thread, and of the processes that it starts
    while (left := deadline - time.monotonic()) > LEAST_SECONDS:
        try:
            record = todo.get_nowait()
        except queue.Empty:
            return
        started = time.monotonic()
        code = _make(record, gpu, args, left)
        print(f"{record.name}: GPU {gpu}, exit code {code}, {time.monotonic() - started:.0f} s", flush=True)


def _make(record: Record, gpu: int, args: argparse.Namespace, seconds: float) -> int:
    """Run one benchmark, its output beside its record; its exit code, negative if it had to be ended."""
    options = _options(record, args.skip)
    if record.name.endswith("-clip"):
        options += ["--steps", str(args.clip_steps)]
    if args.tiny:
        options += ["--size", "tiny", "--device", "cpu", "--cpus", "1"]
    if args.commit:
        options += ["--commit", args.commit]
    if seconds < float("inf"):
        options += ["--time-limit", str(round(seconds - GRACE_SECONDS))]
    command = [sys.executable, str(BENCH), *options, "--out", str(args.folder / f"{record.name}.json")]
    environment = os.environ | ({} if args.tiny else {"CUDA_VISIBLE_DEVICES": _visible(gpu)})
    with (args.folder / f"{record.name}.log").open("w") as log:
        # a session of its own, so that what it has started ends with it
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            return process.wait(None if seconds == float("inf") else seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()


def _options(record: Record, skip: Sequence[str]) -> list[str]:
    options = [option for option in shlex.split(record.options) if option != "--new-process" or option[2:] not in skip]
    if "compile" in skip and "--variants" in options:
        at = options.index("--variants") + 1
        options[at] = ",".join(name for name in options[at].split(",") if not COMPILED & set(name.split("+")))
    return options


def _visible(gpu: int) -> str:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",")[gpu] if listed else str(gpu)


def _is_complete(path: Path) -> bool:
    """Whether ``path`` is a record of a run that nothing cut short."""
    if not path.exists():
        return False
    record = json.loads(path.read_text())
    rows = [*record["results"], *record.get("new_processes", [])]
    return record["complete"] and not any(row.get("reason") == "the time limit was reached" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
