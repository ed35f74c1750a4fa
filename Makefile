# Every job of the project. `make` lists them. Values are never expanded by make nor by the shell:
# they reach programs as they were typed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory --no-builtin-rules

VARIABLES := RECIPE TASKS PROFILE LIMIT PROMPT FORCE FINLORA_DATA GPU NPROC PRICE TASK MODEL METHOD JSON DATA CONFIG \
  FINLORA_BASE_URL ADAPTER PORT MAX_MODEL_LEN ON_ERROR NAMESPACE PUBLIC REVISION DRY_RUN \
  BASE PRECISION PROMPT_FORMAT GRADIENT_CHECKPOINTING BACKEND BASE_URL MODEL_NAME REPAIR RECIPES \
  TRACKER NNODES NODE_RANK RDZV RUN PYTHON TORCH WHEELHOUSE
# A shell may hold a MODEL or a FORCE of somebody else: a variable counts where it stands on make's
# command line. Only these count from the environment, too (docs/networks.md):
FROM_ENVIRONMENT := FINLORA_DATA FINLORA_BASE_URL WHEELHOUSE
counts = $(findstring command line,$(origin $(1)))$(filter $(1),$(FROM_ENVIRONMENT))
$(foreach v,$(VARIABLES),$(eval override $(v) := $(if $(call counts,$(v)),$$(value $(v)))))
export $(VARIABLES)

DEMO := smollm2-135m/sentiment_r4
PY := .venv/bin/python
READY := .venv/.ready
# Runs on any Python 3 and finds the best one for .venv itself; PYTHON= names another.
SETUP := $$(command -v python3 || command -v "$$PYTHON" || echo python3) -m tools.setup \
  --python "$$PYTHON" --torch "$$TORCH" --wheelhouse "$$WHEELHOUSE"

.PHONY: help setup wheelhouse lock demo fetch data audit model train smoke profile status sweep reproduce parity eval report chat merge serve push pull adapters recipes show plan new import render test test-all check clean

help: ## List the jobs
	@printf 'Jobs (make JOB RECIPE=… TASKS=… …):\n'
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

demo: $(READY) ## Everything once: convert, train a QLoRA adapter of SmolLM2-135M, score it, show the table
	@$(PY) -m tools.convert sentiment
	@$(PY) -m tools.train $(DEMO)
	@$(PY) -m evals.run $(DEMO) --tasks fpb

setup: ## Make .venv (does nothing where it is up to date): [PYTHON=python3.12] [TORCH=cpu|cuda] [WHEELHOUSE=dir]
	@$(SETUP)

