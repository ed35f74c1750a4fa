"""The command line: every job of the project with its typed options.

    python -m tools --help
    python -m tools train sentiment_r4 --profile gpu

`make train RECIPE=sentiment_r4 PROFILE=gpu` is the same call: make passes each variable of its
command line as OPTION_<NAME>, which becomes the option of that name. Implementations are imported
where they are called, so that help and lists appear at once.
"""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from typer import Argument, Option

from tools.common import WrongInput, command, nearest

DATA, TRAIN, SCORE = "Data", "Train", "Score"
USE, SHARE, MAINTAIN = "Use", "Share", "Maintain"

app = typer.Typer(
    name="finlora",
    help="Axolotl recipes that fine-tune language models for finance, from data to the Hub.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def check_finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a number")
    return value


def check_positive(value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise typer.BadParameter(f"{value} is not a number above 0")
    return value


Recipe = Annotated[str | None, Argument(help="A recipe of the catalogue, or an Axolotl YAML file.")]
NeededRecipe = Annotated[str, Argument(help="A recipe of the catalogue, or an Axolotl YAML file.")]
Tasks = Annotated[str | None, Argument(help="Tasks, comma-separated; all if omitted.")]
Datasets = Annotated[str | None, Option(help="Datasets, comma-separated; all if omitted.")]
Adapter = Annotated[str | None, Option(help="A PEFT folder, or owner/name of a pulled adapter.")]
Precision = Annotated[
    Literal["nf4", "int8", "bf16", "fp16", "fp32"] | None,
    Option(help="Precision of the base; that of the training if omitted."),
]
PromptFormat = Annotated[
    Literal["chat", "finlora", "bare"] | None,
    Option(help="How prompts are written; as in training if omitted."),
]
Profile = Annotated[
    str | None,
    Option(help="Files of recipes/profiles/, comma-separated; chosen for the hardware if omitted."),
]
Nproc = Annotated[
    int | None, Option(min=1, help="Processes on this machine, one per GPU; chosen if omitted.")
]
Checkpointing = Annotated[
    bool | None,
    Option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Less memory for more time; chosen for the hardware if omitted.",
    ),
]
Tracker = Annotated[
    Literal["tensorboard", "trackio", "wandb"] | None, Option(help="Also log losses there.")
]
Force = Annotated[
    bool, Option("--force", help="Repeat a finished job, or skip a check that stopped it.")
]
Gpu = Annotated[
    str | None,
    Option(
        help='A GPU such as "A5000 24GB", or its memory, such as "24GB"; A5000 24GB if omitted.'
    ),
]
Price = Annotated[float | None, Option(min=0, callback=check_finite, help="USD for one GPU-hour.")]
CountingRecipe = Annotated[
    str | None,
    Option(help="Count tokens as the training of this recipe does."),
]
OnError = Annotated[
    Literal["stop", "quarantine"], Option(help="What to do at a row that breaks a rule.")
]
Repair = Annotated[
    bool | None,
    Option(
        "--repair/--no-repair",
        help="Repair swapped labels or not; decided from the rows if omitted.",
    ),
]
Json = Annotated[bool, Option("--json", help="Print JSON.")]
Map = Annotated[
    str | None,
    Option(help='Columns by hand, such as "prompt=question,context=passage,answer=gold".'),
]
Template = Annotated[
    str | None, Option(help='The wording of a prompt, such as "{passage}\\n\\n{question}".')
]
Labels = Annotated[
    str | None, Option(help="Names of integer labels in their order, comma-separated.")
]
Backend = Annotated[
    Literal["transformers", "vllm", "openai"], Option(help="What answers the prompts.")
]
BaseUrl = Annotated[str | None, Option(help="Address of an OpenAI-compatible endpoint.")]
ModelName = Annotated[
    str | None, Option(help="Model of the endpoint; can be omitted if it serves only one.")
]
ReasoningTokens = Annotated[
    int | None,
    Option(min=1, help="Tokens that a reasoning model may spend before the answer."),
]
Concurrency = Annotated[
    int | None, Option(min=1, help="Requests to the endpoint at a time; 8 if omitted.")
]
PriceIn = Annotated[
    float | None,
    Option(min=0, callback=check_finite, help="USD for a million tokens of prompts."),
]
PriceOut = Annotated[
    float | None,
    Option(min=0, callback=check_finite, help="USD for a million tokens of answers."),
]
MaxCost = Annotated[
    float | None,
    Option(min=0, callback=check_finite, help="USD after which no more requests are sent."),
]
MaxTotalTokens = Annotated[
    int | None,
    Option(min=1, help="Tokens, in and out, after which no more requests are sent."),
]
Constrain = Annotated[
    bool, Option("--constrain", help="An answer can only be a label of the task.")
]
ENDPOINT = ("base_url", "model_name", "reasoning_tokens")
LIMITS = ("concurrency", "price_in", "price_out", "max_cost", "max_total_tokens")
Namespace = Annotated[str | None, Option(help="A user or organisation on the Hub.")]


