# make demo | test | lint | bench | soak [MINUTES=60] | render | check | install [PG_CONFIG=...] | installcheck | deb | rpm | dist | clean
# Every target first sees to what it needs (tools/bootstrap.sh), which is quick when all is there.

PYTHON := .venv/bin/python
# Root's rights are needed to install into a server, and by nothing else.
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
PYTEST_ARGS ?= -n 2
# Connection string of a running server for installcheck.
DSN ?=
# How long make soak works and kills.
MINUTES ?= 60

ifdef PG_CONFIG
export PG_CONFIG
PG_CONFIG_ARG := --pg-config "$(PG_CONFIG)"
endif

.PHONY: help bootstrap render check install test test-matrix installcheck deb rpm dist test-packages lint format bench soak demo clean distclean

help:
	@sed -n '1,2s/^# //p' Makefile

bootstrap:
	@sh tools/bootstrap.sh

render: bootstrap
	$(PYTHON) build.py render

check: bootstrap
	$(PYTHON) build.py check

install: bootstrap
	$(SUDO) env FORCE="$(FORCE)" $(PYTHON) build.py install $(PG_CONFIG_ARG)

test: check install
	$(PYTHON) -m pytest $(PYTEST_ARGS)

# pg_regress against the server that PGHOST, PGPORT and PGUSER name; with a DSN, the whole suite against that one.
installcheck: bootstrap
ifeq ($(DSN),)
	$(PYTHON) build.py installcheck $(PG_CONFIG_ARG)
else
	$(PYTHON) -m pytest $(PYTEST_ARGS) --dsn-of-running-server "$(DSN)"
endif

# Packages for all versions of PostgreSQL, in dist/.
deb rpm dist: check
	$(PYTHON) build.py $@

# Installs them in Debian systems that it bootstraps: as root, with debootstrap, lintian and rpm.
# PostgreSQL 17 and 18 in bootstrapped Debian systems; MATRIX_ARGS=--ci is the part that CI runs.
test-matrix: check
	$(SUDO) $(PYTHON) tests/matrix.py $(MATRIX_ARGS)

test-packages: check
	$(SUDO) $(PYTHON) -m pytest packages

lint: bootstrap
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m mypy --python-version 3.9 plpy/pg_background

format: bootstrap
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: check install
	$(PYTHON) -m pip install --quiet --disable-pip-version-check 'matplotlib>=3.8,<4'
	$(PYTHON) bench/run.py $(BENCH_ARGS)

soak: check install
	PG_BACKGROUND_SOAK_MINUTES="$(MINUTES)" $(PYTHON) -m pytest -s tests/test_soak.py

demo: check install
	$(PYTHON) build.py demo $(PG_CONFIG_ARG)

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .bootstrap.lock .bootstrap.log
