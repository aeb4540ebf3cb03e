# make setup | demo | test | lint | docs | coverage | bench | clean
# Each target does its own set-up in .venv; Python 3.10 to 3.13, git and make are enough.
#   PYTHON=/path/to/python3.12   the interpreter to build .venv with
#   ARGS="..."                   is passed on, e.g. make test ARGS="-x -k floors", make demo ARGS="--local"

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10)
IN_RANGE := import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))

# Every process of a swarm on one machine has its own thread pool: more than one thread each is slower, not faster.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test lint docs coverage bench clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

# The stamp goes first and comes last: a .venv without one was never finished, or was moved, and is made anew.
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -e $(STAMP) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		for python in $(CANDIDATES); do if $$python -c "$(IN_RANGE)" 2>/dev/null; then break; fi; python=; done; \
		if [ -z "$$python" ]; then \
			echo "setup: none of [$(CANDIDATES)] is a Python 3.10 to 3.13 with venv;"; \
			echo "setup: install one (Debian, Ubuntu: apt install python3-venv) or type: make setup PYTHON=/path/to/python3.12"; \
			exit 1; \
		fi; \
		echo "setup: creating $(VENV) with $$($$python --version)"; \
		rm -rf $(VENV); $$python -m venv $(VENV); \
	fi; rm -f $(STAMP)
	@echo "setup: 1/3 pip"
	@$(BIN)/python -m pip install --quiet -c constraints.txt pip
	@echo "setup: 2/3 textrl-swarm and the exact versions of constraints.txt (torch is large: minutes the first time)"
	@$(BIN)/python -m pip install -c constraints.txt --build-constraint constraints.txt -e '.[swarm,dev,docs]'
	@echo "setup: 3/3 petals, without its own outdated pins"
	@$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt petals
	@touch $(STAMP)
	@echo "setup: done"

demo: setup
	$(BIN)/textrl-swarm demo --out runs/demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/sphinx-build -E -W --keep-going -q -b html docs docs/_build/html
	@echo "docs: open docs/_build/html/index.html"

# Which lines the tests run, servers and other child processes not counted.
coverage: setup
	$(BIN)/python -m pytest --cov=textrl_swarm --cov-report=term-missing:skip-covered $(ARGS)

bench: setup
	@$(BIN)/python benchmarks/run_all.py $(ARGS)

# The environment and the caches. runs/ stays: it holds what was trained.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