# ---- Data


@app.command(rich_help_panel=DATA)
def fetch(tasks: Tasks = None) -> None:
    """Download and verify FinLoRA's files to data/raw/.

    Example: python -m tools fetch sentiment,ner
    """
    from tools.data import fetch

    fetch.fetch_tasks(split(tasks))


@app.command(rich_help_panel=DATA)
def data(
    tasks: Tasks = None,
    recipe: CountingRecipe = None,
    on_error: OnError = "stop",
    repair: Repair = None,
) -> None:
    """Turn FinLoRA's rows into chat rows in data/chat/.

    Example: python -m tools data sentiment --on-error quarantine
    """
    from tools.data import convert

    convert.convert_tasks(split(tasks), recipe, on_error == "quarantine", repair)


@app.command(rich_help_panel=DATA)
def convert(
    dataset: Annotated[str, Argument(help="A dataset of data/sources.yaml, whose rules apply.")],
    source: Annotated[Path, Argument(help="A file of rows in FinLoRA's format.")],
    target: Annotated[Path, Argument(help="The file to write chat rows to.")],
    on_error: OnError = "stop",
    repair: Repair = None,
    recipe: CountingRecipe = None,
    tokenizer: Annotated[
        str | None, Option(help="Count tokens with the tokenizer in this folder.")
    ] = None,
    sequence_len: Annotated[
        int | None, Option(min=1, help="Tokens of the longest row that is accepted.")
    ] = None,
) -> None:
    """Convert one file by the rules of one dataset.

    Example: python -m tools convert fpb my.jsonl chat.jsonl
    """
    from tools.data import convert

    lengths, _ = convert.load_lengths(recipe, tokenizer, sequence_len)
    options = convert.Options(on_error == "quarantine", lengths, repair=repair)
    convert.convert_file(dataset, source, target, options)


@app.command(rich_help_panel=DATA)
def audit(tasks: Tasks = None, json: Json = False) -> None:
    """Find duplicates, leaks, swapped labels and wrong answer keys.

    Example: python -m tools audit sentiment,formula
    """
    from tools.data import audit

    audit.run(split(tasks), json)


@app.command(rich_help_panel=DATA)
def new(
    task: Annotated[str, Argument(help="A name of letters, digits and underscores.")],
    data: Annotated[
        str, Argument(help="Your rows: CSV, JSON, JSONL, parquet and more, or hf:owner/name.")
    ],
    test: Annotated[
        str | None, Option(help="A file of test rows; drawn from the rows if omitted.")
    ] = None,
    map: Map = None,
    template: Template = None,
    labels: Labels = None,
    group: Annotated[
        str | None, Option(help="Rows with the same value in this column stay on one side.")
    ] = None,
    time: Annotated[
        str | None, Option(help="The column with a date: the newest rows test.")
    ] = None,
    loss: Annotated[
        Literal["all", "last"], Option(help="Train on all answers of a row, or on the last one.")
    ] = "all",
    cut: Annotated[
        bool, Option("--cut", help="Take the middle out of prompts that are too long.")
    ] = False,
    early_stopping: Annotated[
        Literal["loss", "metric"] | None,
        Option(help="Stop where validation loss, or the metric, gets no better; keep the best."),
    ] = None,
    on_error: OnError = "stop",
    repair: Repair = None,
) -> None:
    """Make a task of your own rows: a split, recipes and an evaluation.

    Example: python -m tools new my_task my.csv --map "prompt=question,answer=gold"
    """
    from tools import custom

    choices = custom.Choices(
        test=test,
        mapping=map,
        template=template,
        labels=labels,
        group=group,
        time=time,
        quarantine=on_error == "quarantine",
        cut=cut,
        last_only=loss == "last",
        early_stopping=early_stopping,
        repair=repair,
    )
    custom.create_task(task, data, choices)


