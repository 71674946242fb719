# Everything a fresh clone needs. The stamps in $(VENV) make each target repeatable and cheap the second time.
PYTHON ?= python3
VENV ?= .venv
BACKEND ?= auto
PYTEST_ARGS ?=
FUZZ_SECONDS ?= 60

BIN := $(VENV)/bin
DEMO_EXTRAS := $(if $(filter docker monty restricted,$(BACKEND)),[$(BACKEND)],)

.DEFAULT_GOAL := help
.PHONY: help demo image test lint format bench fuzz clean

help:  ## this text
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo-$(BACKEND)  ## answer a question over a long text in a sandbox, no key and no network (BACKEND=auto)
	$(BIN)/python examples/demo.py --backend $(BACKEND)

test: lint  ## lint, types and the whole test suite (PYTEST_ARGS="-k name")
	$(BIN)/python -m pytest $(PYTEST_ARGS)

image: $(VENV)/.dev  ## the runner image of the docker backend (BASE_IMAGE=... where there is no registry, VARIANT=data, SBOM=prefix)
	$(BIN)/python scripts/runner_image.py $(if $(BASE_IMAGE),--base '$(BASE_IMAGE)') $(if $(VARIANT),--variant $(VARIANT)) $(if $(SBOM),--sbom '$(SBOM)')

lint: $(VENV)/.dev  ## ruff, format check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## rewrite the sources as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev  ## the benchmarks, as JSON lines
	@set -e; for bench in $(wildcard benchmarks/bench_*.py); do $(BIN)/python $$bench; done
	$(if $(wildcard benchmarks/bench_*.py),,@echo 'there are no benchmarks yet' >&2)

fuzz: $(VENV)/.fuzz  ## coverage-guided fuzzing of frames, codec and bridge arguments, one after another (FUZZ_SECONDS=60 each)
	@set -e; for target in frames codec handles; do \
		mkdir -p .fuzz/$$target; \
		echo "== $$target"; \
		$(BIN)/python fuzz/fuzz_$$target.py .fuzz/$$target fuzz/corpus/$$target \
			-max_total_time=$(FUZZ_SECONDS) -artifact_prefix=.fuzz/$$target- -print_final_stats=1; \
	done

clean:  ## remove what the targets above made
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .fuzz build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

$(VENV)/.fuzz: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	@touch $@

$(VENV)/.demo-$(BACKEND): pyproject.toml | $(BIN)/python
	@echo 'installing; the guest of the wasm backend is built once, which takes half a minute'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.$(DEMO_EXTRAS)'
	@touch $@
