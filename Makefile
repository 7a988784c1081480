# make demo   set up and run the whole study on the virtual cohort
# make test   set up for development and run every check
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help venv dev demo test test-all test-slurm lab bench bench-gpu notebooks gate clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, not %d.%d: set PYTHON=/path/to/python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing the package and what it needs: some minutes, once'
	$(PIP) install -q -c constraints.txt -e '.[fast]'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo 'installing what development needs: a minute, once'
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

venv: $(VENV)/.base       ## a virtual environment with the package

dev: $(VENV)/.dev         ## the same, with what development needs

demo: venv                ## the study on the virtual cohort -> runs/demo/report.html
	$(BIN)/uad demo --out $(OUT)

lab: venv                 ## the demo's results in JupyterLab
	$(BIN)/uad explore $(OUT)

gate: dev                 ## notebooks and package agree; notebooks are clean
	PATH="$(abspath $(BIN)):$$PATH" bash tests/gate.sh

test: dev gate            ## every check but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: dev gate        ## every check; keeps its last line in benchmarks/
	mkdir -p .pytest_cache; set -o pipefail; $(BIN)/python -m pytest -m 'slow or not slow' | tee .pytest_cache/test-all.txt
	echo "$$(date +%F), commit $$(git rev-parse --short HEAD): $$(tail -n 1 .pytest_cache/test-all.txt)" | tee benchmarks/test-all.txt

test-slurm: dev           ## a real SLURM of one node, installed from Debian's packages and started on loopback (as root)
	@[ "$$(id -u)" = 0 ] || { echo "error: SLURM is installed and started as root here: run 'sudo make test-slurm'" >&2; exit 1; }
	@export PATH="$$PATH:/usr/sbin:/sbin"; for c in munged slurmctld slurmd sbatch; do command -v $$c >/dev/null && continue; \
	  command -v apt-get >/dev/null || { echo "error: $$c is missing and there is no apt-get: install SLURM and munge by hand, then run this again" >&2; exit 1; }; \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge; break; done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm -m slurm

bench: dev                ## the parts against what anyone can install; keeps the table in benchmarks/
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py

bench-gpu: dev            ## training and scoring on a GPU, against its limits and MONAI; keeps the table in benchmarks/
	$(BIN)/python benchmarks/gpu.py

notebooks: dev            ## execute the library notebooks in place, so that their figures are fresh
	OMP_NUM_THREADS=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.store_widget_state=False nbs/[0-9]*.ipynb
	PATH="$(abspath $(BIN)):$$PATH" nbdev_clean

clean:                    ## remove the environment (results in runs/ stay)
	rm -rf $(VENV) build dist *.egg-info
