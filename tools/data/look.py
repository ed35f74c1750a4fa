"""Shows what a model really sees of a task's rows: the texts, the template's text, and the tokens.

    python -m tools look sentiment --n 5

Tokens and labels are those of Axolotl's own chat_template strategy, with the recipe's settings. The
trained tokens are coloured in a terminal, and stand in brackets elsewhere.
"""

import sys
from itertools import islice
from typing import Any

import orjson

from tools import architectures, prompts, recipes, smollm2, sources
from tools.common import JobFailed, WrongInput, check_name, quiet, shown, spell_out
from tools.models import load_tokenizer

MOST_CHARACTERS = 1500  # of a row, in each of its forms


def show_rows(task: str, count: int, recipe_name: str | None = None, split: str = "train") -> None:
    """Prints the first rows of a task; raises WrongInput where they or a tokenizer are missing."""
    table = sources.tables()
    check_name("task", task, {**table["tasks"], **table["datasets"]})
    if task in table["tasks"]:
        dataset = next(iter(table["tasks"][task]["eval"]), task)
    else:
        dataset, split = task, "test"
    path = {"train": sources.train_path(task), "val": sources.val_path(task)}.get(split)
    path = path or sources.test_path(dataset)
    if not path.is_file():
        raise WrongInput(f"{shown(path)} is not there; `make data TASKS={task}` makes it")
    recipe = recipes.find(recipe_name or find_recipe(task))
    quiet()
    try:
        smollm2.ensure(recipe.config["base_model"])
        tokenizer = load_tokenizer(recipe.config)
    except OSError:
        raise JobFailed(
            f"the tokenizer of {recipe.config['base_model']} is not on this machine; "
            "RECIPE= names a recipe of another base"
        ) from None
    strategy = load_strategy(tokenizer, recipe.config)
    print(f"look       {shown(path)}, as {recipe.name} trains on it")
    with open(path, "rb") as file:
        for number, line in enumerate(islice(file, count), 1):
            show_row(number, orjson.loads(line), tokenizer, strategy, recipe.config)


def find_recipe(task: str) -> str:
    """A recipe whose base is on this machine, of the task or, for a test set, of any."""
    methods = list(recipes.read_matrix()["methods"])
    names = recipes.list_names()
    for model, row in recipes.read_matrix()["models"].items():
        base = row.get("base_model", row["hub"])
        if "base_model" in row or architectures.find_file(base, "tokenizer.json"):
            for name in (f"{model}/{task}_{methods[0]}", f"{model}/sentiment_{methods[0]}"):
                if name in names:
                    return name
    raise WrongInput("no tokenizer is on this machine; RECIPE= names a recipe, which gets its own")


def load_strategy(tokenizer: Any, config: dict[str, Any]) -> Any:
    """Axolotl's strategy that makes tokens and labels of a recipe's rows."""
    from axolotl.prompt_strategies.chat_template import load
    from axolotl.utils.dict import DictDefault

    return load(tokenizer, DictDefault(config), DictDefault(config["datasets"][0]))


def show_row(
    number: int, row: dict[str, Any], tokenizer: Any, strategy: Any, config: dict[str, Any]
) -> None:
    print(f"\n-- row {number}, as text")
    for turn in row["messages"]:
        calls = "".join(f" calls {call['function']}" for call in turn.get("tool_calls") or ())
        skipped = " (not trained)" if turn.get("train") is False else ""
        print(cut_text(spell_out(f"{turn['role']}{skipped}: {turn['content']}{calls}")))
    print(f"-- row {number}, as rendered")
    text = prompts.render_row(tokenizer, row, config.get("chat_template_kwargs"))
    print(cut_text(spell_out(text)))
    tokens = strategy.tokenize_prompt(row)
    ids, labels = tokens["input_ids"], tokens["labels"]
    trained = sum(label != -100 for label in labels)
    limit = config["sequence_len"]
    over = f", more than sequence_len ({limit}): not trained on" if len(ids) > limit else ""
    print(f"-- row {number}, as {len(ids)} tokens, {trained} of them trained{over}")
    print(mark_tokens(tokenizer, ids, labels, sys.stdout.isatty()))


def mark_tokens(tokenizer: Any, ids: list[int], labels: list[int], coloured: bool) -> str:
    """The tokens with a bar between them; trained ones in colour, or in brackets without."""
    start, end = ("\033[1;32m", "\033[0m") if coloured else ("[", "]")
    pieces = []
    for token, label in zip(ids, labels, strict=True):
        text = spell_out(tokenizer.decode([token])).replace("\n", "⏎")
        pieces.append(f"{start}{text}{end}" if label != -100 else text)
    if len(pieces) > 2 * 150:
        pieces = [*pieces[:150], "…", *pieces[-150:]]
    return "|".join(pieces)


def cut_text(text: str) -> str:
    """A text without its middle where it is long."""
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters]\n{text[-half:]}"
