# make demo       generate a clip with the bundled model, unpatched and patched, and compare the two
# make test       what to run at every change: six to nine minutes on two cores, without a GPU
# make slow-test  the other tests without a GPU: several processes, whole models compiled, kernels for
#                 many GPUs, many clips, more families; fourteen minutes more
# make gpu-test   the tests that need one; leaves samples/benchmarks/gpu-tests.json
# make matrix     what users do with a pipeline, on every family, before the patch and after: half an hour, one table
# make check      ruff, mypy
# make fuzz       many random arguments for every op and pipeline; prints how to see a failure again
# make faults     the fidelity check's record: planted faults and right variants; DEVICE=cuda for all dtypes
# make versions   the tests on the oldest and the newest torch, triton and diffusers that pyproject.toml claims
# make sanitize   the kernels under NVIDIA's compute-sanitizer, on a GPU
# make benchmarks draw the README's tables from the committed records

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test slow-test gpu-test matrix check fuzz faults versions sanitize benchmarks clean

demo: $(READY)
	$(BIN)/vidaccel generate --compare --overwrite --out demo/clip.mp4

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m "not gpu and not slow"

slow-test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m "slow and not gpu"

gpu-test: $(READY)
	$(BIN)/pytest -v -m "gpu and not fuzz" --gpu-record samples/benchmarks/gpu-tests.json

matrix: $(READY)
	$(BIN)/pip install --constraint constraints.txt --editable '.[quantisers]'
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto tests/coexistence --matrix samples/benchmarks/coexistence.md

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

DEVICE ?= cpu
faults: $(READY)
	$(BIN)/python tests/fidelity_faults.py --device $(DEVICE)

fuzz: $(READY)
	$(BIN)/pytest tests/kernels/test_fuzz.py tests/pipelines/test_fuzz.py --hypothesis-profile fuzz

versions:
	$(PYTHON) scripts/test_versions.py

sanitize: $(READY)
	$(BIN)/python scripts/sanitize.py --out samples/benchmarks/sanitizer.json

benchmarks: $(READY)
	$(BIN)/python scripts/draw_benchmarks.py --readme README.md --tables samples/benchmarks/README.md

# The stamp is written last, so that a set-up cut short is begun again; a second `make` installs nothing.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo
