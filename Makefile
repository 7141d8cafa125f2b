# make demo               much of the extension, on a scratch server
# make install            into a server; PG_CONFIG=... picks it, FORCE=1 replaces files that are not this extension's
# make test               the test suite, on scratch servers; PYTEST_ARGS=...
# make test-matrix        on PostgreSQL 17 and 18, in Debian systems that it bootstraps as root; MATRIX_ARGS=--ci: what CI runs
# make test-packages      the .debs, installed in such systems (as root, with debootstrap, lintian and rpm)
# make installcheck       pg_regress against a running server; DSN=...: the whole suite against that one
# make soak               kill at random while much runs; MINUTES=60
# make bench              measure, and write docs/benchmarks.md; BENCH_ARGS=...
# make lint | format      ruff and mypy | ruff, which changes files
# make render | check     write what is made of sql_templates/ and plpy/ | fail where it is stale
# make deb | rpm | dist   packages for all versions of PostgreSQL, in dist/
# make bootstrap          only what the others first see to (tools/bootstrap.sh); quick when all is there
# make clean | distclean  remove what was built | the Python environment too

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
	@sed -n '/^# make /s/^# //p' Makefile

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

# PostgreSQL 17 and 18 in bootstrapped Debian systems; MATRIX_ARGS=--ci is the part that CI runs.
test-matrix: check
	$(SUDO) $(PYTHON) tests/matrix.py $(MATRIX_ARGS)

# Installs the packages in Debian systems that it bootstraps: as root, with debootstrap, lintian and rpm.
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
