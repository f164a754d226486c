# make quickstart   trains a tiny HySparse and its full-attention twin, about 3 minutes on two cores
# make test         all tests that need no accelerator
# make test-gpu     kernel tests on an NVIDIA GPU of compute capability 9.0
# make lint         ruff
# make golden       rewrites the golden config files after a deliberate change
# Each makes its virtual environment if it is missing. Another interpreter:
#   make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
JOBS ?= 2

.PHONY: quickstart test test-gpu lint golden clean

quickstart: $(VENV)/.runtime
	$(RUN) -m experiments.quickstart --workdir=runs/quickstart

test: $(VENV)/.dev lint
	JAX_PLATFORMS=cpu $(RUN) -m pytest -n $(JOBS) --dist worksteal -m "not gpu"

test-gpu: $(VENV)/.dev
	$(RUN) -m pytest -n $(JOBS) --dist worksteal -m gpu

lint: $(VENV)/.dev
	$(RUN) -m ruff check .

golden: $(VENV)/.dev
	JAX_PLATFORMS=cpu $(RUN) -m tests.test_configs

clean:
	rm -rf $(VENV) runs

$(VENV)/.runtime: requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
