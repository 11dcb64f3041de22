# The commands of this repository. `make help` lists them.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
INSTALLED := .venv/.installed
PIP_INSTALL := .venv/bin/python -m pip install --disable-pip-version-check
LOCKED_PYTHONS := 3.11 3.12

# accelerate and ninja (for the one operator that DeepSpeed compiles) are looked up in PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help .venv lock demo docs test test-all test-gpu test-slurm bench parity check format clean
.DEFAULT_GOAL := help

help: ## show this list
	@grep -E '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z.-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

.venv: $(INSTALLED) ## make the virtual environment (2 to 4 minutes, 6 GB); LOCKED=1: files of known hashes alone

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; install it, or name one: make PYTHON=/path/to/python3"; exit 2; }
	@echo "$(STEP)the environment, in .venv: 2 to 4 minutes, 6 GB (what pip says is in .venv/install.log)"
	@$(PYTHON) -m venv .venv
	@($(INSTALL)) > .venv/install.log 2>&1 || { tail -n 20 .venv/install.log; echo "pip failed; all it said is in .venv/install.log"; exit 1; }
	@touch $@

ifdef LOCKED
INSTALL = sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock > .venv/build.lock && \
	$(PIP_INSTALL) --require-hashes --requirement .venv/build.lock && \
	$(PIP_INSTALL) --require-hashes --no-build-isolation --requirement requirements.lock && \
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
else
INSTALL = $(PIP_INSTALL) --constraint constraints.txt --editable '.[dev]'
endif

lock: ## make requirements.lock anew from constraints.txt; asks the index for Python 3.11 and 3.12, which must be here
	for version in $(LOCKED_PYTHONS); do \
		python$$version -m venv .lock/$$version && \
		.lock/$$version/bin/python -m pip install --quiet --dry-run --ignore-installed --constraint constraints.txt \
			--report .lock/$$version.json '.[dev]' || exit; \
	done
	$(firstword $(LOCKED_PYTHONS:%=python%)) -m tests.support.lock $(LOCKED_PYTHONS:%=.lock/%.json) > .lock/lock
	mv .lock/lock requirements.lock && rm -r .lock

demo: STEP := 1 of 7: #
demo: .venv ## the whole job on a tiny Gemma 4: shard, train, evaluate, merge, act (about ten minutes on 2 cores)
	@python examples/demo.py

docs: .venv/.docs ## the pages of docs/ as a site, in build/docs/index.html; a warning is an error
	python -m gemma_dist.reference
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build

.venv/.docs: $(INSTALLED)
	$(PIP_INSTALL) --constraint constraints.txt --editable '.[docs]'
	@touch $@

test: .venv ## the tests; one of them: make test ARGS="-k config"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

test-all: export LONG_TESTS := 1
test-all: test ## the tests, with those that take long

test-gpu: .venv ## a self test of this machine's GPU (GPU_TESTS_ON_CPU=1: of these tests, on the CPU)
	HF_HUB_OFFLINE=1 python -m pytest tests/gpu -s $(ARGS)

test-slurm: .venv ## the batch scripts on a real Slurm of Debian's packages, as root, which it installs (15 minutes)
	tests/slurm/cluster.sh install
	SLURM_TESTS=all OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python -m pytest tests/slurm -s $(ARGS)

bench: .venv ## streaming beside its peers, some 25 minutes on 2 cores; one table: make bench ARGS="--only store"
	python benchmarks/streaming.py $(ARGS)

parity: .venv ## every launch config beside one process, three hours on 2 cores; make parity ARGS="--pruned --csv FILE"
	python -m tests.parity $(ARGS)

check: .venv ## formatting, lint and types
	ruff format --check .
	ruff check .
	mypy

format: .venv ## format, and fix what lint can fix
	ruff check --fix .
	ruff format .

clean: ## remove the environment, caches and the demo's results
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis runs/demo
	find . -name __pycache__ -prune -exec rm -rf {} +
