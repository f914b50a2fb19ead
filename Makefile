# `make demo` and `make test` set up what they need and run. A python3 that has torch >= 2.11 is used as it is
# (PYTHON=... names another); without one they make .venv and install the release below, which is the one that
# the tests are run with.
PYTHON ?= python3
TORCH ?= torch==2.13.0

ifneq ($(shell $(PYTHON) -c 'import tomllib; print("ok")' 2>/dev/null),ok)
  $(error $(PYTHON) is not Python 3.11 or later: name one that is with PYTHON=...)
endif
HAS_TORCH = from importlib.metadata import version; print(tuple(map(int, version("torch").split(".")[:2])) >= (2, 11))
VENV := $(if $(findstring True,$(shell $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null)),,.venv/ready)
PY := $(if $(VENV),.venv/bin/python,$(PYTHON))
REQUIREMENTS = import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*p["dependencies"], *p["optional-dependencies"]["test"], *sys.argv[1:], sep="\n")
BUILD_TOOLS := setuptools>=77 $(foreach tool,cmake ninja,$(if $(shell command -v $(tool)),,$(tool)))

.PHONY: demo test setup python

demo: setup
	@$(PY) -m fusedkv_ext demo

test: setup
	@$(PY) -m pytest -q python_tests

# pip does not touch the network when everything is there; what it cannot get, the tests that need it name.
setup: $(VENV)
	@mkdir -p build
	@$(PY) -c '$(REQUIREMENTS)' $(foreach tool,$(BUILD_TOOLS),'$(tool)') > build/requirements.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check --retries 1 -r build/requirements.txt \
	  || echo "make: some packages could not be installed, going on with those that are there" >&2
	@$(PY) setup.py -q build_ext --inplace

.venv/ready:
	@$(PYTHON) -m venv .venv
	@echo "Installing $(TORCH) into .venv"
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@touch $@

python: $(VENV)
	@echo $(PY)
