# Two commands for a fresh machine: `make compare` (set-up and the main job) and `make test` (set-up and the tests).

VENV ?= .venv
RUNS ?= runs
# The first Python here that is new enough; name another with `make PYTHON=... compare`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
COMPARED = unigram kneser_ney_5 rnn gru lstm transformer
empty :=
comma := ,
CONFIGS = $(subst $(empty) $(empty),$(comma),$(COMPARED:%=configs/compare/%.py))

.PHONY: compare test lint clean

compare: $(VENV)/installed
	$(VENV)/bin/python -m launch.compare --configs=$(CONFIGS) --workdir=$(RUNS)/compare

test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	PYTHONPATH=. $(VENV)/bin/lint-imports

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found; name one with: make PYTHON=/path/to/python compare" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip

$(VENV)/installed: setup.py $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -e .
	touch $@

$(VENV)/installed-dev: setup.py $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build *.egg-info