@app.command(rich_help_panel=DATA)
def look(
    task: Annotated[str, Argument(help="A task whose rows were converted.")],
    n: Annotated[int, Option(min=1, help="How many rows.")] = 3,
    recipe: Annotated[
        str | None,
        Option(help="Render as this recipe does; a base at hand if omitted."),
    ] = None,
    split: Annotated[
        Literal["train", "val", "test"], Option(help="Training, validation or test rows.")
    ] = "train",
) -> None:
    """Show rows as text, as rendered for a base, and as tokens with the trained ones marked.

    Example: python -m tools look sentiment --n 5
    """
    from tools.data import look

    look.show_rows(task, n, recipe, split)


# ---- Train


@app.command(rich_help_panel=TRAIN)
def recipes(
    task: Annotated[str | None, Option(help="Only this task.")] = None,
    model: Annotated[str | None, Option(help="Only this model.")] = None,
    method: Annotated[str | None, Option(help="Only this method.")] = None,
    json: Json = False,
) -> None:
    """List the catalogue with planned GPU memory.

    Without a method, the recipes that have a file; with one, all of its recipes.

    Example: python -m tools recipes --task sentiment --method r8_dora
    """
    from tools import catalogue

    catalogue.list_recipes(task, model, method, json)


@app.command(rich_help_panel=TRAIN)
def show(recipe: NeededRecipe) -> None:
    """Print a recipe, its plan, and what its run took.

    Example: python -m tools show sentiment_r4
    """
    from tools import catalogue

    catalogue.show(recipe)


@app.command(rich_help_panel=TRAIN)
def plan(
    recipe: NeededRecipe,
    gpu: Gpu = None,
    nproc: Annotated[int, Option(min=1, help="Number of GPUs.")] = 1,
    price: Price = None,
    rows: Annotated[
        int | None, Option(min=1, help="Training rows; counted in the file if omitted.")
    ] = None,
    tokens_per_row: Annotated[
        int | None, Option(min=1, help="Mean tokens of a row; counted or estimated if omitted.")
    ] = None,
    json: Json = False,
) -> None:
    """Compute memory, hours and cost of a recipe before a GPU is rented.

    Example: python -m tools plan sentiment_r4 --gpu "A5000 24GB" --price 0.26
    """
    from tools.train import plan, plan_table

    hardware = plan.Hardware(gpu or plan.DEFAULT_GPU, nproc, price)
    plan_table.print_plan(recipe, hardware, rows, tokens_per_row, json)


@app.command(rich_help_panel=TRAIN)
def smoke(recipe: NeededRecipe, profile: Profile = None) -> None:
    """Try a recipe for two minutes before hours are spent.

    Example: python -m tools smoke sentiment_r4
    """
    from tools.train import smoke

    smoke.run(recipe, profile)


@app.command(rich_help_panel=TRAIN)
def profile(
    recipe: Recipe = None,
    profile: Profile = None,
    nproc: Nproc = None,
    gradient_checkpointing: Checkpointing = None,
) -> None:
    """Show the hardware that was detected, the settings chosen for it, and why.

    Example: python -m tools profile sentiment_r4 --profile multi_gpu,zero2
    """
    from tools.train import profiles

    profiles.explain(recipe, profiles.Choice(profile, nproc, gradient_checkpointing))


@app.command(rich_help_panel=TRAIN)
def train(
    recipe: NeededRecipe,
    profile: Profile = None,
    nproc: Nproc = None,
    force: Force = False,
    tracker: Tracker = None,
    gradient_checkpointing: Checkpointing = None,
    nnodes: Annotated[int, Option(min=1, help="Number of machines.")] = 1,
    node_rank: Annotated[int, Option(min=0, help="The number of this machine, from 0.")] = 0,
    rdzv: Annotated[
        str | None, Option(help="host:port of machine 0, where all machines meet.")
    ] = None,
) -> None:
    """Train a recipe with Axolotl; an interrupted run resumes.

    Example: python -m tools train smollm2-135m/sentiment_r4
    """
    from tools import recipes
    from tools.train import launch, machines, profiles

    choice = profiles.Choice(profile, nproc, gradient_checkpointing, tracker)
    cluster = machines.Machines(nnodes=nnodes, rank=node_rank, rdzv=rdzv)
    launch.train(recipes.find(recipe), choice, cluster, force)


