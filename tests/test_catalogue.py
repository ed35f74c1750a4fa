"""The catalogue is what its tables give, complete, versioned, and trains on what is scored."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from evals import results as measured
from tests.conftest import run
from tests.test_results import describe_result, describe_rows
from tools import architectures, catalogue, evidence, prompts, recipes, rendering
from tools.common import ROOT, JobFailed, WrongInput, write_text
from tools.hub import client
from tools.runs import Run
from tools.train import checks, memory, plan, profiles, reproduce, sweep

MODELS = ["llama-3.1-8b", "llama-3.1-70b", "llama-3.2-1b", "llama-3.2-3b", "qwen3-8b", "qwen3-4b"]
MODELS += ["qwen3-4b-2507", "qwen3-0.6b", "qwen3.5-4b", "qwen3.5-9b", "smollm3-3b", "gpt-oss-20b"]
MODELS += ["mistral-7b-v0.3", "gemma-3-4b", "smollm2-135m"]
DENSE = [model for model in MODELS if model != "gpt-oss-20b"]  # experts are not quantized


def test_every_model_has_every_task_by_every_method():
    tasks = ["sentiment", "tfns", "tfns_as_published", "headline", "ner", "finer", "xbrl_extract"]
    tasks += ["xbrl_term", "formula", "formula_worked", "financebench", "cfa"]
    tasks += ["general_multi", "reporting_multi", "analysis_multi"]
    methods = ["r4", "r8", "r8_dora", "r8_dora_a32", "r8_rslora", "r8_fp16", "qlora_all"]
    expected = [
        f"{model}/{task}_{method}"
        for model in MODELS
        for task in tasks
        if model == "smollm2-135m" or task != "tfns_as_published"  # what swapped labels do
        for method in methods
        if model in DENSE or method == "r8_fp16"
    ]
    names = recipes.list_catalogue()
    names.remove("smollm2-135m/sentiment_tuned")  # the one method that is not for all
    assert names == expected


def test_finloras_methods_have_files_for_its_base_and_the_laptops_and_the_others_for_all():
    complete = ("llama-3.1-8b/", "smollm2-135m/")
    for name in recipes.list_catalogue():
        file = name.startswith(complete) or name.endswith(("_r4", "_qlora_all"))
        assert (ROOT / "recipes" / f"{name}.yaml").is_file() == file, name
        assert recipes.has_file(name) == file


def list_own(method: str = "") -> list[str]:
    """Recipes of own tasks that whoever runs the tests may have here."""
    names = filter(recipes.is_local, recipes.list_names())
    return [name for name in names if name.endswith(method)]


@pytest.mark.slow
def test_every_recipe_is_what_the_tables_give_and_valid_for_axolotl_with_every_profile(capsys):
    catalogue.check()
    count = 1394 + len(list_own())
    assert capsys.readouterr().out.startswith(
        f"{count} recipes: current, and valid for Axolotl with"
    )


@pytest.mark.slow
def test_a_recipe_tells_how_to_run_it_what_it_needs_and_what_it_learns():
    for name in recipes.list_catalogue():
        text = rendering.render_recipe(name)
        recipe = recipes.find(text.split("make train RECIPE=")[1].split()[0])
        assert (recipe.name, recipe.run.folder) == (name, ROOT / "runs" / name)
        assert f"# Version: 1.1.0 ({recipe.digest[:12]})\n" in text
        assert f"# Evidence: {evidence.describe_evidence(name)}" in text.replace("\n#   ", " ")
        row = recipes.read_matrix()["models"][name.split("/")[0]]
        assert (f"https://huggingface.co/{row['hub']}," in text) == row["gated"]
        assert ("# Gated: no\n" in text) != row["gated"]
        assert (f"axolotl train recipes/{name}.yaml" in text) == recipes.has_file(name)
        assert yaml.safe_load(text) == recipes.build_config(name) == recipe.config
        assert recipes.read_version(text) == recipe.version


def test_a_reason_stands_beside_every_value_that_a_user_might_change():
    plain = {"logging_steps", "evals_per_epoch"}
    for name in recipes.list_catalogue():
        lines = rendering.render_recipe(name).splitlines()
        for before, line in zip(lines, lines[1:], strict=False):
            key = line.partition(":")[0]
            if line[:1] not in ("", "#", " ", "-") and key not in plain:
                assert "  # " in line or re.match(r"# \S", before), f"{name}: {line}"


def test_the_groups_name_the_keys_that_a_profile_may_change_and_those_of_the_output():
    groups = recipes.read_matrix()["keys"]
    running = next(keys for title, keys in groups.items() if "profile" in title)
    assert list(running) == recipes.RUNTIME_KEYS
    assert set(groups["Output"]) == set(recipes.OUTPUT_KEYS)


def test_a_recipe_without_a_file_is_shown_printed_and_trains_as_a_file(tmp_path):
    name = "qwen3-8b/ner_r8_dora"
    output = ran("show", name)
    assert output.startswith(rendering.render_recipe(name)) and f"{name} on Qwen/Qwen3-8B" in output
    done = run("render", name)
    path = tmp_path / "my.yaml"
    path.write_text(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    written, table = recipes.find(str(path)), recipes.find(name)
    assert written.version == table.version
    assert (written.config, written.digest) == (table.config, table.digest)


def test_a_message_about_a_recipe_without_a_file_names_the_recipe():
    name = "qwen3-8b/ner_r8_dora"
    recipe = recipes.find(name)
    broken = replace(recipe, config=recipe.config | {"adapter": None})
    with pytest.raises(WrongInput, match=f"^{name}: adapter must be lora or qlora"):
        checks.refuse_unusable(broken.config, broken.where)
    with pytest.raises(WrongInput, match="`make data TASKS=ner` makes it|is not there"):
        checks.describe_data(
            replace(recipe, config=recipe.config | {"datasets": [{"path": "nowhere/x.jsonl"}]})
        )


def test_a_recipe_without_a_file_is_swept_merged_with_a_profile_and_named_on_the_hub():
    recipe = recipes.find("qwen3-8b/ner_r8_dora")
    swept = [other.name for other in sweep.select_recipes("qwen3-8b/ner_r8*")]
    methods = ("r8", "r8_dora", "r8_dora_a32", "r8_rslora", "r8_fp16")
    assert swept == [f"qwen3-8b/ner_{method}" for method in methods]
    merged = profiles.merge_config(recipe, profiles.Choice("cpu"))
    assert merged == merged | recipes.select_learned(recipe.config) | {
        key: merged[key] for key in ("datasets", "test_datasets", "optimizer")
    }
    assert client.name_repository(recipe, "me") == "me/qwen3-8b-ner_r8_dora"


# ---- pages and evidence


@pytest.mark.parametrize("model", MODELS)
def test_the_page_of_a_model_lists_all_its_recipes_and_links_those_with_a_file(model):
    folder = ROOT / "recipes" / model
    rows = [line for line in (folder / "README.md").read_text().splitlines() if "GiB |" in line]
    names = [name for name in recipes.list_catalogue() if name.startswith(f"{model}/")]
    assert [re.search("`(.+?)`", row)[1] for row in rows] == [*map(recipes.shorten, names)]
    for name, row in zip(names, rows, strict=True):
        memory = rendering.round_to_gib(rendering.plan_memory(name))
        assert f"| {memory} GiB | 1.1.0 | {evidence.describe_evidence(name)} |" in row
        link = re.search(r"\]\((.+?)\)", row)
        assert bool(link) == recipes.has_file(name)
        assert not link or (folder / link[1]).is_file()


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results, which a test may fill."""
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    evidence.read_results.cache_clear()
    yield tmp_path
    evidence.read_results.cache_clear()


