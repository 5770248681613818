# Everything is installed into .venv, which is created on first use and updated only when the versions change.
.DEFAULT_GOAL := help
.PHONY: help demo demo-serve demo-loop test test-slow check static docs quick slow fuzz bench gpu benchmarks-page check-servers figures bundled lock data clean

PYTHON ?= python3
RUN := .venv/.run
SERVE := .venv/.serve
DEV := .venv/.dev
BENCH := .venv-bench/.ready
SERVERS := .venv-servers/.ready
EXTRAS := onnx,parquet,scale,sklearn,vnnlib,dev
BIN := .venv/bin

# pip builds the package in a separate environment; these two variables pin the versions there, too.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Two test processes with one thread each: small networks gain nothing from more. Each begins with one half of the tests
# (worksteal), so that fixtures of a file are made once. Tests start hundreds of processes, which
# would compile the package each time if the environment disabled bytecode files.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=12 --durations-min=5

help:
	@echo 'make demo                assess the bundled network, offline, in about a minute, and print the path of the report'
	@echo 'make demo-serve          serve the bundled network with a guard, and print the command that attacks it'
	@echo 'make demo-loop           attack a served network, let it be hardened and replaced, and attack it again, in five minutes'
	@echo 'make test [HASHES=1]     all checks, and all tests but the following (about 17 minutes on two cores)'
	@echo 'make test-slow           tests of tutorials, browsers, Ray clusters, damaged files and the gallery (about 7 minutes)'
	@echo 'make check               format, lint, types, layers, documentation, quick tests (about 6 minutes)'
	@echo 'make quick               quick tests only (about 4 minutes)'
	@echo 'make docs                build the documentation into site/'
	@echo 'make fuzz [ARGS=…]       open damaged files with new seeds until it is stopped'
	@echo 'make bench [PEERS=dir]   run the benchmarks and write dated records'
	@echo 'make gpu [PYTHON=…]      measure on an accelerator, with the Python and torch that are there, in 9 minutes'
	@echo 'make benchmarks-page     write docs/benchmarks.md from the newest records, and tables of other pages'
	@echo 'make check-servers       download and start MLServer, LitServe and FastAPI, and assess them'
	@echo 'make figures             draw the figures of the documentation from the newest records'
	@echo 'make bundled [FROM=dir]  train the bundled networks again'
	@echo 'make lock ARGS=wheels    write constraints.txt and requirements-hashed.txt again, with uv'
	@echo 'make data FROM=dir       fill the folder that HOLDFAST_DATA names'
	@echo 'make clean               remove environments, caches and builds'

$(RUN): pyproject.toml constraints.txt
	@echo 'installing into .venv'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq -e .
	@touch $@

$(SERVE): pyproject.toml constraints.txt
	@echo 'installing into .venv, with what the server needs'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq -e '.[serve]'
	@touch $@ $(RUN)

# With HASHES=1, as in CI, nothing is installed but files whose hashes are in requirements-hashed.txt.
$(DEV): pyproject.toml constraints.txt requirements-hashed.txt
	@echo 'installing into .venv, with what the tests need'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifdef HASHES
	@$(BIN)/python -m pip install -qq --require-hashes -r requirements-hashed.txt
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
else
	@$(BIN)/python -m pip install -qq -e '.[$(EXTRAS)]'
endif
	@touch $@ $(RUN) $(SERVE)

$(BENCH): pyproject.toml constraints.txt benchmarks/requirements.txt benchmarks/requirements-bare.txt
	@echo 'installing into .venv-bench'
	@test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/python -m pip install -qq -e . -r benchmarks/requirements.txt
	@.venv-bench/bin/python -m pip install -qq --no-deps -r benchmarks/requirements-bare.txt
	@touch $@

# The servers need other versions than the project, so they have separate constraints.
$(SERVERS): benchmarks/servers/requirements.txt benchmarks/servers/constraints.txt
	@echo 'installing into .venv-servers'
	@test -x .venv-servers/bin/python || $(PYTHON) -m venv .venv-servers
	@PIP_CONSTRAINT=benchmarks/servers/constraints.txt .venv-servers/bin/python -m pip install -qq -r benchmarks/servers/requirements.txt
	@touch $@

demo: $(RUN)
	@$(BIN)/holdfast demo

demo-serve: $(SERVE)
	@PATH="$(CURDIR)/$(BIN):$$PATH" deploy/demo-serve.sh "$(CURDIR)/holdfast-demo-serve"

demo-loop: $(SERVE)
	@PATH="$(CURDIR)/$(BIN):$$PATH" deploy/demo-loop.sh "$(CURDIR)/holdfast-demo-loop"

test: check slow

check: static docs quick

static: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DEV)
	$(BIN)/zensical build --strict

quick: $(DEV)
	$(PYTEST) -m 'not slow and not gpu'

slow: $(DEV)
	$(PYTEST) -m 'slow and not long and not gpu'

test-slow: $(DEV)
	$(PYTEST) -m 'long and slow and not gpu'

# ARGS='onnx pt2 --mutations 1000': those formats only, and that many files of each.
fuzz: $(DEV)
	PYTHONPATH=tests OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m fuzzing $(ARGS)

bench: $(BENCH)
	.venv-bench/bin/python -m benchmarks $(if $(PEERS),--peers $(PEERS))

# Without .venv: such a machine may have no network. HOLDFAST_DATA and HOLDFAST_MODELS name the folders of files.
gpu:
	@PYTHONPATH=src $(PYTHON) -m benchmarks.gpu $(ARGS)

benchmarks-page: $(RUN)
	$(BIN)/python -m benchmarks.page
	$(BIN)/python -m benchmarks.bounds_page

check-servers: $(DEV) $(SERVERS)
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m benchmarks.servers .venv-servers

figures: $(BENCH)
	.venv-bench/bin/python -m benchmarks.figures

bundled: $(RUN)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bundled $(FROM)

# ARGS: the wheels of torch for CPUs on Linux.
lock:
	@EXTRAS='$(EXTRAS)' .ci/lock $(ARGS)

data: $(RUN)
	@test -n '$(FROM)' || { echo 'name the folder of the data sets: make data FROM=folder' >&2; exit 2; }
	$(BIN)/python -m holdfast data import $(FROM)

clean:
	rm -rf .venv .venv-bench .venv-servers build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf .import_linter_cache .cache tests/browser/node_modules