@app.command(rich_help_panel=TRAIN)
def status() -> None:
    """List what is training, finished or interrupted.

    Example: python -m tools status
    """
    from tools.train import status

    status.print_all()


@app.command(rich_help_panel=TRAIN)
def sweep(
    recipes: Annotated[
        str, Argument(help='Recipe names and patterns, such as "sentiment_r4 ner_*".')
    ],
    profile: Profile = None,
    nproc: Nproc = None,
    tracker: Tracker = None,
    force: Force = False,
) -> None:
    """Train several recipes and end with one table.

    Example: python -m tools sweep "sentiment_r4 headline_*"
    """
    from tools.train import profiles, sweep

    sweep.run(recipes, profiles.Choice(profile, nproc, None, tracker), force)


@app.command(rich_help_panel=TRAIN)
def tune(
    recipe: NeededRecipe,
    minutes: Annotated[
        float | None,
        Option(callback=check_positive, help="How long to search; 60 without TRIALS."),
    ] = None,
    trials: Annotated[
        int | None, Option(min=2, help="How many candidates to try, the recipe included.")
    ] = None,
    equal: Annotated[
        Literal["time", "steps"],
        Option(help="Candidates cost what the recipe costs, in this."),
    ] = "time",
    judge: Annotated[
        Literal["loss", "metric"],
        Option(help="Judge by the validation loss, or by the task's metric on validation rows."),
    ] = "loss",
    space: Annotated[Path | None, Option(help="What to try; recipes/tune.yaml if omitted.")] = None,
    profile: Profile = None,
    apply: Annotated[
        bool, Option("--apply", help="Write the winner as a recipe of your own.")
    ] = False,
) -> None:
    """Search for a recipe that learns more at the same cost, judged by validation rows alone.

    Example: python -m tools tune smollm2-135m/sentiment_r4 --trials 20
    """
    from tools import custom
    from tools.train import search, tune

    minutes = minutes if minutes or trials else 60.0
    request = search.SearchRequest(minutes, trials, equal, judge, space, profile)
    result, report = tune.tune(recipe, request)
    if apply:
        custom.write_tuned(result, report["changes"], report["next_version"])


@app.command(rich_help_panel=TRAIN)
def reproduce(run: Annotated[Path, Argument(help="The folder of a finished run.")]) -> None:
    """Train a finished run again and compare the adapters.

    Example: python -m tools reproduce runs/smollm2-135m/sentiment_r4
    """
    from tools.train import reproduce

    reproduce.reproduce(run)


@app.command(rich_help_panel=TRAIN)
def verify(
    recipe: NeededRecipe,
    seeds: Annotated[int, Option(min=1, help="Trainings, each with another seed.")] = 3,
    shots: Annotated[
        int | None,
        Option(
            min=0,
            help="Also score the base with so many worked examples in each prompt; if omitted, as "
            "many as the existing result has, else 3.",
        ),
    ] = None,
    tasks: Datasets = None,
    profile: Profile = None,
    nproc: Nproc = None,
    examples: Annotated[
        bool, Option("--examples", help="Measure data/sample, which no page shows.")
    ] = False,
    force: Force = False,
) -> None:
    """Measure a recipe: train it with several seeds, score it and its base, write the result.

    The result is a file of results/; the pages that show it are written, too. An interrupted job
    resumes, and a finished one is left alone.

    Example: python -m tools verify smollm2-135m/sentiment_r4
    """
    from tools.train import verify
    from tools.train.profiles import Choice

    choice, datasets = Choice(profile, nproc), tuple(split(tasks))
    request = verify.Verification(seeds, shots, choice, force, examples, datasets)
    verify.verify(recipe, request)
    write_result_pages()


# ---- Score


