# make quickstart   trains a tiny HySparse and its full-attention baseline, about 3 minutes on two cores
# make test         all tests that need no accelerator
# make test-older   the tests of what can differ on the older stack, for .ci/run on Python 3.11
# make test-gpu     kernel and whole-model tests on an NVIDIA GPU of compute capability 9.0
# make lint         ruff, and mypy over the public modules (pyproject.toml names them)
# make golden       rewrites the golden config files after a deliberate change
# Each makes its virtual environment if it is missing. Another interpreter:
#   make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
JOBS ?= 2

PYTEST := $(RUN) -m pytest -n $(JOBS) --dist loadgroup

# What depends on the versions of JAX, Flax and NumPy: the ops' references and TPU kernels, the
# compatibility shims, the model, checkpoints, one run that is killed and resumed, one mesh, and
# compiling for a TPU. All else is the same Python on both stacks. Of a kernel's many shapes it runs
# those that tests/older.py keeps.
OLDER := $(filter-out tests/test_gpu_% tests/test_tpu_cost.py, \
    $(sort $(wildcard tests/test_*_attention.py tests/test_tpu_*.py))) \
  tests/test_imports.py tests/test_programs.py tests/test_implementations.py tests/test_model.py \
  tests/test_checkpoint.py tests/test_compile_tpu.py \
  tests/test_training.py::test_kill_9_and_resume_is_bit_exact \
  "tests/test_sharding.py::test_tiny_moe_on_a_mesh_equals_one_device[mixed-hysparse]"

.PHONY: quickstart test test-older test-gpu lint golden clean

quickstart: $(VENV)/.runtime
	$(RUN) -m experiments.quickstart --workdir=runs/quickstart

test: $(VENV)/.dev lint
	JAX_PLATFORMS=cpu $(PYTEST) -m "not gpu"

test-older: $(VENV)/.dev
	JAX_PLATFORMS=cpu $(PYTEST) -m "not gpu and not newer" $(OLDER)

test-gpu: $(VENV)/.dev
	$(PYTEST) -m gpu

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy

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