def write_result(**changes):
    measured.write_result(measured.Result.model_validate(describe_result(**changes)))
    evidence.read_results.cache_clear()


def test_the_evidence_is_measured_planned_or_no_result(results):
    name = "smollm2-135m/sentiment_r4"
    assert (
        evidence.describe_evidence("llama-3.1-8b/ner_r8_dora") == "planned: 2.6 h on one A5000 24GB"
    )
    assert (
        evidence.describe_evidence("llama-3.1-8b/cfa_r4") == "no result"
    )  # its rows are the user's
    assert (
        evidence.describe_evidence("llama-3.1-70b/ner_r8_fp16") == "no result"
    )  # no card holds it
    (results / "experiment.json").write_text('{"parts": {}}')
    write_result(name=name, device="two CPU cores")
    scores = "measured: fpb accuracy 28.5 → 71.5 % (majority 58.7)"
    text = f"{scores}, 2 seeds, 3.9 GB, 6.3 min, two CPU cores"
    assert evidence.describe_evidence(name) == text
    assert f"# Evidence: {text}\n" in rendering.render_recipe(name).replace("\n#   ", " ")
    assert f"| {text} |" in rendering.render_model_page("smollm2-135m")
    write_result(name=name, device="1 x NVIDIA A40", seeds=(42,))
    assert evidence.describe_evidence(name) == f"{text}; also on 1 other device"
    write_result(name=name, device="1 x NVIDIA A40", seeds=(42, 43, 44))
    assert evidence.describe_evidence(name).startswith(f"{scores}, 3 seeds,")