@app.command("eval", rich_help_panel=SCORE)
def evaluate(
    context: typer.Context,
    recipe: Annotated[str | None, Argument(help="A recipe; every finished run if omitted.")] = None,
    tasks: Datasets = None,
    limit: Annotated[
        int | None, Option(min=1, help="Rows of each dataset to score; all if omitted.")
    ] = None,
    base: Annotated[bool, Option("--base", help="Score only the base.")] = False,
    shots: Annotated[
        int | None,
        Option(min=1, help="Score only the base, with so many worked examples in each prompt."),
    ] = None,
    adapter: Adapter = None,
    precision: Precision = None,
    prompt_format: PromptFormat = None,
    backend: Backend = "transformers",
    base_url: BaseUrl = None,
    model_name: ModelName = None,
    reasoning_tokens: ReasoningTokens = None,
    concurrency: Concurrency = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    max_cost: MaxCost = None,
    max_total_tokens: MaxTotalTokens = None,
    constrain: Constrain = False,
    force: Force = False,
) -> None:
    """Score base and adapter with 95 % intervals and paired tests.

    Example: python -m tools eval smollm2-135m/sentiment_r4 --tasks fpb,fiqa --limit 200
    """
    from evals import run
    from tools import subjects

    request = run.Request(split(tasks), limit, force, backend)
    if endpoint := find_endpoint(context.params):
        run.score_all(request, [replace(endpoint, shots=shots or 0, constrained=constrain)])
        return
    if base and (adapter or not recipe):
        raise WrongInput("BASE=1 scores a base alone: name its RECIPE=, no ADAPTER=")
    if shots and (adapter or not recipe):
        raise WrongInput("SHOTS= scores a base with worked examples: name its RECIPE=, no ADAPTER=")
    if recipe or adapter:
        alone = base or bool(shots)
        subject = subjects.find(recipe, adapter, precision, prompt_format, base_only=alone)
        if shots:
            print(f"eval       the base alone is scored with {shots} worked examples a prompt")
            subject = subject.with_examples(shots)
        scored = [subject]
    else:
        scored = subjects.all_finished(precision, prompt_format)
    run.score_all(request, [replace(subject, constrained=constrain) for subject in scored])


@app.command(rich_help_panel=SCORE)
def report(gpu: Gpu = None, price: Price = None) -> None:
    """Write a page of all scores, runs/report/index.html, and its figures.

    Example: python -m tools report --price 0.26
    """
    from evals import page
    from tools.train import plan

    hardware = plan.Hardware(gpu or plan.DEFAULT_GPU, 1, price)
    plan.find_gpu(hardware.gpu)
    page.write(lambda config, rows, data: plan.plan(config, hardware, rows=rows, data=data))


# ---- Use


@app.command(rich_help_panel=USE)
def chat(
    recipe: Recipe = None,
    prompt: Annotated[str | None, Argument(help="Starts a conversation if omitted.")] = None,
    adapter: Adapter = None,
    precision: Precision = None,
    prompt_format: PromptFormat = None,
    system: Annotated[str | None, Option(help="The system turn that training began with.")] = None,
    constrain: Constrain = False,
) -> None:
    """Let base and adapter answer a prompt side by side.

    Example: python -m tools chat smollm2-135m/sentiment_r4 "Profits rose by a third."
    """
    from evals import run
    from tools import subjects
    from tools.use import chat

    subject = subjects.find(recipe, adapter, precision, prompt_format)
    labels = run.find_task_labels(subject.task) if constrain else []
    chat.chat(subject, prompt, system, labels)


@app.command(rich_help_panel=USE)
def predict(
    context: typer.Context,
    recipe: Recipe = None,
    data: Annotated[
        str | None, Option(help="Rows to answer: CSV, JSON, JSONL, parquet, hf:owner/name.")
    ] = None,
    out: Annotated[
        Path | None, Option(help="The file to write, in the format of the rows.")
    ] = None,
    task: Annotated[
        str | None, Option(help="Whose prompts and labels count; the adapter's if omitted.")
    ] = None,
    map: Map = None,
    template: Template = None,
    adapter: Adapter = None,
    precision: Precision = None,
    prompt_format: PromptFormat = None,
    backend: Backend = "transformers",
    base_url: BaseUrl = None,
    model_name: ModelName = None,
    reasoning_tokens: ReasoningTokens = None,
    concurrency: Concurrency = None,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    max_cost: MaxCost = None,
    max_total_tokens: MaxTotalTokens = None,
    constrain: Constrain = False,
    force: Force = False,
) -> None:
    """Answer the rows of a file; an interrupted job resumes.

    Example: python -m tools predict sentiment_r4 --data headlines.csv --out labelled.csv
    """
    from tools import subjects
    from tools.use import predict

    if not data or not out:
        raise WrongInput("DATA=headlines.csv and OUT=labelled.csv are needed")
    request = predict.Request(
        data,
        out.expanduser(),
        task,
        map,
        template,
        backend=backend,
        force=force,
        constrain=constrain,
    )
    endpoint = find_endpoint(context.params)
    predict.predict(endpoint or subjects.find(recipe, adapter, precision, prompt_format), request)


