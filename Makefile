# Needs Python 3.11 or newer and make, nothing else. Everything is installed into .venv in this folder.

PYTHON ?= python3
WORKERS ?= 4
JOBS ?= 2
SHARE ?= 1
TRANSACTIONS ?=
REPORT ?= report.json
BALANCES ?= balances.csv
SITE ?= build/site
ARGS ?=

# Some hundred processes are started by tests, and each would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
READY := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test oldest torture check format bench model mutants dashboards docs clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1@/p' $(MAKEFILE_LIST) | awk -F@ '{ printf "%-18s %s\n", $$1, $$2 }'
	@echo "Variables: PYTHON=python3.12  TRANSACTIONS=file.csv.gz  WORKERS=4  JOBS=2  ARGS='further arguments'"

setup: $(READY) ## make .venv with the package and all tools

$(READY): pyproject.toml constraints.txt
	@command -v '$(PYTHON)' >/dev/null || { \
	  echo "There is no $(PYTHON): install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$('$(PYTHON)' --version 2>&1): Python 3.11 or newer is needed." \
	    "Name one: make PYTHON=python3.12" >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	'$(PYTHON)' -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## rehearse a whole migration in a scratch database, and back
	@$(BIN)/walletmigrate rehearse --workers $(WORKERS) --report '$(REPORT)' --balances '$(BALANCES)' \
	  $(if $(TRANSACTIONS),--transactions '$(TRANSACTIONS)') $(ARGS) \
	  && echo "Report: $(abspath $(REPORT))" && echo "Balances: $(abspath $(BALANCES))"

test: $(READY) ## run all tests on real PostgreSQL
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

oldest: $(READY) ## the adapter's tests with the oldest SQLAlchemy that is promised, in an environment of their own
	'$(PYTHON)' -m venv .venv/oldest
	sed 's/^SQLAlchemy==.*/SQLAlchemy==2.0.40/' constraints.txt >.venv/oldest/constraints.txt
	.venv/oldest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv/oldest/constraints.txt -e '.[dev]'
	.venv/oldest/bin/python -m pytest --postgres 18 $(sort $(wildcard tests/test_adapter*.py tests/test_watch*.py)) \
	  tests/test_connect.py $(ARGS)

torture: $(READY) ## play every interleaving of the protocol, for some hours; SHARE=10: one of ten; SHARE=3/40: the third of forty
	$(BIN)/python -m pytest -n $(JOBS) --timeout 0 --torture $(SHARE) tests/test_torture.py \
	  tests/test_job_workers.py::test_a_backfill_killed_at_random_points_opens_each_account_once $(ARGS)

check: $(READY) ## format, lint, types, layers and SQL
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/sqlfluff lint --disable-progress-bar src/walletmigrate/sql
	$(BIN)/python dashboards/build.py --check

format: $(READY) ## let ruff write the format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(READY) ## measure the speed, durability on
	$(BIN)/python bench/run.py $(ARGS)

model: $(READY) ## explore every state of a model of the protocol, and of mutated ones
	$(BIN)/python -m model --jobs $(JOBS) $(ARGS)

mutants: $(READY) ## take each guard of the SQL away and see that a test misses it; SHARE=10: one of ten
	$(BIN)/python -m mutants play --jobs $(JOBS) --share $(SHARE) $(ARGS)

dashboards: $(READY) ## make the Grafana dashboards anew
	$(BIN)/python dashboards/build.py

# The variable silences no warning about these texts, only a banner that MkDocs Material prints whenever it is loaded: that it will not
# work with MkDocs 2. `--strict` makes every real warning an error.
docs: $(READY) ## build the documentation's site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir '$(abspath $(SITE))'
	@echo "Site: $(abspath $(SITE))/index.html"

clean: ## remove what these commands made
	rm -rf .venv .packages .mutants build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f report.json balances.csv
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
