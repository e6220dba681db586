# Two commands: `make demo` shows the method at work, `make test` checks this copy. Both set up their environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all test-cpus lint docs clean

demo: $(VENV)/installed
	$(BIN)/alignprop-fast demo --output-dir demo_output

# Without the tests that are marked as slow.
test: $(VENV)/installed-dev
	$(BIN)/pytest -n auto --dist worksteal -m "not slow"

test-all: test
	$(BIN)/pytest -n auto --dist worksteal -m slow

# The suite six to eight times, for hours: with the instructions of other CPUs, by one thread and by two.
test-cpus: $(VENV)/installed-dev
	$(BIN)/python tests/on_cpus.py -n auto --dist worksteal

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# docs/ as a site in site/. Any warning fails it. The variable silences an advertisement.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# constraints.txt pins torch 2.13: on a machine with an NVIDIA GPU leave it out to get the newest CUDA build.
$(VENV)/installed: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(VENV)/installed $@

$(VENV)/installed-docs: $(VENV)/installed-dev
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info demo_output
