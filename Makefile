# Every job of the project; `make` lists them. Each target is one call of `python -m tools`, whose
# options are the variables of make's command line: make train RECIPE=sentiment_r4 NPROC=2.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules

# A shell may hold a MODEL or a FORCE of somebody else, so a variable counts where it stands on make's
# command line. These count from the environment, too (docs/networks.md):
FROM_ENVIRONMENT := FINLORA_DATA FINLORA_BASE_URL WHEELHOUSE
# Values are never expanded by make nor by the shell: they reach programs as they were typed.
TYPED := $(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $(v))),$(v)))
$(foreach v,$(TYPED),$(eval override $(v) := $$(value $(v)))$(eval export $(v))$(eval export OPTION_$(v) := $$(value $(v))))
$(foreach v,$(filter-out $(TYPED),$(FROM_ENVIRONMENT)),$(eval override $(v) := $$(value $(v)))$(eval export $(v)))

PY := .venv/bin/python
RUN := $(PY) -m tools
export MAKE_GOALS := $(MAKECMDGOALS)
DEMO := smollm2-135m/sentiment_r4
# Runs on any Python 3.8 or newer, and finds the best one for .venv itself; PYTHON= names another.
ANY := $$(command -v python3 || command -v "$${OPTION_PYTHON:-}" || echo python3)
CHOICES := --python "$${OPTION_PYTHON:-}" --torch "$${OPTION_TORCH:-}"
SETUP := $(ANY) -m tools.setup $(CHOICES) --wheelhouse "$${WHEELHOUSE:-}"
# Every job needs the environment, and looks at file times only, to start at once.
READY := .venv/.ready
$(READY): requirements.txt $(wildcard requirements/*.txt) $(PY)
	@$(SETUP)
$(PY):
	@$(SETUP)

.PHONY: help setup setup-vllm wheelhouse demo model fetch data audit new look recipes show plan smoke profile train status sweep tune reproduce verify eval report parity chat predict merge serve push pull adapters add-model import render results check test test-all lock clean

help:
	@sed -n 's/^##@ \(.*\)/\1/p; s/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

##@ Start
demo: $(READY) ## Convert example data, train SmolLM2-135M with QLoRA, score it, show the table
	@$(RUN) data sentiment
	@$(RUN) train $(DEMO)
	@$(RUN) eval $(DEMO) --tasks fpb
setup: ## Make .venv · [PYTHON=python3.12] [TORCH=cpu|cuda] [WHEELHOUSE=dir]
	@$(SETUP)
setup-vllm: ## Make .venv-vllm for BACKEND=vllm and serving · [PYTHON=…] [TORCH=cpu|cuda]
	@$(ANY) -m tools.setup_vllm $(CHOICES)
wheelhouse: $(READY) ## Every package as a file, for machines without an index · [WHEELHOUSE=dir] [TORCH=cuda]
	@$(PY) -m tools.setup --make-wheelhouse "$${WHEELHOUSE:-wheelhouse}" --torch "$${OPTION_TORCH:-}"

##@ Data
fetch: $(READY) ## Download and verify FinLoRA's files · TASKS=sentiment,ner [FINLORA_BASE_URL=…]
	@$(RUN) fetch
data: $(READY) ## FinLoRA's rows to chat rows · [TASKS=…] [RECIPE=…] [ON_ERROR=quarantine] [REPAIR=0|1]
	@$(RUN) data
audit: $(READY) ## Duplicates, leaks, swapped labels, wrong keys · [TASKS=…]
	@$(RUN) audit
new: $(READY) ## A task of your own rows · TASK=my_task DATA=my.csv [TEST=…] [MAP=…] [TEMPLATE=…] [LABELS=…]
	@$(RUN) new
look: $(READY) ## Rows as text, as rendered, as tokens with the trained ones marked · TASK=… [N=5] [RECIPE=…]
	@$(RUN) look

##@ Train
recipes: $(READY) ## List the catalogue · [TASK=…] [MODEL=qwen3-8b] [METHOD=r4] [JSON=1]
	@$(RUN) recipes
show: $(READY) ## Print a recipe, its plan and what its run took · RECIPE=…
	@$(RUN) show
plan: $(READY) ## Memory, hours and cost, before a GPU is rented · RECIPE=… [GPU=…] [NPROC=4] [PRICE=0.26]
	@$(RUN) plan
smoke: $(READY) ## Try a recipe for two minutes before hours are spent · RECIPE=… [PROFILE=…]
	@$(RUN) smoke
profile: $(READY) ## The hardware here, the settings chosen for it, and why · [RECIPE=…] [PROFILE=…] [NPROC=2]
	@$(RUN) profile
train: $(READY) ## Train a recipe; an interrupted run resumes · RECIPE=… [PROFILE=…] [NPROC=2] [FORCE=1]
	@$(RUN) train
status: $(READY) ## What is training, finished or interrupted
	@$(RUN) status
sweep: $(READY) ## Train several recipes, with one table at the end · RECIPES="sentiment_r4 ner_*"
	@$(RUN) sweep
tune: $(READY) ## Search settings that learn more at equal cost · RECIPE=… [MINUTES=60 | TRIALS=20] [APPLY=1]
	@$(RUN) tune
reproduce: $(READY) ## Train a finished run again and compare the adapters · RUN=runs/smollm2-135m/sentiment_r4
	@$(RUN) reproduce

##@ Score
verify: $(READY) ## Measure a recipe for results/: data, training, scores · RECIPE=… [SEEDS=3] [SHOTS=3] [TASKS=fpb]
	@$(RUN) verify
eval: $(READY) ## Score base and adapter · [RECIPE=… | ADAPTER=…] [TASKS=fpb] [LIMIT=200] [SHOTS=3] [CONSTRAIN=1]
	@$(RUN) eval
report: $(READY) ## A page of all scores and its figures · [PRICE=0.26] [GPU=…]
	@$(RUN) report
parity: $(READY) ## QLoRA against LoRA at 8 bits and full precision: hours, resumable
	@$(PY) -m bench.parity

##@ Use
chat: $(READY) ## Base and adapter answer · RECIPE=… | ADAPTER=… [PROMPT="…"] [SYSTEM="…"]
	@$(RUN) chat
predict: $(READY) ## Answer the rows of a file · RECIPE=… | ADAPTER=… DATA=headlines.csv OUT=labelled.csv
	@$(RUN) predict
merge: $(READY) ## Merge an adapter into its base, and compare · RECIPE=… | ADAPTER=… [BITS=4|16] [FORMAT=gguf]
	@$(RUN) merge
serve: $(READY) ## An OpenAI-compatible endpoint · RECIPE=… | RECIPES="… …" | ADAPTER=… [PORT=8000]
	@$(RUN) serve

##@ Share
push: $(READY) ## Publish a run on the Hub, privately · RECIPE=… NAMESPACE=me [PUBLIC=1] [DRY_RUN=1]
	@$(RUN) push
pull: $(READY) ## Bring a published adapter here · RECIPE=… [NAMESPACE=…] | ADAPTER=owner/name
	@$(RUN) pull
adapters: $(READY) ## List the runs here and those on the Hub · [NAMESPACE=me]
	@$(RUN) adapters

##@ Maintain
add-model: $(READY) ## A base for the catalogue, checked · HUB=owner/name [FOLDER=…] [MODEL=…] [METHODS=…]
	@$(RUN) add-model
import: $(READY) ## Recipes from a FinLoRA config file · CONFIG=finetune_configs.json
	@$(RUN) import
render: $(READY) ## Write recipes, docs/commands.md and docs/scale.md; print a recipe · [RECIPE=…]
	@$(RUN) render
results: $(READY) ## Write docs/results.md, its figure, the README's table and other pages from results/
	@$(RUN) results
	@$(PY) -m bench.performance
	@$(PY) -m bench.methods --page
model: $(READY) ## Write SmolLM2-135M-Instruct to models/
	@$(RUN) model

# By files, since tests of one file share runs; those that train longest come first (conftest.py).
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Tests start a Hub on this machine; these variables would forbid them to ask it.
ONLINE := env -u HF_HUB_OFFLINE -u TRANSFORMERS_OFFLINE -u HF_DATASETS_OFFLINE
test: $(READY) ## Tests, without the long ones
	@$(ONLINE) $(PY) -m pytest $(PARALLEL) -m "not slow"
test-all: $(READY) ## All tests, with the real training of SmolLM2
	@$(ONLINE) $(PY) -m pytest $(PARALLEL)
check: $(READY) ## Lint, types, layers, generated files, every recipe against Axolotl's schema
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@.venv/bin/lint-imports
	@.venv/bin/hadolint docker/Dockerfile
	@$(PY) data/sample/make.py --check
	@$(PY) -m bench.parity --check
	@$(PY) -m bench.performance --check
	@$(PY) -m bench.methods --check
	@$(RUN) check
lock: $(READY) ## Resolve requirements.txt and those of vLLM: requirements/python-3.*.txt, vllm-*.txt
	@$(PY) -m tools.setup --lock
	@$(PY) -m tools.setup_vllm --lock
clean: ## Remove .venv, .venv-vllm, SmolLM2, converted data and caches; trained runs stay
	rm -rf .venv .venv-vllm models/smollm2-135m data/chat .pytest_cache .mypy_cache .ruff_cache