@app.command(rich_help_panel=USE)
def merge(
    recipe: Recipe = None,
    adapter: Adapter = None,
    precision: Precision = None,
    prompt_format: PromptFormat = None,
    bits: Annotated[
        Literal["4", "16"] | None,
        Option(
            help="Bits of a weight: 4 (NF4) or 16 (bfloat16); this machine's precision if omitted."
        ),
    ] = None,
    format: Annotated[
        Literal["safetensors", "gguf"], Option(help="Format of the file; gguf has 16 bits.")
    ] = "safetensors",
) -> None:
    """Merge an adapter into its base and compare the two.

    Example: python -m tools merge smollm2-135m/sentiment_r4 --bits 16
    """
    from tools.use import merge

    if format == "gguf" and bits == "4":
        raise WrongInput("FORMAT=gguf writes 16 bits; llama.cpp's own llama-quantize writes fewer")
    subject = merge.find_subject(recipe, adapter, precision, prompt_format)
    merge.merge_and_report(subject, int(bits) if bits else None, format == "gguf")


@app.command(rich_help_panel=USE)
def serve(
    recipe: Recipe = None,
    recipes: Annotated[str | None, Option(help="Several recipes to serve on one base.")] = None,
    adapter: Adapter = None,
    host: Annotated[str, Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    engine: Annotated[
        Literal["vllm", "transformers"] | None,
        Option(help="What serves; vLLM where it is installed, if omitted."),
    ] = None,
    precision: Precision = None,
    prompt_format: PromptFormat = None,
    max_model_len: Annotated[int | None, Option(min=1, help="Longest context, in tokens.")] = None,
    gpu_memory: Annotated[
        float | None,
        Option(min=0.01, max=1, help="Share of a GPU's memory that vLLM takes; 0.9 if omitted."),
    ] = None,
    vllm_args: Annotated[
        str | None, Option(help='More vLLM options, such as "--max-num-seqs 8".')
    ] = None,
    constrain: Annotated[
        bool, Option("--constrain", help="Print a request that limits the answer to labels (vLLM).")
    ] = False,
) -> None:
    """Serve adapters and their base as an OpenAI-compatible endpoint.

    The variable VLLM_API_KEY has the key that clients must send, if any.

    Example: python -m tools serve smollm2-135m/sentiment_r4 --port 8000
    """
    from evals import run
    from tools import subjects
    from tools.use import serve

    arguments = serve.parse_arguments(vllm_args or "")
    service = serve.Service(host, port, engine, max_model_len, gpu_memory, arguments)
    chosen = serve.find_subjects(recipes, precision, prompt_format) if recipes else []
    if recipe or adapter or not recipes:
        chosen.append(subjects.find(recipe, adapter, precision, prompt_format))
    labels = run.find_task_labels(chosen[0].task) if constrain else []
    serve.serve(chosen, service, labels)


# ---- Share


@app.command(rich_help_panel=SHARE)
def push(
    recipe: NeededRecipe,
    namespace: Namespace = None,
    public: Annotated[bool, Option("--public", help="Visible to everyone.")] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Show files and card; send nothing.")
    ] = False,
    price: Price = None,
    force: Force = False,
) -> None:
    """Publish a finished run on the Hub, privately unless told otherwise.

    Example: python -m tools push smollm2-135m/sentiment_r4 --namespace me --dry-run
    """
    from tools.hub import push

    push.push_run(recipe, namespace, push.Options(public, dry_run, force, price))


