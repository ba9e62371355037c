# Every target sets up what it needs; `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell sed -n 's/^ *"\(torch==[0-9.]*\)",$$/\1/p' pyproject.toml)
# Where torch comes from when no local wheel fits: the CUDA build where there is a card,
# the small CPU build elsewhere. Both are the version that pyproject.toml locks.
ifneq ($(shell command -v nvidia-smi),)
TORCH_INDEX ?=
else
TORCH_INDEX ?= --index-url https://download.pytorch.org/whl/cpu
endif
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
define install
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing $(1)"
	@$(PIP) install --require-hashes -r $(1) 2>&1 | grep -v '^WARNING: Location' ; test $${PIPESTATUS[0]} -eq 0
	@$(PIP) install --no-index "$(TORCH)" 2>/dev/null || $(PIP) install $(TORCH_INDEX) "$(TORCH)"
	@touch $@
endef
SHELL := /bin/bash

.PHONY: help serve test check lock clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 10

serve: .venv/serve ## serve model/default on port 8000; ARGS="--port 9000 ..." for options
	@exec $(BIN)/python -m server $(ARGS)

# A test process that dies ends the run: pytest-xdist may wait forever for the one that replaces it.
test: .venv/dev ## run the tests; ARGS="-k policy ..." for pytest options
	@$(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart 0 $(ARGS)

check: .venv/dev ## lint and type-check
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

lock: ## resolve the dependencies again (needs uv)
	uv pip compile -q --universal --generate-hashes --python-version 3.11 --no-header --no-annotate \
		--no-emit-package torch -c <(echo "$(TORCH)+cpu") pyproject.toml -o requirements.lock
	uv pip compile -q --universal --generate-hashes --python-version 3.11 --no-header --no-annotate \
		--no-emit-package torch -c <(echo "$(TORCH)+cpu") -c requirements.lock --all-extras \
		pyproject.toml -o requirements-dev.lock

clean: ## remove the virtual environment and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/serve: requirements.lock
	$(call install,requirements.lock)

.venv/dev: requirements-dev.lock
	$(call install,requirements-dev.lock)
	@touch .venv/serve
