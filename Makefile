# The commands do all their own set-up: a virtual environment in .venv, then the work.
PYTHON ?= python3
BIN := .venv/bin
# Processes that run the tests, each on one thread; 0 for this one alone.
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo studio test coverage docs

help:
	@echo "make demo   show what trained models do (half a minute, demo/models/index.html); then train a small generator"
	@echo "            on built-in photographs (about five minutes on two cores, demo/index.html): TRAIN=no leaves that out"
	@echo "make studio open the studio in the browser, with what make demo trained (which it does first)"
	@echo "make test   lint, types and tests"
	@echo "make coverage   the tests once more, and the lines that none of them runs"
	@echo "make docs   the documents, notebooks executed, and the reference of the package as web pages, build/docs/index.html"
	@echo "All first make .venv and install into it. PYTHON=python3.12 chooses another interpreter (3.11 or newer)."

demo: .venv/.installed
	@echo "== Drawing what the models do that come with the package"
	@$(BIN)/attnorm models --out demo/models --overwrite
	@echo "Open demo/models/index.html in a browser."
ifneq ($(TRAIN),no)
	@echo "== Training the preset 'demo' for at most five minutes (Ctrl-C stops it; make demo goes on)"
	@$(BIN)/attnorm train --preset demo --out demo/run
	@echo "== Drawing what it learnt"
	@$(BIN)/attnorm page demo/run --out demo --overwrite
	@echo "Open demo/index.html in a browser."
endif

studio: .venv/.installed
	@test -d demo/run/checkpoints || $(MAKE) --no-print-directory demo
	@$(BIN)/attnorm studio demo/run

test: .venv/.installed
	@echo "== Lint and format"
	@$(BIN)/ruff check src tests scripts
	@$(BIN)/ruff format --check src tests scripts
	@echo "== Types"
	@$(BIN)/mypy
	@echo "== Tests"
	@$(BIN)/python -m pytest --durations=20 -n $(JOBS) --dist loadfile

coverage: .venv/.installed
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --cov=attnorm --cov-report=term-missing:skip-covered

docs: .venv/.installed
	@$(BIN)/sphinx-build -q -b html docs build/docs
	@echo "Open build/docs/index.html in a browser."

# constraints.txt holds a set of releases that works together; pyproject.toml says what may differ from it.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "attnorm needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "== Installing into .venv (the first time takes a few minutes: torch is large)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ echo "python3-venv is missing: on Debian or Ubuntu, apt-get install python3-venv" >&2; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@
