# Two commands do all the setup: `make demo` for a user and `make test` for a developer. They need Python 3.10 or newer,
# pip and make.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
RUNTIME := .venv/runtime
NOTEBOOKS := $(shell find nbs -name '*.ipynb' -not -path '*/runs/*' -not -path '*/.ipynb_checkpoints/*')
# One worker a core. The tests of a file stay with one worker, the longest files first; notebooks fill the gaps.
PYTEST = $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 25
# What starts programs, executes notebooks, builds the site, opens a browser, or takes long by itself.
SLOW := process or notebook or site or browser or fuzz or wheel

# pytest keeps the tests as it has rewritten them, also where Python writes no bytecode otherwise.
quick test test-all: export PYTHONDONTWRITEBYTECODE =

.PHONY: demo quick test test-all export notebooks readme docs clean

# Train and evaluate a reward model on the embedded default: synthetic preferences, a tiny decoder.
demo: $(RUNTIME)
	@echo "Training on 6,000 synthetic comparisons and evaluating: 1 to 2 minutes on two CPU cores. The model: runs/demo"
	$(BIN)/rlhf_reward train --output_dir runs/demo

# The first thing to run after a change: everything that runs inside the workers.
quick: $(INSTALLED)
	$(PYTEST) -m "not ($(SLOW))"

# Everything but the wheel in an environment of its own, with 60 random requests to each address of a server.
test: $(INSTALLED)
	$(PYTEST) -m "not wheel"

# Everything, with 250 random requests to each address.
test-all: $(INSTALLED)
	$(PYTEST) --fuzz-cases 250

# After editing a notebook: write the modules, the list of options, run the notebooks for their outputs, clean them, write the README.
export: $(INSTALLED)
	$(BIN)/nbdev_export
	$(BIN)/python tools/options.py

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

MAKE_VENV = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "rlhf_reward needs Python 3.10 or newer; pass PYTHON=python3.12, for example.")' \
	&& { $(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python .venv/bin/python install --quiet pip; }; }
INSTALL = $(BIN)/pip install --quiet --constraint constraints.txt --editable
FILES := settings.ini setup.py pyproject.toml constraints.txt

# The library as a user has it, without the tools for tests, notebooks and the site.
$(RUNTIME): $(FILES)
	@echo "Installing rlhf_reward with PyTorch, transformers, datasets, scipy and scikit-learn into .venv, once: 2 to 10 minutes, 1.5 GB, or 6 GB where PyTorch comes with CUDA."
	$(MAKE_VENV)
	$(INSTALL) .
	touch $@

$(INSTALLED): $(FILES)
	@echo "Installing rlhf_reward, its extras and the tools for tests, notebooks and the site into .venv, once: 5 to 15 minutes, 3 GB, or 8 GB where PyTorch comes with CUDA."
	$(MAKE_VENV)
	$(INSTALL) '.[dev]'
	touch $(RUNTIME) $@

clean:
	rm -rf .venv runs nbs/runs nbs/*/runs _proc _docs build dist *.egg-info
