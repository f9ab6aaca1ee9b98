# make demo   calibrates, prunes and measures the model that comes with the package
# make test   runs the tests
#
# Both make a virtual environment in .venv first; all they need is Python 3.11, pip and make.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
# Two pytest workers with one torch thread each: more threads than cores make everything slower.
WORKERS ?= 2
ARGS ?=

export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test sanitize amx-check gpu-check compat lint types docs site bench conformance arm-check clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

# Made anew when what it should hold has changed. The pip inside is brought up to date nowhere: any pip since 22.3 does.
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no python3 found; install Python 3.11 or give PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"make: moezip needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}; give PYTHON=/path/to/python3.11")'
	"$(PYTHON)" -m venv .venv || "$(PYTHON)" -m venv --clear --without-pip .venv
	if test -x .venv/bin/pip; then pip=".venv/bin/python -m pip"; else pip="$(PYTHON) -m pip --python .venv/bin/python"; fi; \
	  $$pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/installed
	.venv/bin/moezip demo $(ARGS)

test: .venv/installed
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -q -n $(WORKERS) $(ARGS)

# The C++ kernels under the address and undefined-behaviour sanitizers; needs g++. Two minutes of processor time.
sanitize: .venv/installed
	$(PY) -m tests.sanitize

# The C++ kernels compiled for 64-bit Arm, and run by qemu where it is there. Needs aarch64-linux-gnu-g++ (on Debian
# g++-aarch64-linux-gnu, qemu-user-static). Half a minute.
arm-check: .venv/installed
	$(PY) -m tests.arm

# The kernels for processors with a matrix unit (AMX), its instructions emulated, on one without: a minute. Needs g++ and
# AVX512 with bf16.
amx-check: .venv/installed
	$(PY) -m tests.amx

# The Triton kernels compiled for three GPUs, with none here: 1.5 minutes of processor time. Linux only. This installs
# Triton (1 GB; the CUDA builds of torch bring it along), without which `make test` leaves out the tests of these kernels.
.venv/gpu: .venv/installed
	if test -x .venv/bin/pip; then pip=".venv/bin/python -m pip"; else pip="$(PYTHON) -m pip --python .venv/bin/python"; fi; \
	  $$pip install --disable-pip-version-check -q -c constraints.txt triton
	@touch $@

gpu-check: .venv/gpu
	$(PY) -m tests.triton_static

# What depends most on the insides of transformers, on every release that it should work with. Each is laid over .venv.
TRANSFORMERS ?= 5.19.0 5.20.0 5.23.0
compat: .venv/installed
	for version in $(TRANSFORMERS); do \
	  $(PY) -m pip install -q --no-deps --upgrade --target .compat/$$version transformers==$$version && \
	  PYTHONPATH=.compat/$$version OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS) tests/test_ragged.py tests/test_packed_runtime.py $(ARGS) || exit 1; \
	done

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) docs/generate.py --check

types: .venv/installed
	$(PY) -m mypy

# Rewrites what the README and the pages of docs/ say of the program, from the program.
docs: .venv/installed
	$(PY) docs/generate.py

# The documentation as a site in build/site. Installs MkDocs first; a link or a name that leads nowhere is an error.
.venv/docs: .venv/installed
	if test -x .venv/bin/pip; then pip=".venv/bin/python -m pip"; else pip="$(PYTHON) -m pip --python .venv/bin/python"; fi; \
	  $$pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	@touch $@

site: .venv/docs
	$(PY) docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

# Each script prints its own table; all of them take minutes. WORK=FOLDER keeps the checkpoints that they make.
BENCH_WORK = $(if $(WORK),--work "$(WORK)")
DEMO_DATA := moezip/demo/data
bench: .venv/installed
	$(PY) benchmarks/calibration.py $(BENCH_WORK)
	$(PY) benchmarks/memory.py $(BENCH_WORK)
	$(PY) benchmarks/peer_reap.py $(BENCH_WORK) $(if $(PEER_PYTHON),--peer-python "$(PEER_PYTHON)")
	$(PY) benchmarks/quality.py demo --calib $(DEMO_DATA)/calib/python.jsonl --heldout $(DEMO_DATA)/heldout

# Every form that moezip writes, loaded by the real readers: half an hour and 8 GB of environments, kept in CONFORMANCE.
# VLLM_ORACLE=FILE adds vLLM; ARGS="--only llama.cpp mlx-lm" takes some readers.
CONFORMANCE ?= .conformance
conformance: .venv/installed
	$(PY) benchmarks/conformance.py --work $(CONFORMANCE) --write docs/conformance.md $(if $(VLLM_ORACLE),--vllm-oracle "$(VLLM_ORACLE)") $(ARGS)

clean:
	rm -rf .venv .compat .conformance .pytest_cache .mypy_cache .ruff_cache build dist