@app.command(rich_help_panel=SHARE)
def pull(
    recipe: Recipe = None,
    namespace: Namespace = None,
    adapter: Annotated[
        str | None, Option(help="owner/name, or owner/name/folder, on the Hub.")
    ] = None,
    revision: Annotated[str | None, Option(help="A tag, branch or commit.")] = None,
    precision: Precision = None,
    force: Force = False,
) -> None:
    """Bring a published adapter here, checked before it is loaded.

    Example: python -m tools pull sentiment_r8
    """
    from tools.hub import pull

    source = pull.find_source(recipe, namespace, adapter, revision, precision)
    pull.pull_adapter(source, force)


@app.command(rich_help_panel=SHARE)
def adapters(namespace: Namespace = None) -> None:
    """List the runs here and, with a namespace, those on the Hub.

    Example: python -m tools adapters --namespace me
    """
    from tools.hub import listing

    listing.show_adapters(namespace)


# ---- Maintain


@app.command("add-model", rich_help_panel=MAINTAIN)
def add_model(
    hub: Annotated[str, Argument(help="The base's name on the Hub, such as Qwen/Qwen3-1.7B.")],
    folder: Annotated[
        Path | None, Option(help="Its config.json and tokenizer; from the Hub if omitted.")
    ] = None,
    model: Annotated[
        str | None, Option(help="Its name in the catalogue; from the Hub's if omitted.")
    ] = None,
    methods: Annotated[
        str | None, Option(help="Methods to try, comma-separated; r4,qlora_all if omitted.")
    ] = None,
) -> None:
    """Add a base to the catalogue and check it, or check one that is in it again.

    Example: python -m tools add-model Qwen/Qwen3-1.7B
    """
    from tools.base import add

    add.add_model(hub, folder and folder.expanduser().resolve(), model, methods)


@app.command("import", rich_help_panel=MAINTAIN)
def import_config(config: Annotated[Path, Argument(help="A FinLoRA config file.")]) -> None:
    """Make recipes from a FinLoRA config file.

    Example: python -m tools import finetune_configs.json
    """
    from tools import importer

    importer.import_runs(config.expanduser())


@app.command(rich_help_panel=MAINTAIN)
def render(recipe: Recipe = None) -> None:
    """Write the recipes and their pages from recipes/matrix.yaml; with a name, print that recipe.

    Example: python -m tools render qwen3-8b/ner_r8_dora > my.yaml
    """
    from tools import catalogue, reference
    from tools.train import scale

    catalogue.render(recipe)
    if not recipe:
        scale.write()
        reference.write(build_commands())


@app.command(rich_help_panel=MAINTAIN)
def results() -> None:
    """Write docs/results.md, its figure, the README's table and the recipes' pages from results/.

    Example: python -m tools results
    """
    write_result_pages()


@app.command(rich_help_panel=MAINTAIN)
def model() -> None:
    """Write SmolLM2-135M-Instruct to models/; training does it where it is needed.

    Example: python -m tools model
    """
    from tools import smollm2

    smollm2.ensure(str(smollm2.FOLDER))


@app.command(rich_help_panel=MAINTAIN)
def check() -> None:
    """Compare every generated file with its source, and every recipe with Axolotl's schema.

    Example: python -m tools check
    """
    from evals import results_page
    from tools import catalogue, reference
    from tools.data import card
    from tools.train import scale

    reference.write(build_commands(), check=True)
    results_page.write(check=True)
    card.write(check=True)
    scale.write(check=True)
    catalogue.check()


def write_result_pages() -> None:
    """Writes every page that shows results: recipes and their pages tell of them, too."""
    from evals import results_page
    from tools import catalogue

    results_page.write()
    catalogue.render()


def build_commands() -> Any:
    """The verbs as a Click group.

    Click 8.5 clears the help of Typer's arguments, so it is restored from the annotations.
    """
    group: Any = typer.main.get_command(app)
    for verb in group.commands.values():
        annotations = get_type_hints(verb.callback, include_extras=True)
        for parameter in verb.params:
            if parameter.param_type_name == "argument":
                parameter.help = annotations[parameter.name].__metadata__[0].help
    return group


