# Two commands are enough: `make demo` and `make test`. Each builds .venv if it is missing.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false
# DeepSpeed's kernels are not used: without this its installation may look for a compiler and CUDA
export DS_BUILD_OPS := 0

.PHONY: env dist test test-launched test-dist test-hour test-hosts test-oldest test-oldest-fast test-null lint format \
  docs demo notebooks bench bench-ratios bench-gpu support clean

env: .venv/ready

# torch first, pinned to an exact version: a range would install several GB of CUDA packages on a machine without a GPU.
# On a GPU machine: make env TORCH="torch" (or use your own environment; the package does not depend on .venv).
TORCH ?= $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" numpy
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

# Two workers a core: many tests wait
WORKERS ?= 4
SUITE = -m pytest --workers $(WORKERS)
# In memory where there is room: runs sync what they save to the disk, and wait for it
TEMP := $(shell [ "$$(df --output=avail -k /dev/shm 2>/dev/null | tail -1)" -gt 8000000 ] 2>/dev/null && echo /dev/shm)
# Tests write no bytecode: without this each process that they start would compile the package again, for a second
BYTECODE = -m compileall -q -j 2 qlora_dist benchmarks tests/helpers
test: env
	$(BIN)/python $(BYTECODE)
	CUDA_VISIBLE_DEVICES= PYTEST_DEBUG_TEMPROOT=$(TEMP) $(BIN)/python $(SUITE) $(ARGS)

# The rest of it: what starts Slurm, torchrun, accelerate or benchmarks, whose processes all import for themselves
test-launched: env
	$(BIN)/python $(BYTECODE)
	CUDA_VISIBLE_DEVICES= PYTEST_DEBUG_TEMPROOT=$(TEMP) $(BIN)/python $(SUITE) -m "launched and not hosts" $(ARGS)

# A newcomer's first hour: a fresh clone, installed as a wheel, and every command typed in an empty folder
test-hour: env
	$(BIN)/python tests/newcomer_hour.py

# Launches by torchrun, accelerate and Slurm on two hosts, each a set of network namespaces, and over a bad cable between
# them: a quarter of an hour. Needs root, iproute2 and util-linux, /dev/net/tun, slurm-wlm and munge; what is missing is
# named by the tests that are skipped. The quick ones are part of `make test` and `make test-launched`.
test-hosts: env
	$(BIN)/python -m pytest -m hosts -rs $(ARGS)

# The oldest supported versions, in a separate environment: the CUDA build of torch, several GB. The interpreter of its
# Triton, 3.6, fails with numpy 2.4.
OLDEST := build/oldest
OLDEST_PYTHON ?= python3.12
$(OLDEST)/ready: pyproject.toml constraints-oldest.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt torch "numpy<2.4"
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt --editable ".[dev]"
	touch $@

test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python $(BYTECODE)
	CUDA_VISIBLE_DEVICES= PYTEST_DEBUG_TEMPROOT=$(TEMP) $(OLDEST)/bin/python $(SUITE) -m "not hosts" $(ARGS)

# Its fast part, for CI: the oldest transformers beside the rest of .venv. Nothing else of constraints-oldest.txt differs
# from it but torch, whose oldest version PyPI has only as a CUDA build of several GB.
OLD := .venv/oldest
OLD_TESTS := $(addprefix tests/test_model/test_,attention.py decoder_block.py foreign_adapters.py import.py lora.py \
  lora_forward.py loss.py model.py recompute.py) tests/test_data tests/test_train/test_train.py
$(OLD)/ready: .venv/ready constraints-oldest.txt
	$(BIN)/python -m venv $(OLD)
	$(BIN)/python -c "import site; print(*site.getsitepackages())" > \
	  $$($(OLD)/bin/python -c "import site; print(*site.getsitepackages())")/newest.pth
	$(OLD)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt transformers
	touch $@

test-oldest-fast: $(OLD)/ready
	CUDA_VISIBLE_DEVICES= $(OLD)/bin/python -m pytest --workers 2 $(OLD_TESTS) $(ARGS)

