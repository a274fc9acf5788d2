# DantinoX. Every target makes its own environment first: nothing to install by hand.
PRESET ?= nano
ARGS   ?=
EXTRAS ?=
BENCH  ?=
LOGDIR ?= runs
SWEEP  ?= sweeps/example.yaml
# Test processes: compiling is most of a test, and it takes one core. JOBS=0 runs them in one process.
JOBS   ?= 2

PY     := .venv/bin/python
SETUP  := sh scripts/setup.sh

.DEFAULT_GOAL := help
.PHONY: help setup train sweep generate test test-long test-crash test-peers test-mutants judge bench tune bench-compare ablations toggles tutorial ladder aot aot-check profile \
        tensorboard gpu docs docs-serve test-newest lint format doctor clean

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

sweep: ## compare settings: trains what SWEEP=sweeps/example.yaml asks for
	@$(SETUP)
	@$(PY) -m dantinox.sweep $(SWEEP) $(ARGS)

generate: ## let a trained model write: make generate ARGS="runs/NAME --prompt ..."
	@$(SETUP)
	@$(PY) -m dantinox.generate $(ARGS)

test: ## is it right? The tests, without the slow ones
	@$(SETUP) dev
	@$(PY) -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

test-long: ## every test, the slow ones too
	@$(SETUP) dev
	@FULL_XLA=1 $(PY) -m pytest -q -n $(JOBS) --dist worksteal -m "" --hypothesis-profile=long $(ARGS)

test-newest: ## the fast tests on the newest releases of all dependencies, in an environment of its own
	@rm -rf .venv-newest
	@VENV=.venv-newest ACCEL=cpu CONSTRAINTS=/dev/null $(SETUP) dev
	@.venv-newest/bin/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

test-crash: ## what does a run survive? 50 kills, 30 of one of two processes, 200 damaged checkpoints (about 15 minutes)
	@$(SETUP) dev
	@$(PY) -m pytest -q -s -m slow tests/dantinox/training/test_crash.py $(ARGS)

test-peers: ## do other projects' own tests pass with our operations? tokamax's and JAX's (half an hour)
	@$(SETUP) dev peers
	@$(PY) -m pytest -q -rs -n $(JOBS) --dist worksteal -m "" tests/peers $(ARGS)

test-mutants: ## do the tests notice? Breaks the kernels on purpose and expects failures
	@$(SETUP) dev
	@$(PY) -m tests.mutation $(ARGS)

judge: ## is my kernel right, and with which features? In a minute (OP=attention FILE=mine.py)
	@$(SETUP) dev
	@$(PY) -m bench.judge $(OP) $(FILE) $(ARGS)

bench: ## is it fast? Times every operation and the model (BENCH="attention model")
	@$(SETUP) dev
	@$(PY) -m bench $(if $(BENCH),--op $(BENCH)) $(ARGS)

tune: ## which block sizes and implementations are fastest here? ARGS="--op attention --minutes 5"
	@$(SETUP) dev
	@$(PY) -m bench.tune $(ARGS)

bench-compare: ## did it get slower? The newest measurement against the last committed one
	@$(SETUP) dev
	@$(PY) -m bench.compare $(if $(BENCH),--op $(BENCH)) $(ARGS)

ablations: ## what does each feature cost? Changes them one by one
	@$(SETUP) dev
	@$(PY) -m bench.ablations $(ARGS)

toggles: ablations # the old name

tutorial: ## kernels in steps of one idea each: checked, timed here, compiled (ARGS="attention")
	@$(SETUP) dev
	@VENV=.venv-aot ACCEL=cpu $(SETUP) aot triton peers
	@$(PY) -m bench.tutorial $(ARGS)

ladder: tutorial # the old name

# The compile-only plugins would print CUDA and TPU errors in every other program: they get an environment of their own.
aot: ## what did the compiler make of it? Compiles for GPUs and TPUs, without one
	@VENV=.venv-aot ACCEL=cpu $(SETUP) aot triton peers
	@JAX_PLATFORMS=cpu .venv-aot/bin/python -m bench.aot $(ARGS)

aot-check: ## did a compiled kernel get worse than profiles/aot says? CI: ARGS=--short
	@VENV=.venv-aot ACCEL=cpu $(SETUP) aot triton peers
	@JAX_PLATFORMS=cpu .venv-aot/bin/python -m bench.aot --check $(ARGS)

profile: ## where does the time go? Traces training steps, or ARGS="--op OP --spec ROW"
	@$(SETUP) dev
	@$(PY) -m bench.profile $(ARGS)

tensorboard: ## look at loss curves, samples and traces (LOGDIR=runs)
	@$(SETUP) dev
	@$(PY) -m tensorboard.main --logdir $(LOGDIR) $(ARGS)

gpu: ## measure everything on this GPU, into profiles/; works without network too
	@python=$$(sh scripts/gpu_python.sh) && $$python -m bench.gpu --out profiles $(ARGS)

docs: ## build the documentation into build/docs (warnings are errors)
	@$(SETUP) dev docs
	@$(PY) docs/pictures.py docs/_static
	@$(PY) -m sphinx -q -W --keep-going -b html docs build/docs $(ARGS)
	@echo "build/docs/index.html"

docs-serve: docs ## serve the documentation at http://localhost:8000
	@$(PY) -m http.server --directory build/docs 8000

lint: ## check style, spelling and types
	@$(SETUP) dev
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m codespell_lib
	@$(PY) scripts/check_words.py
	@.venv/bin/pyrefly check --python-interpreter-path $(PY) --summary=none

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
