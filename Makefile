# Two commands: `make demo` shows the method at work, `make test` checks this copy. Both set up their environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-cpus lint clean

demo: $(VENV)/installed
	$(BIN)/alignprop-fast demo --output-dir demo_output

test: $(VENV)/installed-dev
	$(BIN)/pytest -n auto --dist worksteal

# The suite six to eight times, for hours: with the instructions of other CPUs, by one thread and by two.
test-cpus: $(VENV)/installed-dev
	$(BIN)/python tests/on_cpus.py -n auto --dist worksteal

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# constraints.txt pins torch 2.13: on a machine with an NVIDIA GPU leave it out to get the newest CUDA build.
$(VENV)/installed: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output