def find_endpoint(options: dict[str, Any]) -> Any:
    """The endpoint of BACKEND=openai; None for a backend that runs a model here.

    `options` are all options of a verb, by name. Raises WrongInput for options that do not go with
    the backend.
    """
    if options["backend"] != "openai":
        names = [name.upper() for name in (*ENDPOINT, *LIMITS) if options[name] is not None]
        if names:
            raise WrongInput(f"options such as {names[0]} go with BACKEND=openai")
        return None
    if options["recipe"] or options["adapter"] or options["precision"]:
        raise WrongInput("RECIPE, ADAPTER and PRECISION do not go with BACKEND=openai")
    from evals import endpoint

    limits = endpoint.Limits(**{name: options[name] for name in LIMITS})
    url, model = options["base_url"] or "", options["model_name"] or ""
    form, reasoning_tokens = options["prompt_format"] or "chat", options["reasoning_tokens"]
    subject = endpoint.Endpoint(url, model, form, reasoning_tokens=reasoning_tokens, limits=limits)
    return endpoint.check_endpoint(subject)


def split(names: str | None) -> list[str]:
    """The names of a list that is separated by commas or spaces."""
    return (names or "").replace(",", " ").split()


def read_make_variables() -> dict[str, str]:
    """{option: value} of make's command line, taken out of the environment of this process.

    Notes those that none of make's goals takes. Raises WrongInput for a name that is near to an
    option's and is none.
    """
    values = {
        name.removeprefix("OPTION_").lower(): os.environ.pop(name)
        for name in sorted(os.environ)
        if name.startswith("OPTION_")
    }
    options = {
        name: {parameter.name for parameter in verb.params}
        for name, verb in build_commands().commands.items()
    }
    goals = os.environ.pop("MAKE_GOALS", "").split()
    known = set[str]().union(*options.values())
    taken = set[str]().union(*(options.get(goal, known) for goal in goals or [""]))
    for name in values.keys() - known:
        if nearest(name.upper(), [option.upper() for option in known], cutoff=0.8):
            hint = nearest(name.upper(), [option.upper() for option in taken], cutoff=0.8)
            raise WrongInput(f"make has no variable {name.upper()}{hint}")
    # Each goal is a process of its own: the first one tells. What some print is data for a file.
    tells, file = sys.argv[1:2] == goals[:1], sys.stdout
    if sys.argv[1:2] in (["recipes"], ["render"]):
        file = sys.stderr
    for name in sorted(values.keys() & known - taken) if tells else ():
        if values[name]:
            verbs = ", ".join(verb for verb in options if name in options[verb])
            text = f"make {' '.join(goals)} takes no {name.upper()}, so it has no effect here"
            print(f"note       {text} (it is for {verbs})", file=file)
    return {name: value for name, value in values.items() if value}


def describe_missing(name: str) -> str:
    """What to do where an argument is missing."""
    examples = {
        "recipe": "RECIPE=… is needed; `make recipes` lists what there is",
        "recipes": 'RECIPES="…" is needed: names, or patterns such as "sentiment_*"',
        "task": "TASK=my_task and DATA=my.jsonl are needed",
        "data": "TASK=my_task and DATA=my.jsonl are needed",
        "config": "CONFIG=finetune_configs.json is needed",
        "run": "RUN=… is needed, such as RUN=runs/smollm2-135m/sentiment_r4",
    }
    return examples.get(name, f"{name.upper()}=… is needed")


def describe_wrong(error: Any) -> str:
    """What is wrong with the value of an option, and which values there are."""
    name = str(error.param.name if error.param else "option").upper()
    kind = getattr(error.param, "type", None)
    if kind is None or getattr(kind, "min", None) is None:
        return f"{name}: {error.message.rstrip('.')}"
    number = "whole number" if "integer" in kind.name else "number"
    bounds = f"of at least {kind.min}" if kind.max is None else f"from {kind.min} to {kind.max}"
    return f"{name} must be a {number} {bounds}"


@command
def main() -> None:
    import click

    variables = read_make_variables()
    commands = build_commands()
    defaults = {verb: variables for verb in commands.commands}
    try:
        status = commands(prog_name="python -m tools", standalone_mode=False, default_map=defaults)
    except click.exceptions.MissingParameter as error:
        raise WrongInput(describe_missing(str(error.param.name if error.param else ""))) from None
    except click.exceptions.BadParameter as error:
        raise WrongInput(describe_wrong(error)) from None
    except click.exceptions.UsageError as error:
        raise WrongInput(error.format_message()) from None
    except click.exceptions.Abort:
        status = 130
    if status == 130:  # how Typer hands Ctrl-C on
        raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
