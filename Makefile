# The steps a person and CI run are the same. `make chat` and `make test` need nothing run before them.
BIN := .venv/bin
EXPORT_BIN := .venv-export/bin

.PHONY: chat test test-all test-slow test-export test-openvino test-binary test-chat check format setup setup-dev
.PHONY: docs models-dev models-slow models-onnx bench binary bundle clean

chat: setup
	@$(BIN)/edgespec chat --pull

# Two small models, 600 MB. Each worker has cores of its own (tests/conftest.py); one has the whole of a file.
test: check models-dev
	$(BIN)/pytest -m "not slow" --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# And what needs larger models, other environments, or root.
test-all: test test-slow test-openvino test-export test-chat test-binary

# On the 1.5B pair (1.6 GB), and on exported models where `make models-onnx` made them.
test-slow: models-slow
	$(BIN)/pytest -m slow

# `make chat` in a fresh clone with a fresh home, in a terminal: it compiles and downloads.
test-chat: setup-dev
	$(BIN)/pytest tests/first

# What exports models runs in an environment of its own.
test-export: models-onnx
	$(EXPORT_BIN)/pytest tests/quant/test_exporter.py tests/models/onnx/test_exported.py

# OpenVINO comes with a build of onnxruntime of its own, which replaces the other for these tests alone.
test-openvino: setup-dev
	@ls build/openvino/onnxruntime >/dev/null 2>&1 || $(BIN)/pip install --quiet --disable-pip-version-check \
		--no-deps --target build/openvino onnxruntime-openvino
	PYTHONPATH=build/openvino $(BIN)/pytest tests/models/onnx/test_openvino.py

# What ships is type-checked as it is installed: folders and import names differ.
check: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@rm -rf build/check build/lib && mkdir -p build/check
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/check .
	MYPYPATH=build/check $(BIN)/mypy --config-file pyproject.toml build/check/edgespec
	$(BIN)/pytest -q tests/test_imports.py

format: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The pages that are made from the code.
docs: setup-dev
	$(BIN)/python packaging/docs.py

models-dev: setup-dev
	$(BIN)/edgespec pull smollm2-135m qwen2.5-coder-0.5b

models-slow: models-dev
	$(BIN)/edgespec pull qwen2.5-coder-1.5b

# The exported models that tests want, in the models folder; made again only when what makes them changed.
models-onnx: models-dev
	@VENV=.venv-export packaging/setup.sh test-export
	$(EXPORT_BIN)/python packaging/models_onnx.py

# A folder that runs without Python, on any processor of this architecture.
binary:
	@packaging/binary.sh

# The same with models, in one file that never needs a network: make bundle MODELS="qwen2.5-coder-1.5b mine.gguf"
# The starter, and a model for machines whose memory does not hold it: there is no network to fetch that one later.
MODELS ?= smollm2-135m qwen2.5-coder-0.5b
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
	rm -rf build dist .venv .venv-export *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
