# make setup | demo | test | lint | bench | clean
# Each target does its own set-up in .venv: Python 3.10 to 3.12, git and make are enough.
#   PYTHON=/path/to/python3.12   builds .venv with this interpreter (default: the first of python3, python3.12, ... in range)
#   ARGS="..."                   is passed on, e.g. make test ARGS="-x -k floors", make demo ARGS="--help"

VENV := .venv
BIN := $(VENV)/bin
# Renamed first: an interrupted removal must not leave something that looks like an environment.
REMOVE_VENV := rm -rf $(VENV).old; if [ -e $(VENV) ]; then mv $(VENV) $(VENV).old; rm -rf $(VENV).old; fi
CANDIDATES := $(or $(PYTHON),python3 python3.12 python3.11 python3.10 python)

# Every process of a swarm on one machine is a process with its own thread pool: more than one thread each is slower, not faster.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test lint bench clean
.DEFAULT_GOAL := setup

# $(VENV)/.setup    what .venv was installed from; absent until an installation has finished
# $(VENV)/.started  an installation has begun; if it is there and nobody holds the lock, that installation was cut short
setup:
	@set -eu; trap 'exit 130' INT TERM; \
	say() { echo "setup: $$*"; }; \
	in_range='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'; \
	origin='import sys; print(sys.base_prefix, *sys.version_info[:3])'; \
	installed='import sys; from importlib.util import find_spec; \
	sys.exit(not all(map(find_spec, "textrl_swarm torch transformers peft pfrl hivemind petals pytest ruff".split())))'; \
	wanted="$$(cat pyproject.toml constraints.txt | cksum) in $(CURDIR)"; \
	same_python() { [ -z "$(PYTHON)" ] || [ "$$("$(PYTHON)" -c "$$origin")" = "$$($(BIN)/python -c "$$origin")" ]; }; \
	ready() { [ "$$(cat $(VENV)/.setup 2>/dev/null)" = "$$wanted" ] && $(BIN)/python -c "$$installed" 2>/dev/null && same_python; }; \
	if ready; then exit 0; fi; \
	\
	python=; for candidate in $(CANDIDATES); do \
		if "$$candidate" -c "$$in_range" 2>/dev/null; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		say "needs Python 3.10, 3.11 or 3.12, and none of these is one: $(CANDIDATES)"; \
		say "install one, or name it: make setup PYTHON=/path/to/python3.12"; exit 1; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
		say "$$("$$python" --version) ($$python) cannot create environments; install its venv module (Debian, Ubuntu:"; \
		say "apt install python3-venv) or name another interpreter: make setup PYTHON=/path/to/python3.12"; exit 1; \
	fi; \
	\
	exec 9<Makefile; \
	lock() { "$$python" -c "import fcntl; fcntl.flock(9, $$1)" 2>/dev/null; }; \
	lock 'fcntl.LOCK_EX | fcntl.LOCK_NB' || { say "another make is at work on $(VENV), waiting for it"; lock fcntl.LOCK_EX || true; }; \
	if ready; then exit 0; fi; \
	\
	broken=; \
	if [ -e $(VENV)/.started ]; then broken="an earlier installation was cut short"; \
	elif [ -e $(VENV) ]; then \
		case "$$(cat $(VENV)/.setup 2>/dev/null)" in "" | *" in $(CURDIR)") ;; *) broken="it was made in another directory" ;; esac; \
		if ! $(BIN)/python -c "$$in_range" 2>/dev/null; then broken="its Python does not run or is not 3.10 to 3.12"; \
		elif ! $(BIN)/python -m pip --version >/dev/null 2>&1; then broken="it has no working pip"; \
		elif ! same_python; then broken="it was made with another Python than $(PYTHON)"; \
		elif [ -e $(VENV)/.setup ] && ! $(BIN)/python -c "$$installed" 2>/dev/null; then broken="packages are missing from it"; fi; \
	fi; \
	if [ -n "$$broken" ]; then say "making $(VENV) anew: $$broken"; $(REMOVE_VENV); fi; \
	if [ ! -e $(VENV) ]; then \
		say "creating $(VENV) with $$("$$python" --version) ($$python)"; \
		mkdir $(VENV); touch $(VENV)/.started; \
		"$$python" -m venv $(VENV); \
	fi; \
	rm -f $(VENV)/.setup; touch $(VENV)/.started; \
	pip() { \
		$(BIN)/python -m pip "$$@" || { \
			code=$$?; \
			if [ $$code -le 2 ]; then rm -f $(VENV)/.started; fi; : pip undid its own failure, nothing is half-made; \
			say "pip failed; see above, then run make again"; exit $$code; \
		}; \
	}; \
	say "1/3 pip"; pip install --quiet -c constraints.txt pip; \
	say "2/3 textrl-swarm and the exact versions of constraints.txt (torch is large: minutes the first time)"; \
	pip install -c constraints.txt --build-constraint constraints.txt -e '.[swarm,dev]'; \
	say "3/3 petals, without its own outdated pins"; pip install --no-deps -c constraints.txt petals; \
	if ! $(BIN)/python -c "$$installed"; then say "a package is still missing; run make clean, then make setup"; exit 1; fi; \
	rm -f $(VENV)/.started; echo "$$wanted" > $(VENV)/.setup; \
	say "done, $(VENV) has $$($(BIN)/python --version)"

demo: setup
	$(BIN)/textrl-swarm demo --out runs/demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	@set -e; for script in benchmarks/*.py; do \
		if [ ! -e "$$script" ]; then echo "bench: benchmarks/ has no scripts yet"; break; fi; \
		echo "bench: $$script"; $(BIN)/python "$$script" $(ARGS); \
	done

# The environment and the caches. runs/ stays: it holds what was trained.
clean:
	$(REMOVE_VENV)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
