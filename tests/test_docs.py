"""The pages say what is: links, anchors, commands, recipe keys and examples."""

import doctest
import importlib
import itertools
import re
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from bench import memory
from tests.conftest import run
from tools import prompts, recipes, reference
from tools.__main__ import app, build_commands
from tools.common import ROOT, JobFailed

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
    names: dict[str, str] = {}
    (line,) = [e.source for e in examples("qlora").examples if e.source.startswith("question =")]
    exec(line, names)  # noqa: S102  a string of this repository
    return names["question"]


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
    prompt = prompts.tokens(tokenizer, [{"role": "user", "content": question()}])
    answer = tokenizer.encode("positive") + [tokenizer.eos_token_id]
    ids = torch.tensor([prompt + answer], device=model.device)
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
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
    output: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(examples(page), out=output.append)
    assert result.attempted and not result.failed, "".join(output)


@pytest.mark.parametrize("page", ["lora", "dora", "rslora"])
def test_the_equation_of_a_method_page_holds_as_it_is_printed(page):
    check(page)


@pytest.mark.slow
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


# ---- all pages

GENERATED = {"runs", "models", "wheelhouse", "raw", "chat", "local"}
TEMPLATE = ROOT / "tools" / "hub" / "card.md"
MAKEFILE = (ROOT / "Makefile").read_text()
FROM_ENVIRONMENT = set(re.search(r"^FROM_ENVIRONMENT := (.*)$", MAKEFILE, re.M).group(1).split())
TARGETS = dict(re.findall(r"^([a-z-]+):.*?## (.*)$", MAKEFILE, re.M))


def list_pages(folder: Path = ROOT) -> list[Path]:
    pages = [page for page in folder.glob("*.md") if page != TEMPLATE]
    for child in folder.iterdir():
        if child.is_dir() and child.name[0] != "." and child.name not in GENERATED:
            pages += list_pages(child)
    return sorted(pages)


ALL_PAGES = list_pages()
every_page = pytest.mark.parametrize(
    "page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT))
)


def remove_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def list_anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


@every_page
def test_a_link_leads_to_a_file_and_a_heading(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", remove_code(page.read_text()))
    for target in targets:
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in list_anchors(file), target


@every_page
def test_a_file_that_is_named_exists(page):
    text = page.read_text()
    pattern = r"`((?:tests|bench|tools|recipes|evals|data|docs|results|launch)/[\w/.-]+\.\w+)`"
    for path in re.findall(pattern, text):
        if not GENERATED & set(Path(path).parts):
            assert (ROOT / path).is_file(), path


def list_make_calls(text: str) -> list[str]:
    """What follows `make` in code: one string of targets and variables for each call."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside)]
    lines = [line.partition("#")[0] for line in lines]
    return [call for line in lines for call in re.findall(r"(?:^|\s)make ([a-z].*)", line)]


def list_variables(target: str) -> set[str]:
    verbs = build_commands().commands
    names = (
        {parameter.name.upper() for parameter in verbs[target].params} if target in verbs else set()
    )
    return names | set(re.findall(r"\b([A-Z_]+)=", TARGETS[target])) | FROM_ENVIRONMENT


@every_page
def test_a_make_target_and_its_variables_exist(page):
    for call in list_make_calls(page.read_text()):
        targets = list(itertools.takewhile(re.compile(r"[a-z-]+$").match, call.split()))
        assert targets and set(targets) <= TARGETS.keys(), call
        typed = set(re.findall(r"\b([A-Z][A-Z_]+)=", call))
        assert typed <= set().union(*map(list_variables, targets)), call


@every_page
def test_a_recipe_that_is_named_exists(page):
    for name in re.findall(r"RECIPE=([\w/.-]*\w)", page.read_text()):
        assert "my" in name or recipes.find(name), name


def test_the_checks_of_pages_see_what_is_wrong(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A b: `c`, 2e-3\n\n[x](#nowhere) `make nosuch A=1`\n\n```\nmake train NOSUCH=1\n```\n"
    )
    assert list_anchors(page) == {"a-b-c-2e-3"}
    assert list_make_calls(page.read_text()) == ["train NOSUCH=1", "nosuch A=1"]
    for check_page in (
        test_a_link_leads_to_a_file_and_a_heading,
        test_a_make_target_and_its_variables_exist,
    ):
        with pytest.raises(AssertionError):
            check_page(page)


def test_the_readme_is_short_and_links_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name}" in text, page.name


def test_the_readme_counts_the_recipes_and_their_parts():
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "training.md").read_text()
    models = [
        folder for folder in (ROOT / "recipes").iterdir() if (folder / "sentiment_r4.yaml").exists()
    ]
    files = [file for folder in models for file in folder.glob("*.yaml")]
    matrix = yaml.safe_load((ROOT / "recipes" / "matrix.yaml").read_text())
    assert f"{len(recipes.list_catalogue())} recipes" in " ".join(text.split())
    assert f"{len(files)} have a file" in " ".join(text.split())
    models, tasks, methods = (matrix[part] for part in ("models", "tasks", "methods"))
    shared = [name for name in methods if "only" not in methods[name]]
    of_all = [name for name in tasks if "only" not in tasks[name]]
    table = f"{len(models)} models × {len(of_all)} tasks × {len(shared)} methods"
    assert table in " ".join(text.split())
    for name in itertools.chain(models, tasks, methods):
        assert re.search(rf"`(\S+_)?{name}`", text), name


def test_every_verb_and_option_is_in_the_reference_and_drift_is_an_error(tmp_path, monkeypatch):
    group = build_commands()
    reference.write(group, check=True)
    text = reference.PAGE.read_text()
    assert "every finished run if omitted" in run("eval", "--help").stdout
    for name, verb in group.commands.items():
        section = text.partition(f"### {name}\n")[2].partition("\n### ")[0]
        assert section, name
        assert "python -m tools " + name in section, f"{name} has no example"
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0, f"{name} has no --help"
        for parameter in verb.params:
            written = parameter.name.upper() if name in TARGETS else parameter.opts[0]
            row = next(line for line in section.splitlines() if f"`{written}`" in line)
            assert len(row.split("|")[3].strip()) > 5, f"{name}: {parameter.name} has no help"
    old = tmp_path / "commands.md"
    old.write_text(text.replace("### train", "### trane"))
    monkeypatch.setattr(reference, "PAGE", old)
    with pytest.raises(JobFailed, match="commands.md is out of date"):
        reference.write(group, check=True)
    reference.write(group)
    assert old.read_text() == text


def test_the_picture_of_the_layers_is_that_of_the_import_linter():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    picture = (ROOT / "CONTRIBUTING.md").read_text().partition("## Layers")[2].split("```")[1]
    places = [picture.find(module) for layer in layers for module in layer.split(" : ")[:1]]
    assert -1 not in places and places == sorted(places)
    assert all(module in picture for layer in layers for module in layer.split(" : "))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "bench").glob("[!_]*.py")))
def test_every_experiment_and_benchmark_says_how_it_is_called(name):
    module = importlib.import_module(f"bench.{name}")
    if hasattr(module, "main"):
        assert f"python -m bench.{name}" in module.__doc__
