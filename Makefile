# The steps a person and CI run are the same. `make chat` and `make test` need nothing run before them.
BIN := .venv/bin

.PHONY: chat test test-binary check format setup setup-dev models models-dev bench binary bundle clean

chat: setup
	@$(BIN)/edgespec models --json | grep -q '"path": "/' || $(BIN)/edgespec pull smollm2-135m
	@$(BIN)/edgespec chat

test: check models-dev
	$(BIN)/pytest

# What ships is type-checked as it is installed: folders and import names differ.
check: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@rm -rf build/check && mkdir -p build/check
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/check .
	MYPYPATH=build/check $(BIN)/mypy --config-file pyproject.toml build/check/edgespec
	$(BIN)/pytest -q tests/test_imports.py

format: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

models-dev: setup-dev
	$(BIN)/edgespec pull smollm2-135m qwen2.5-coder-0.5b qwen2.5-coder-1.5b

# A folder that runs without Python, on any processor of this architecture.
binary:
	@packaging/binary.sh

# The same with models, in one file that never needs a network: make bundle MODELS="qwen2.5-coder-1.5b mine.gguf"
MODELS ?= smollm2-135m
bundle: binary
	@for name in $(filter-out %.gguf,$(MODELS)); do dist/edgespec pull --no-requantise $$name || exit; done
	@SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || echo 315532800)} \
		build/venv/bin/python -P packaging/bundle.py $$(dirname $$(realpath dist/edgespec)) $(MODELS)

# On a bare system and on emulated processors: as root, with debootstrap and qemu-user.
test-binary: setup-dev bundle
	$(BIN)/pytest tests/binary

bench: setup
	$(BIN)/edgespec bench -m qwen2.5-coder-1.5b

setup:
	@packaging/setup.sh

setup-dev:
	@packaging/setup.sh dev

clean:
	rm -rf build dist .venv *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