# The environment of test-oldest with a GPU that accepts every call and computes nothing: what fails there fails on a real
# card. Needs gcc, g++ and the headers of a CUDA toolkit (CUDA_HOME).
build/null/python: $(OLDEST)/ready $(wildcard tests/null/device/*)
	tests/null/device/build.sh $(OLDEST)/bin/python build/null

test-null: env build/null/python
	QLORA_DIST_NULL_PYTHON=$(CURDIR)/build/null/python $(BIN)/python -m pytest -m null $(ARGS)

# sdist and wheel. The wheel is built from the sdist, so that what one lacks the other lacks as well.
dist: env
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist

# Builds both from a copy, installs the wheel beside the libraries of .venv, and uses it from an empty folder;
# ARGS=--demo runs the whole demo there, two minutes more.
test-dist: env
	$(BIN)/python tests/dist/check.py $(ARGS)

lint: env
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy --cache-dir=/dev/null

format: env
	$(BIN)/ruff check --no-cache --fix .
	$(BIN)/ruff format --no-cache .

# The pages of docs/ as a site: a link that leads nowhere is an error. Its tools are installed at the first call
SITE ?= build/site
docs: env
	$(BIN)/python -c "import material" 2>/dev/null || \
	  $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir $(CURDIR)/$(SITE)

# Data -> tiny base -> NF4 QLoRA over 2 processes -> merged model -> before and after. Always on the CPU: two ranks on a
# machine with one GPU would be refused.
demo: export CUDA_VISIBLE_DEVICES :=
demo: export HF_HUB_OFFLINE := 1
demo: env
	rm -rf runs/demo build/demo
	$(BIN)/python launch/demo/make_data.py
	$(BIN)/python launch/demo/make_base.py
	$(BIN)/accelerate launch --config_file launch/accelerate/ddp.yaml -m qlora_dist train launch/recipes/demo.yaml
	$(BIN)/python -m qlora_dist merge runs/demo build/demo/merged --onto dequantized
	$(BIN)/python launch/demo/report.py

# Executes the notebooks of docs/examples and keeps their outputs: on the CPU, in a minute, without a network.
notebooks: export CUDA_VISIBLE_DEVICES :=
notebooks: export HF_HUB_OFFLINE := 1
notebooks: env
	$(BIN)/python -c "import nbclient, ipykernel" 2>/dev/null || \
	  $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,notebooks]"
	$(BIN)/jupyter execute --inplace docs/examples/*.ipynb

# Everything that a CPU can measure, in under five minutes on two idle cores, then the report. Commit first: results are
# traced to a commit (BENCH_ARGS=--allow-dirty measures changed files and marks the results).
bench: env
	$(BIN)/python -c "import trl" 2>/dev/null || \
	  $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,benchmark]"
	rm -f benchmarks/results/cpu/cpu-*.json
	$(BIN)/python -m benchmarks.throughput --preset cpu --out benchmarks/results/cpu $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.planned --out benchmarks/results/cpu/planned.json $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.report

# The ratios that the regression test compares a fresh run with. Record them again when they change for a good reason.
bench-ratios: env
	$(BIN)/python -m benchmarks.throughput --preset tiny --out build/bench-tiny $(BENCH_ARGS) \
	  --ratios benchmarks/results/cpu/ratios.json

# One GPU: what is still unmeasured for this code, most valuable first. Run it again with the same OUT to continue.
bench-gpu: OUT ?= build/gpu
bench-gpu:
	bash benchmarks/gpu/queue.sh $(OUT) $(SECONDS_LEFT)

# Proves every family of models of this transformers anew, and writes docs/support.md: half an hour on two idle cores.
# ARGS="llama gemma3" proves these only, ARGS="--only ddp fsdp" only these columns.
support: env
	PYTHONPATH=.:tests HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m support $(ARGS)
	$(BIN)/python -m docs.generate

clean:
	rm -rf .venv build runs/demo *.egg-info