def test_a_stale_result_is_no_evidence_and_is_told_with_the_reason(results):
    name = "smollm2-135m/cfa_r4"
    write_result(name=name, version="1.0.0", digest="0" * 64)
    assert evidence.describe_evidence(name) == (
        "no result (measured before: the recipe has changed since version 1.0.0)"
    )
    write_result(
        name=name, device="1 x NVIDIA A40", training_data=[describe_rows("a", "data/sample")]
    )
    assert evidence.describe_evidence(name).startswith("no result (measured before")
    text = rendering.render_recipe(name)
    assert max(map(len, text.splitlines())) <= 100 and yaml.safe_load(text)


def test_the_planned_memory_in_a_recipe_is_the_planners():
    text = (ROOT / "recipes/llama-3.1-8b/sentiment_r4.yaml").read_text()
    planned = plan.plan(recipes.find("sentiment_r4").config, row=256)
    gib = -(-planned["memory"]["peak"] // 2**30)
    assert f"# Planned GPU memory: {gib} GiB (rows of up to 256 tokens; `make plan`)\n" in text


@pytest.mark.parametrize("model", DENSE)
def test_qlora_all_adapts_every_linear_layer_of_the_language_model_alone(model):
    recipe = recipes.find(f"{model}/ner_qlora_all")
    setup = memory.read_setup(recipe.config, 128, 1)
    assert (setup.rank, setup.bits) == (16, 4)
    layers = architectures.find(recipe.config["base_model"]).list_layers()
    adapted = [memory.select_targets(layer, setup) for layer in layers]
    assert adapted == [layer.linear for layer in layers]
    assert recipe.config["lora_alpha"] == 32
    assert recipe.config["lr_scheduler"] == "constant_with_warmup"


@pytest.mark.parametrize(("method", "layers"), [("r4", 3), ("qlora_all", 7)])
def test_peft_adapts_gemmas_language_model_and_not_its_vision_tower(method, layers):
    import peft
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = small | {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300}
    vision = small | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text | {"num_hidden_layers": 2}, vision_config=vision, mm_tokens_per_image=4
    )
    named = recipes.find(f"gemma-3-4b/sentiment_{method}").config["lora_target_modules"]
    model = peft.get_peft_model(
        Gemma3ForConditionalGeneration(config), peft.LoraConfig(target_modules=named)
    )
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    assert len(adapted) == 2 * layers
    assert all(".language_model.layers." in name for name in adapted)


# Axolotl's own copies of the templates, which tokenizers bring: file, and tokens that it needs.
TEMPLATES = {
    "qwen3-8b": ("qwen3", ["<think>", "</think>"]),
    "gemma-3-4b": ("gemma3", ["<start_of_turn>", "<end_of_turn>", "<pad>", "<bos>"]),
    "mistral-7b-v0.3": ("mistral_v2v3", ["[INST]", "[/INST]", "<unk>", "<s>", "</s>"]),
    "llama-3.2-1b": (
        "llama3_2_vision",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
    ),
    "smollm2-135m": (None, []),
}
ENDS = {"gemma-3-4b": "<end_of_turn>", "mistral-7b-v0.3": "</s>", "llama-3.2-1b": "<|eot_id|>"}


