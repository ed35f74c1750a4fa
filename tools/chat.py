"""One answer from a recipe's base and one from its adapter, side by side.

    python -m tools.chat smollm2-135m/sentiment_r4 "What is the sentiment of …"

Both answer on the base at the precision that the adapter was trained on, greedily.
"""

import argparse
import sys
from contextlib import nullcontext
from typing import Any

from tools import export, prompt, recipes, weights
from tools.cli import WrongInput, command, quiet

BUDGET = 200  # new tokens at most


def answer(model: Any, tokenizer: Any, text: str, budget: int = BUDGET) -> str:
    """The model's greedy answer to one user turn, without its end token."""
    import torch

    ids = prompt.tokens(tokenizer, [{"role": "user", "content": text}])
    inputs = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=budget,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()


@command
def main() -> None:
    parser = argparse.ArgumentParser(description="ask a base and its adapter")
    parser.add_argument("recipe")
    parser.add_argument("prompt")
    arguments = parser.parse_args()
    if not arguments.prompt.strip():
        raise WrongInput('PROMPT="…" is needed')
    recipe = recipes.find(arguments.recipe)
    config = recipe.trained()
    export.ensure(config["base_model"])
    quiet()
    model, tokenizer = weights.load(config, recipe.run)

    from rich.console import Console
    from rich.table import Table

    table = Table(expand=True)
    cells = []
    for name, context in (("base", model.disable_adapter()), ("adapter", nullcontext())):
        with context:
            cells.append(answer(model, tokenizer, arguments.prompt.strip()))
        table.add_column(f"{name}, {weights.precision(config)}", ratio=1)
    from rich.markup import escape

    table.add_row(*map(escape, cells))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
