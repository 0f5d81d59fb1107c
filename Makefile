# Every target sets itself up on a machine that has only Python 3.11 or later and make.
#   make run [ARGS="--set pretrain.steps=500"]      make test [ARGS="tests/stages -x"]
#   make PYTHON=/path/to/python3 ...                which Python the environment is made from

# The first interpreter that is new enough: those that can make a whole environment come first.
PYTHON ?= $(shell for need in ensurepip venv; do \
	for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$python -c "import $$need, sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null \
	&& echo $$python && exit; done; done)
BIN := .venv/bin
ARGS :=

.DEFAULT_GOAL := help
.PHONY: help .venv run test test-slow test-clients test-clients-quick check bench build clean

help: ## say what the targets do
	@sed -n 's/^\([.a-z-]*\):.*## \(.*\)/\1	\2/p' $(MAKEFILE_LIST)

.venv: $(BIN)/.ready ## make or refresh the environment, with pinned versions

$(BIN)/.ready: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	python="$(PYTHON)"; test -n "$$python" || { \
	echo "found no Python 3.11 or later; install one, or name it: make PYTHON=/path/to/python3"; \
	exit 1; } >&2; \
	echo "making .venv with $$python"; \
	"$$python" -m venv --clear .venv \
	|| { "$$python" -m venv --clear --without-pip .venv \
	&& "$$python" -m pip --python $(BIN)/python install pip; }; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $@

run: .venv ## the tiny recipe, from raw text to verified bundles
	$(BIN)/ingot run tiny $(ARGS)

# Two processes, each with whole files: what a file sets up once stays set up once. In the order that
# tests/conftest.py says, as otherwise files of few tests come last, however long they take.
test: .venv ## the tests that need neither minutes nor an accelerator
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: .venv ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not clients" $(ARGS)

# Their environments are made once, below ~/.cache/ingot/clients or $$INGOT_CLIENTS; what cannot be
# had here is skipped, and the reason shown.
CLIENTS := $(BIN)/python -m pytest -rs --timeout 0 tests/clients

test-clients: .venv ## bundles in all programs that load them on a CPU, in environments of their own
	$(CLIENTS) -m clients $(ARGS)

test-clients-quick: .venv ## of these the quick ones, in minutes once their environments are made
	$(CLIENTS) -n 2 --dist loadfile -m "clients and not slow" $(ARGS)

check: .venv ## format, lint, types, import contracts, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# With the workers' settings of malloc, on all cores, and without the tests' checks of every call.
bench: .venv ## measurements, printed
	OMP_NUM_THREADS=$$(getconf _NPROCESSORS_ONLN) \
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=10000000000 MALLOC_TOP_PAD_=67108864 \
	$(BIN)/python -m pytest -s -o addopts="--strict-markers --import-mode=importlib" \
	-m "not gpu and not npu" $(ARGS) tests/bench

build: .venv ## wheel and source distribution into dist/
	$(BIN)/python -m build

clean: ## remove the environment, builds and caches; artifacts under .ingot stay
	rm -rf .venv build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