# Every other job needs the environment, and looks at file times only, to start at once.
$(READY): requirements.txt $(wildcard requirements/*.txt) $(PY)
	@$(SETUP)

$(PY):
	@$(SETUP)

wheelhouse: $(READY) ## Every package as a file, for a machine without a package index: [WHEELHOUSE=dir] [TORCH=cpu|cuda]
	@$(PY) -m tools.setup --make-wheelhouse "$${WHEELHOUSE:-wheelhouse}" --torch "$$TORCH"

fetch: $(READY) ## Download and verify FinLoRA's files to data/raw/: TASKS=sentiment,ner [FINLORA_BASE_URL=…]
	@$(PY) -m tools.fetch "$$TASKS"

data: $(READY) ## FinLoRA rows to chat rows: [TASKS=sentiment,ner] [RECIPE=… counts tokens] [ON_ERROR=quarantine] [REPAIR=0|1]
	@$(PY) -m tools.convert "$$TASKS" --recipe "$$RECIPE" --on-error "$$ON_ERROR" --repair "$$REPAIR"

audit: $(READY) ## What is wrong with the rows at hand: TASKS=sentiment,formula (all at hand without TASKS)
	@$(PY) -m tools.audit "$$TASKS"

model: $(READY) ## Write SmolLM2-135M-Instruct to models/ (train does it where it is needed)
	@$(PY) -m tools.export

train: $(READY) ## Train a recipe: RECIPE=… [PROFILE=cpu|gpu|multi_gpu,zero2] [NPROC=2] [TRACKER=tensorboard] [GRADIENT_CHECKPOINTING=1|0] [FORCE=1]
	@$(PY) -m tools.train "$$RECIPE" --profile "$$PROFILE" --force "$$FORCE" --nproc "$$NPROC" \
	  --tracker "$$TRACKER" --gradient-checkpointing "$$GRADIENT_CHECKPOINTING" --nnodes "$$NNODES" --node-rank "$$NODE_RANK" --rendezvous "$$RDZV"

smoke: $(READY) ## Try a recipe for two minutes before hours are spent: RECIPE=… [PROFILE=…]
	@$(PY) -m tools.smoke "$$RECIPE" --profile "$$PROFILE"

profile: $(READY) ## What was found here, what will be used, and why: [RECIPE=…] [PROFILE=…] [NPROC=2] [GRADIENT_CHECKPOINTING=1|0]
	@$(PY) -m tools.profiles "$$RECIPE" --profile "$$PROFILE" --nproc "$$NPROC" \
	  --gradient-checkpointing "$$GRADIENT_CHECKPOINTING"

status: $(READY) ## What trains, what is done, what was interrupted
	@$(PY) -m tools.status

sweep: $(READY) ## Train several recipes and end with one table: RECIPES="sentiment_r4 headline_*" [PROFILE=…]
	@$(PY) -m tools.sweep "$$RECIPES" --profile "$$PROFILE" --nproc "$$NPROC" \
	  --tracker "$$TRACKER" --force "$$FORCE"

reproduce: $(READY) ## Train a finished run again and compare the adapters: RUN=runs/smollm2-135m/sentiment_r4
	@$(PY) -m tools.reproduce "$$RUN"

parity: $(READY) ## QLoRA against LoRA at 8 bits and full precision, ranks, alpha, targets: hours; goes on where it stopped
	@$(PY) -m bench.parity

eval: $(READY) ## Score base and adapter: [RECIPE=…] [TASKS=fpb,fiqa] [LIMIT=200] [BASE=1] [PRECISION=nf4] [ADAPTER=…] [BACKEND=vllm|openai] [FORCE=1]
	@$(PY) -m evals.run "$$RECIPE" --tasks "$$TASKS" --limit "$$LIMIT" --force "$$FORCE" \
	  --base "$$BASE" --precision "$$PRECISION" --adapter "$$ADAPTER" --prompt-format "$$PROMPT_FORMAT" \
	  --backend "$$BACKEND" --base-url "$$BASE_URL" --model-name "$$MODEL_NAME"

report: $(READY) ## A page of all scores, runs/report/index.html, and its figures as PNGs: [PRICE=0.26] [GPU="A5000 24GB"]
	@$(PY) -m evals.html --gpu "$$GPU" --price "$$PRICE"

chat: $(READY) ## Base and adapter answer PROMPT="…"; a conversation without it: RECIPE=… or ADAPTER=… [PRECISION=nf4] [PROMPT_FORMAT=finlora]
	@$(PY) -m tools.chat "$$RECIPE" "$$PROMPT" --adapter "$$ADAPTER" --precision "$$PRECISION" \
	  --prompt-format "$$PROMPT_FORMAT"

merge: $(READY) ## Merge an adapter into its base, and compare the two: RECIPE=… or ADAPTER=… [PRECISION=nf4] [PROMPT_FORMAT=finlora]
	@$(PY) -m tools.merge "$$RECIPE" --adapter "$$ADAPTER" --precision "$$PRECISION" \
	  --prompt-format "$$PROMPT_FORMAT"

serve: $(READY) ## An OpenAI-compatible endpoint (vLLM where it is installed): RECIPE=… or ADAPTER=… [PORT=8000] [MAX_MODEL_LEN=4096] [PRECISION=nf4] [PROMPT_FORMAT=finlora]
	@$(PY) -m tools.serve "$$RECIPE" --adapter "$$ADAPTER" --port "$$PORT" \
	  --max-model-len "$$MAX_MODEL_LEN" --precision "$$PRECISION" --prompt-format "$$PROMPT_FORMAT"

push: $(READY) ## Publish a run on the Hub, privately: RECIPE=… NAMESPACE=me [PUBLIC=1] [DRY_RUN=1] [PRICE=0.26] [FORCE=1]
	@$(PY) -m tools.push "$$RECIPE" --namespace "$$NAMESPACE" --public "$$PUBLIC" \
	  --dry-run "$$DRY_RUN" --price "$$PRICE" --force "$$FORCE"

pull: $(READY) ## Bring a published adapter here: RECIPE=… [NAMESPACE=…] or ADAPTER=owner/name[/folder] [PRECISION=nf4] [REVISION=v1.1.0]
	@$(PY) -m tools.pull "$$RECIPE" --namespace "$$NAMESPACE" --adapter "$$ADAPTER" \
	  --revision "$$REVISION" --precision "$$PRECISION" --force "$$FORCE"

adapters: $(READY) ## List the runs here and, with NAMESPACE=me, those on the Hub
	@$(PY) -m tools.hub --namespace "$$NAMESPACE"

recipes: $(READY) ## List the catalogue: [TASK=sentiment] [MODEL=qwen3-8b] [METHOD=r4] [JSON=1]
	@$(PY) -m tools.catalogue list --task "$$TASK" --model "$$MODEL" --method "$$METHOD" --json "$$JSON"

show: $(READY) ## Print a recipe, its plan, and what its run took: RECIPE=sentiment_r4
	@$(PY) -m tools.catalogue show "$$RECIPE"

plan: $(READY) ## What a recipe takes before a GPU is rented: RECIPE=… [GPU="A5000 24GB"] [NPROC=4] [PRICE=0.26] [JSON=1]
	@$(PY) -m tools.plan "$$RECIPE" --gpu "$$GPU" --nproc "$$NPROC" --price "$$PRICE" --json "$$JSON"

new: $(READY) ## A task of your own, with recipes and an evaluation: TASK=my_task DATA=my.jsonl
	@$(PY) -m tools.local new "$$TASK" "$$DATA"

import: $(READY) ## Recipes from a FinLoRA config file: CONFIG=finetune_configs.json
	@$(PY) -m tools.local import "$$CONFIG"

render: $(READY) ## Write every recipe from recipes/matrix.yaml
	@$(PY) -m tools.catalogue render

# By files, since tests of one file share runs; those that train longest come first (conftest.py).
PARALLEL = -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(READY) ## Tests, without the long ones
	@$(PY) -m pytest $(PARALLEL) -m "not slow"

test-all: $(READY) ## All tests, with the real training of SmolLM2
	@$(PY) -m pytest $(PARALLEL)

check: $(READY) ## Lint, format, types, drift of rendered files, every recipe against Axolotl's schema
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@.venv/bin/hadolint docker/Dockerfile
	@$(PY) data/sample/make.py --check
	@$(PY) -m tools.datacard --check
	@$(PY) -m tools.scale --check
	@$(PY) -m bench.parity --check
	@$(PY) -m tools.catalogue check

lock: $(READY) ## Resolve requirements.txt anew for every supported Python: requirements/python-3.*.txt
	@$(PY) -m tools.setup --lock

clean: ## Remove .venv, SmolLM2, converted data and caches; trained runs stay
	rm -rf .venv models/smollm2-135m data/chat .pytest_cache .mypy_cache .ruff_cache
