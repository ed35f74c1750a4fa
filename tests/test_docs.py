"""The method pages say what runs: their examples, the recipe keys that they show, their links."""

import doctest
import re
from pathlib import Path

import pytest
import torch
import yaml

from bench import memory
from tools import prompts, recipes
from tools.common import ROOT

PAGES = ["qlora", "lora", "dora", "rslora"]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def examples(page: str) -> doctest.DocTest:
    """The examples of a page, in one namespace."""
    source = "\n".join(blocks(page, "python"))
    return doctest.DocTestParser().get_doctest(source, {}, page, f"docs/{page}.md", 0)


def question() -> str:
    """What the example of docs/qlora.md asks."""
    found: dict[str, str] = {}
    (asks,) = [e.source for e in examples("qlora").examples if e.source.startswith("question =")]
    exec(asks, found)  # noqa: S102  a string of this repository
    return found["question"]


@pytest.fixture(scope="module")
def adapter(smollm2, tmp_path_factory) -> Path:
    """A rank-4 adapter of SmolLM2's 4-bit base that was trained to answer the page's question."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    torch.manual_seed(0)
    wanted = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(memory.load_model(smollm2, 4, True, torch.float32), wanted).train()
    asked = prompts.tokens(tokenizer, [{"role": "user", "content": question()}])
    answer = tokenizer.encode("positive") + [tokenizer.eos_token_id]
    ids = torch.tensor([asked + answer], device=model.device)
    labels = ids.clone()
    labels[:, : len(asked)] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(12):
        loss = model(input_ids=ids, labels=labels).loss
        if loss < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def check(page: str) -> None:
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(examples(page), out=said.append)
    assert result.attempted and not result.failed, "".join(said)


@pytest.mark.parametrize("page", ["lora", "dora", "rslora"])
def test_the_equation_of_a_method_page_holds_as_it_is_printed(page):
    check(page)


def test_the_usage_example_answers_on_a_4_bit_smollm2(smollm2, adapter, tmp_path, monkeypatch):
    for place, real in (
        ("models/smollm2-135m", smollm2),
        ("runs/smollm2-135m/sentiment_r4", adapter),
    ):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).symlink_to(real)
    monkeypatch.chdir(tmp_path)
    check("qlora")


@pytest.mark.parametrize("page", PAGES)
def test_the_recipe_keys_on_a_page_are_those_of_the_recipe_that_it_names(page):
    shown = blocks(page, "yaml")
    assert shown
    for block in shown:
        name = block.splitlines()[0].removeprefix("# ")
        content = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
        assert content == content | yaml.safe_load(block), name


@pytest.mark.parametrize("page", PAGES)
def test_a_link_or_a_file_on_a_page_leads_somewhere(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for target in re.findall(r"\]\(([^)#]+\.md)", text):
        assert (ROOT / "docs" / target).is_file(), target
    for path in re.findall(r"`((?:tests|bench|tools|recipes)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"RECIPE=([\w/.-]*\w)", text):
        assert recipes.find(name)
