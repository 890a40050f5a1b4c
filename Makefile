# Two commands do all the set-up: `make demo` and `make test`. Python 3.10 or newer, pip and make are enough.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
NOTEBOOKS := $(shell find nbs -name '*.ipynb' -not -path '*/runs/*' -not -path '*/.ipynb_checkpoints/*')

.PHONY: demo test test-notebooks export notebooks readme docs clean

# Train and evaluate a reward model on the embedded default: synthetic preferences, a tiny decoder.
demo: $(INSTALLED)
	$(BIN)/rlhf_reward train --output_dir runs/demo

# Every notebook in a fresh process, then pytest, which also checks that export, README and clean would change nothing.
test: test-notebooks
	$(BIN)/python -m pytest

# Two at a time with one thread each: torch's threads of two processes on the same cores wait for each other. One is about TRL, which
# Python 3.10 has not.
test-notebooks: $(INSTALLED)
	skipped=$$($(BIN)/python -c 'import trl' 2> /dev/null && echo none || echo 08_moving); echo "notebooks left out: $$skipped"; \
	printf '%s\n' $(NOTEBOOKS) | grep -v "$$skipped" | OMP_NUM_THREADS=1 xargs -P 2 -n 1 $(BIN)/nbdev_test --n_workers 0 --path

# After editing a notebook: write the modules, run the notebooks for their outputs, clean them, write the README.
export: $(INSTALLED)
	$(BIN)/nbdev_export

notebooks: export
	for notebook in $(NOTEBOOKS); do $(BIN)/jupyter execute --inplace $$notebook || exit 1; done
	$(BIN)/nbdev_clean
	$(MAKE) readme

readme: $(INSTALLED)
	$(BIN)/python tools/docs.py readme

# The site in _docs/, from the notebooks alone: python -m http.server --directory _docs
docs: $(INSTALLED)
	$(BIN)/python tools/docs.py site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "rlhf_reward wants Python 3.10 or newer; pass PYTHON=python3.12, say.")'
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python .venv/bin/python install --quiet pip; }
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs nbs/runs nbs/*/runs _proc _docs build dist *.egg-info
