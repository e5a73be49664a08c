# The commands of this kit. GNU make 3.81 or later (macOS has it); `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.textok-mini-ready

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lab reproduce grid claims tables clean

help: ## list these commands
	@echo "textok_mini: the commands, and what they take on two cores"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo "Another interpreter: make setup PYTHON=python3.12 (3.11, 3.12 and 3.13 are supported)"

setup: $(READY) ## own environment in .venv, and weights: 3 to 10 minutes once, seconds after that
	@$(BIN)/python -m textok_mini.weights

# The stamp is written last, so an interrupted installation is taken up again; pip skips what is there.
$(READY): pyproject.toml constraints.txt
	@set -e; start=$$(date +%s); \
	python="$(PYTHON)"; \
	if $(BIN)/python -m pip --version >/dev/null 2>&1; then python=$(BIN)/python; fi; \
	command -v "$$python" >/dev/null || { echo "error: no $$python here: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	"$$python" -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13))' || { \
	  echo "error: $$python is $$("$$python" -V 2>&1), but Python 3.11 to 3.13 is needed: make setup PYTHON=python3.12" \
	    "(after make clean, if .venv has the wrong one)" >&2; exit 1; }; \
	if [ "$$python" != "$(BIN)/python" ]; then \
	  echo "setup: a new environment in $(VENV), with $$("$$python" -V)"; "$$python" -m venv --clear $(VENV); fi; \
	echo "setup: installing into $(VENV), a few GB, 3 to 10 minutes the first time ..."; \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[all]'; \
	touch $@; echo "setup: installed in $$(( $$(date +%s) - start )) s"

quickstart: setup ## train TexTok and its twin, compare them in a notebook: 4 to 10 minutes
	@echo "quickstart: notebooks/00_quickstart.ipynb into runs/quickstart/, 4 to 10 minutes on two cores"
	@$(BIN)/python -m textok_mini.notebooks 00_quickstart output_dir=runs/quickstart

test: setup ## format, lint, tests, notebooks: 10 to 20 minutes
	@echo "test: ruff, then pytest with two processes; 10 to 20 minutes"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile  # much waits for one core; two files at once do not

PRESET ?= laptop

reproduce: setup ## every notebook into runs/PRESET, and a page of what came out; PRESET=smoke: minutes
	@echo "reproduce: notebooks/ with PRESET=$(PRESET) into runs/$(PRESET)/; smoke takes minutes, laptop an hour"
	@$(BIN)/python -m textok_mini.reproduce $(PRESET)

GRID ?= reference/ablations

grid: setup ## train what is missing of a grid, GRID=reference/ablations: hours; start it twice for two cores
	@echo "grid: $(GRID), one thread; the same command goes on where it stopped"
	@OMP_NUM_THREADS=1 $(BIN)/python -m textok_mini.grid run $(GRID)

claims: setup ## the ledger of the paper's claims, from reference/ or RESULTS=FOLDER: seconds
	@echo "claims: from $(if $(RESULTS),$(RESULTS),reference/)"
	@$(BIN)/python -m textok_mini.claims $(if $(RESULTS),results=$(RESULTS)) page=runs/claims.html

lab: setup ## JupyterLab on the notebooks, until you press Ctrl-C
	@echo "lab: JupyterLab opens in the browser; Ctrl-C ends it"
	@$(BIN)/jupyter lab $$(test "$$(id -u)" = 0 && echo --allow-root) --notebook-dir=notebooks

tables: setup ## write the README's tables from reference/: seconds
	@echo "tables: README.md from reference/"
	@$(BIN)/python -m textok_mini.grid readme

clean: ## remove the environment and caches; data/ and runs/ stay
	@echo "clean: removing $(VENV) and caches; data/ and runs/ stay"
	@rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	@find textok_mini tests notebooks -name __pycache__ -prune -exec rm -rf {} +
