# DantinoX. Every target makes its own environment first: nothing to install by hand.
PRESET ?= nano
ARGS   ?=
EXTRAS ?=
# Test processes: compiling is most of a test, and it takes one core. JOBS=0 runs them in one process.
JOBS   ?= 2

PY     := .venv/bin/python
SETUP  := sh scripts/setup.sh
# For programs that come with a later version: `$(call need,bench/aot.py)` stops with one clear line.
need    = if [ ! -f $(1) ]; then echo "make $@: $(1) is not part of this version yet" >&2; exit 2; fi

.DEFAULT_GOAL := help
.PHONY: help setup train generate test test-long test-mutants bench aot profile gpu lint format doctor clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile
	@echo
	@echo 'ARGS="..." goes to the program: make train ARGS="--steps 100", make test ARGS="-k moe".'
	@echo 'ACCEL=cpu|cuda|tpu overrules the detected accelerator; PYTHON=... names the Python to build with.'

setup: ## build .venv (EXTRAS="dev triton peers" adds to it)
	@$(SETUP) $(EXTRAS)

train: ## train a model (PRESET=nano)
	@$(SETUP)
	@$(PY) -m dantinox.train --preset $(PRESET) $(ARGS)

generate: ## let a trained model write: make generate ARGS="runs/NAME --prompt ..."
	@$(SETUP)
	@$(PY) -m dantinox.generate $(ARGS)

test: ## is it right? The tests, without the slow ones
	@$(SETUP) dev
	@$(PY) -m pytest -q -n $(JOBS) $(ARGS)

test-long: ## every test, the slow ones too
	@$(SETUP) dev
	@$(PY) -m pytest -q -n $(JOBS) -m "" $(ARGS)

test-mutants: ## do the tests notice? Breaks the kernels on purpose and expects failures
	@$(call need,tests/mutants.py)
	@$(SETUP) dev
	@$(PY) -m tests.mutants $(ARGS)

bench: ## is it fast? Times the model and its kernels
	@$(call need,bench/model.py)
	@$(SETUP) dev
	@$(PY) -m bench.model $(ARGS)

# The compile-only plugins would print CUDA and TPU errors in every other program: they get an environment of their own.
aot: ## what did the compiler make of it? Compiles for GPUs and TPUs, without one
	@$(call need,bench/aot.py)
	@VENV=.venv-aot ACCEL=cpu $(SETUP) aot triton
	@JAX_PLATFORMS=cpu .venv-aot/bin/python -m bench.aot $(ARGS)

profile: ## where does the time go? Records a trace
	@$(call need,bench/profile.py)
	@$(SETUP) dev
	@$(PY) -m bench.profile $(ARGS)

gpu: ## measure everything on this GPU, into profiles/
	@$(call need,bench/gpu.py)
	@$(SETUP) dev triton peers
	@$(PY) -m bench.gpu --out profiles $(ARGS)

lint: ## check style
	@$(SETUP) dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: ## mend style
	@$(SETUP) dev
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

doctor: ## what does this machine offer, and does the installation work?
	@$(SETUP)
	@$(PY) -m dantinox.doctor $(ARGS)

clean: ## remove .venv, builds and caches; never runs/
	rm -rf .venv .venv-* .venv.lock* build dist *.egg-info .pytest_cache .hypothesis .benchmarks .ruff_cache
	find . -name __pycache__ -type d -not -path './runs/*' -not -path './.git/*' -prune -exec rm -rf {} +
