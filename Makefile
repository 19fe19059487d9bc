# Two commands matter to a newcomer: `make demo` and `make test`. Both set up everything they need in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# pytest options for `make test`, such as: make test T="-k resume -x"
T      ?=

.PHONY: help venv system demo figures test check lint bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

venv: $(READY) ## virtual environment with everything needed

$(READY): pyproject.toml tests/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "hpcsngd needs Python 3.10 or later: make PYTHON=python3.11 ..." >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "no virtual environment; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@echo "setting up $(VENV) (a minute or two; torch is large)"
	@if $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then pins="-c tests/constraints.txt"; fi; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$pins -e '.[train,text,tensorboard,wandb,analysis,dev]'
	@touch $@

system: ## system packages that some tests use, where this machine lets us install them
	@tests/testbed/packages

demo: venv ## train digits with HyLo on two ranks of this machine; ends with a report
	@$(BIN)/hpcsngd submit --site local --exp digits-hylo --wait

# Runs of digits that have what most figures show; made again, only what is missing runs.
FIGURE_RUNS := $(BIN)/hpcsngd submit --site local --wait --run-root runs/figures --profiling
MICROSCOPE  := --rank-analysis --grad-norm --grad-error --set diagnostics.quantify_every=5 --set checkpoint.keep=10
figures: venv ## the papers' figures from runs in runs/, after making runs of digits (ten minutes); into figures/
	@for exp in digits-sgd digits-kfac; do $(FIGURE_RUNS) --exp $$exp --matrix seed=1,2,3 || exit; done
	@$(FIGURE_RUNS) --exp digits-hylo --matrix seed=1,2,3 $(MICROSCOPE)
	@$(FIGURE_RUNS) --exp digits-hylo --matrix seed=1,2,3 --matrix preconditioner.method=kid,kis,hybrid \
	  --set preconditioner.ratio=0.25 $(MICROSCOPE)
	@for ranks in 1 4; do $(FIGURE_RUNS) --exp digits-kfac --ranks-per-node $$ranks --matrix seed=1 \
	  --set batch_size=$$((64 / $$ranks)) || exit; done
	@$(BIN)/hpcsngd submit --site local --wait --run-root runs/figures --exp digits-async --matrix seed=1,2
	@$(BIN)/hpcsngd landscape runs/figures/digits-hylo-sweep-*/0000-* --points 25
	@for spec in analysis/reports/*.yaml; do $(BIN)/hpcsngd report runs/figures/* --spec $$spec \
	  --out figures/$$(basename $$spec .yaml).html || echo "$$spec: no runs for it here"; done

test: venv system ## every test, including those on a real Slurm
	$(BIN)/python -m pytest $(T)

check: lint ## formatting, linters, types, import rules, fast tests: before every commit
	$(BIN)/python -m pytest -m "not dist and not slurm and not slow and not gpu and not apptainer and not browser" $(T)

lint: venv ## the part of check that runs no test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: venv ## benchmarks; ratios within one run, results in benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.hylo
	$(BIN)/python -m benchmarks.kfac
	$(BIN)/python -m benchmarks.mfac
	$(BIN)/python -m benchmarks.report

clean: ## remove the virtual environment and what tools left
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