# How the tokenizers of Llama 3 and Qwen3 cut text before they merge it (SmolLM2's is GPT-2's, which
# cuts line breaks otherwise where text follows them).
CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("model", TEMPLATES)
def test_what_axolotl_trains_on_begins_with_the_prompt_that_is_scored(model, smollm2):
    import axolotl
    from axolotl.prompt_strategies.chat_template import StrategyLoader
    from axolotl.utils.dict import DictDefault
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from transformers import AutoTokenizer

    name, added = TEMPLATES[model]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    if model in ("qwen3-8b", "llama-3.2-1b"):
        cut = Split(Regex(CUT), "isolated")
        merge = ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([cut, merge])
    if name:
        folder = Path(axolotl.__file__).parent / "utils" / "chat_templates" / "templates"
        tokenizer.chat_template = (folder / f"{name}.jinja").read_text()
    tokenizer.bos_token = {"gemma-3-4b": "<bos>", "mistral-7b-v0.3": "<s>"}.get(
        model, "<|im_start|>"
    )
    # The base's own end token where the recipe sets none; Gemma's recipe must set it.
    tokenizer.eos_token = {**ENDS, "gemma-3-4b": "<|endoftext|>"}.get(model, "<|im_end|>")
    config = recipes.find(f"{model}/sentiment_r4").config
    tokenizer.add_special_tokens(config["special_tokens"])
    assert tokenizer.eos_token == ENDS.get(model, "<|im_end|>")

    messages = [{"role": "user", "content": "Is it good?\nAnswer:"}]
    answer = {"role": "assistant", "content": "positive"}
    settings = DictDefault(config)
    (dataset,) = settings.datasets
    loader = StrategyLoader()(tokenizer, settings, DictDefault(dataset))
    row = loader.tokenize_prompt({"messages": [*messages, answer]})
    fed = prompts.tokens(tokenizer, messages, config.get("chat_template_kwargs"))
    trained = [token for token in row["labels"] if token != -100]
    assert row["input_ids"][: len(fed)] == fed
    assert tokenizer.decode(trained).strip() == f"positive{tokenizer.eos_token}"
    assert row["labels"][: len(fed)] == [-100] * len(fed)
    text = prompts.render(tokenizer, messages, config.get("chat_template_kwargs"))
    if model == "qwen3-8b":
        assert text.endswith("<think>\n\n</think>\n\n")
    if model == "llama-3.2-1b":
        assert "26 Jul 2024" in text
        # Without the recipe's date the prompt would be another one every day.
        assert "26 Jul 2024" not in prompts.render(tokenizer, messages)


# ---- versions


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the tables and the recipes of two models, which a test may change."""
    folder = tmp_path / "recipes"
    models = ["llama-3.1-8b", "qwen3-8b"]
    for model in models:
        shutil.copytree(recipes.FOLDER / model, folder / model)
    recorded = json.loads((recipes.FOLDER / "digests.json").read_text())
    own = {name: text for name, text in recorded.items() if name.startswith("qwen3-8b/")}
    (folder / "digests.json").write_text(json.dumps(own, indent=0) + "\n")
    table = yaml.safe_load((recipes.FOLDER / "matrix.yaml").read_text())
    table["models"] = {model: table["models"][model] for model in models}
    monkeypatch.setattr(recipes, "FOLDER", folder)
    monkeypatch.setattr(recipes, "LOCAL", folder / "local")

    def write(table):
        (folder / "matrix.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
        recipes.clear_caches()

    write(table)
    yield folder, table, write
    recipes.clear_caches()


@pytest.mark.slow
def test_what_a_recipe_learns_changes_only_with_its_version(copy, capsys):
    folder, table, write = copy
    table["methods"]["r4"]["settings"]["lora_r"] = 5
    write(table)
    before = {path: path.read_bytes() for path in folder.rglob("*.yaml")}
    for verb in (catalogue.render, catalogue.check):
        with pytest.raises(JobFailed, match="28 recipes learn something else under the same"):
            verb()
        message = capsys.readouterr().err
        assert "llama-3.1-8b/sentiment_r4 1.1.0:\n    -lora_r: 4\n    +lora_r: 5\n" in message
    assert {path: path.read_bytes() for path in folder.rglob("*.yaml")} == before
    table["versions"]["*_r4"] = "1.2.0"
    write(table)
    catalogue.render()
    recipe = recipes.find("sentiment_r4")
    assert (recipe.version, recipe.config["lora_r"]) == ("1.2.0", 5)
    assert recipes.find("sentiment_r8").version == "1.1.0"
    catalogue.check()


def test_what_a_recipe_without_a_file_learns_cannot_change_either(copy, capsys):
    folder, table, write = copy
    table["overrides"]["qwen3-8b/ner_r8_dora"] = {"lora_r": 6}
    write(table)
    for verb in (catalogue.render, catalogue.check):
        with pytest.raises(JobFailed, match="1 recipe learns something else.*qwen3-8b/ner_r8_dora"):
            verb()
        assert re.search(r"1\.1\.0:\n    digest \w{12}, now \w{12}\n", capsys.readouterr().err)
    table["versions"]["qwen3-8b/ner_r8_dora"] = "1.2.0"
    write(table)
    catalogue.render()
    assert recipes.find("qwen3-8b/ner_r8_dora").version == "1.2.0"
    table["overrides"]["qwen3-8b/ner_r8_dora"] = {"lora_r": 7}
    write(table)
    with pytest.raises(JobFailed, match="1 recipe learns something else"):
        catalogue.render()


def test_a_file_may_come_and_go_but_not_change_on_the_way(copy, capsys):
    folder, table, write = copy
    name = "qwen3-8b/ner_r8_dora"
    before = recipes.find(name)
    table["files"].append(name)
    write(table)
    catalogue.render()
    after = recipes.find(name)
    assert (before.path, after.path) == (None, folder / f"{name}.yaml")
    assert (before.digest, before.version) == (after.digest, after.version)
    table["files"].remove(name)
    table["overrides"][name] = {"lora_r": 6}
    write(table)
    with pytest.raises(JobFailed, match="1 recipe learns something else"):
        catalogue.render()
    del table["overrides"][name]
    write(table)
    catalogue.render()
    assert recipes.find(name).path is None


@pytest.mark.slow
def test_how_it_runs_may_change_without_a_new_version(copy):
    folder, table, write = copy
    table["common"]["gradient_checkpointing"] = False
    write(table)
    with pytest.raises(JobFailed, match="is out of date; `make render` writes it"):
        catalogue.check()
    catalogue.render()
    catalogue.check()


@pytest.mark.slow
def test_a_file_that_the_tables_no_longer_give_is_named_and_removed(copy):
    folder, table, write = copy
    del table["tasks"]["cfa"]
    write(table)
    with pytest.raises(JobFailed, match="is not in recipes/matrix.yaml"):
        catalogue.check()
    catalogue.render()
    assert not list(folder.glob("*/cfa_*"))
    del table["models"]["qwen3-8b"]
    write(table)
    catalogue.render()
    assert not list((folder / "qwen3-8b").iterdir())
    catalogue.check()


def test_a_file_of_the_users_own_among_the_rendered_ones_is_left_alone(copy):
    folder, table, write = copy
    own = {"mine.yaml": b"base_model: \xff\n"}
    own["copy.yaml"] = (folder / "qwen3-8b" / "ner_r4.yaml").read_bytes()
    for name, content in own.items():
        (folder / "qwen3-8b" / name).write_bytes(content)
    catalogue.render()
    assert own == {name: (folder / "qwen3-8b" / name).read_bytes() for name in own}


def test_a_key_without_a_group_stops_the_rendering(copy):
    folder, table, write = copy
    table["methods"]["r4"]["settings"]["lora_fan_in_fan_out"] = False
    table["versions"]["*"] = "2.0.0"
    write(table)
    with pytest.raises(JobFailed, match="no group has lora_fan_in_fan_out"):
        catalogue.render()


# ---- list and show


def ran(*arguments):
    code = (
        f"import sys; from tools.__main__ import main; sys.argv = ['x', *{arguments!r}]; main();"
        "print(*({'torch', 'transformers', 'axolotl', 'peft'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    return done.stdout


def read_table(text):
    """The names in a table of recipes, and the lines after it."""
    table, _, rest = text.partition("\n\n")
    head, *lines = table.splitlines()
    names = set()
    for line in lines:
        stem = line.split()[0]
        for match in re.finditer(r"\S+", head[len("recipe") :]):
            start, end = match.start() + len("recipe"), match.end() + len("recipe") + 1
            if line[start:end].strip(" *"):
                names.add(stem + match[0])
    return names, rest


def test_the_list_shows_every_recipe_with_a_file_and_loads_no_heavy_library():
    names, rest = read_table(ran("recipes"))
    assert names == {*map(recipes.shorten, filter(recipes.has_file, recipes.list_names()))}
    assert rest.startswith(f"{540 + len(list_own())} recipes, ")
    assert "854 more have no file and train by their names; METHOD=r8_dora" in rest


def test_a_method_lists_its_recipes_with_a_file_and_without_also_for_machines():
    names, rest = read_table(ran("recipes", "--method", "r8_dora"))
    all_names = [name for name in recipes.list_names() if name.endswith("_r8_dora")]
    assert names == {*map(recipes.shorten, all_names)}
    assert (
        rest.startswith(f"{197 + len(list_own('_r8_dora'))} recipes, ")
        and "more have no file" not in rest
    )
    rows = json.loads(ran("recipes", "--method", "r8_dora", "--task", "ner", "--json"))
    assert [row["recipe"] for row in rows] == [f"{model}/ner_r8_dora" for model in DENSE]
    with_file = {row["model"] for row in rows if row["has_file"]}
    assert with_file == {"llama-3.1-8b", "smollm2-135m"}
    assert rows[0]["finlora"] == "ner_llama_3_1_8b_8bits_r8_dora"
    assert rows[0]["version"] == "1.1.0"
    assert rows[0]["planned_gpu_bytes"] > rows[2]["planned_gpu_bytes"] > 2**30
    filters = ("--task", "ner", "--method", "r4", "--model", "qwen3-4b")
    (row,) = json.loads(ran("recipes", *filters, "--json"))
    assert row["recipe"] == "qwen3-4b/ner_r4"


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (("sentimnt", None, None), 'unknown TASK "sentimnt"; did you mean sentiment?'),
        ((None, "llama-3", None), 'unknown MODEL "llama-3"; did you mean llama-3.'),
        ((None, None, "zzz"), 'unknown METHOD "zzz"; there are r4, r8, r8_dora'),
    ],
)
def test_an_unknown_filter_is_answered_with_what_there_is(filters, message):
    with pytest.raises(WrongInput) as error:
        catalogue.select_names(*filters)
    assert str(error.value).startswith(message)


def test_a_base_is_found_where_the_hub_s_library_keeps_it(tmp_path):
    """Wherever the environment has moved the cache."""
    ask = "from tools.architectures import base_folder; print(base_folder('owner/base'))"
    places = {"XDG_CACHE_HOME": "huggingface/hub", "HF_HOME": "hub", "HF_HUB_CACHE": ""}
    for variable, beneath in (places | {"HUGGINGFACE_HUB_CACHE": ""}).items():
        home = tmp_path / variable
        repository = home / beneath / "models--owner--base"
        for file, text in (("refs/main", "c0ffee"), ("snapshots/c0ffee/config.json", "{}")):
            write_text(repository / file, text)
        hidden = {*places, "HUGGINGFACE_HUB_CACHE"}
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        command = [sys.executable, "-c", ask]
        found = subprocess.run(
            command, env=environment | {variable: str(home)}, capture_output=True, cwd=ROOT
        ).stdout
        assert found.decode().strip() == str(repository / "snapshots" / "c0ffee")


def test_filters_that_no_recipe_passes_are_named_and_recipes_without_a_file_are_counted(capsys):
    with pytest.raises(WrongInput, match="^no recipe has gpt-oss-20b and r4$"):
        catalogue.list_recipes(None, "gpt-oss-20b", "r4")
    without = next(
        (task, model)
        for model in recipes.read_matrix()["models"]
        for task in recipes.read_matrix()["tasks"]
        if (names := catalogue.select_names(task, model, None))
        and not any(map(recipes.has_file, names))
    )
    catalogue.list_recipes(*without, None)
    assert "have no file and train by their names" in capsys.readouterr().out


def test_show_prints_the_file_the_plan_and_what_a_run_took(tmp_path, capsys):
    config = recipes.find("smollm2-135m/sentiment_r4").config | {"output_dir": str(tmp_path)}
    path = tmp_path / "mine.yaml"
    path.write_text("# Version: 1.1.0 (x)\n" + yaml.safe_dump(config))
    run_info = {"trainable_parameters": 322_560, "steps": 110, "seconds": 360.0}
    run_info |= {"peak_memory_bytes": 2**32, "tokens_per_second": 222.8, "train_loss": 0.231}
    run_info |= {"recipe_version": "1.1.0", "processes": 1, "device": "cpu", "finished": "then"}
    (tmp_path / "run.json").write_text(json.dumps(run_info))
    catalogue.show(str(path))
    out = capsys.readouterr().out
    assert path.read_text() in out
    rows = {line.split("  ")[0]: line.split()[-2:] for line in out.splitlines() if "  " in line}
    assert rows["trainable"] == ["322,560", "322,560"]
    assert rows["peak memory, GiB"][1] == "4.00"
    assert rows["hours"][1] == "0.10"
    (tmp_path / "run.json").write_text('{"adapter_sha256": "0"}')  # as one may be that was pulled
    catalogue.show(str(path))
    assert "took" not in capsys.readouterr().out
    with pytest.raises(WrongInput, match="cannot be trained again: its run.json has no data"):
        reproduce.build_recipe(Run(tmp_path))
