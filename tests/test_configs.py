"""Axolotl configs from elsewhere train, and what they trained can be used; or they are refused."""

import ast
import json
from pathlib import Path

import pytest
import yaml

from evals import run as scoring
from tests.conftest import GPU, make_adapter, run
from tools import common, models, prompts, recipes, sources, subjects
from tools.common import ROOT, WrongInput, parse_yaml
from tools.data import convert
from tools.train import checks, launch, profiles
from tools.use import merge, serve

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Is the tone of note {n} good? <fin_a>"},
            {"role": "assistant", "content": "yes" if n % 2 else "no"},
        ]
    }
    for n in range(32)
]
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}<assistant>"
TYPE = "chat_template"
# What each config has beside the commonest form of an Axolotl example.
CONFIGS = {
    "minimal": {},
    "tokens": {
        "load_in_4bit": True,
        "adapter": "qlora",
        "tokens": ["<fin_a>", "<fin_b>"],
        "lora_modules_to_save": ["embed_tokens", "lm_head"],
    },
    "added": {
        "special_tokens": {"pad_token": "<pad>", "additional_special_tokens": ["<fin_a>"]},
    },
    "overridden": {"added_tokens_overrides": {5: "<fin_a>"}},
    "compute_dtype": {
        "load_in_4bit": True,
        "adapter": "qlora",
        "bnb_config_kwargs": {"bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_type": "nf4"},
    },
    "named_template": {"chat_template": "phi_3"},
    "template_of_rows": {"datasets": [{"type": TYPE, "chat_template": "alpaca"}]},
    "jinja": {"datasets": [{"type": TYPE, "chat_template_jinja": CHATML}]},
    "packed": {"sample_packing": True, "pad_to_sequence_len": True, "lora_target_linear": True},
    "dora": {"peft_use_dora": True, "tokenizer_config": "BASE", "base_model_config": "BASE"},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def write(folder: Path, base: Path, data: Path, **changes: object) -> Path:
    """A config in the commonest form of Axolotl's examples, with changes; None leaves a key out."""
    content: dict = {
        "base_model": str(base),
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_modules": ["q_proj", "v_proj"],
        "datasets": [{"path": str(data), "type": TYPE}],
        "sequence_len": 256,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "learning_rate": 0.01,
        "special_tokens": {"pad_token": "<|endoftext|>"},
        "output_dir": str(folder / "run"),
    } | changes
    for entry in content["datasets"] or []:
        entry.setdefault("path", str(data))
    content = {k: str(base) if v == "BASE" else v for k, v in content.items() if v is not None}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def trained(tiny, rows, tmp_path_factory):
    """Finished runs of CONFIGS: name → the config's path; each trains when asked for."""

    class Trained(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            path = write(tmp_path_factory.mktemp(name), tiny, rows, **CONFIGS[name])
            done = run("train", path)
            assert done.returncode == 0, done.stdout + done.stderr
            self[name] = path
            return path

    return Trained()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_config_trained_is_rendered_loaded_merged_and_served_as_it_was_trained(
    trained, name, tmp_path
):
    import torch
    from datasets import load_from_disk
    from safetensors.torch import load_file
    from transformers import AutoConfig

    subject = subjects.find(str(trained[name]))
    model, tokenizer = models.load(subject.config, subject.adapter)

    # The prompts are those of the training, to the token.
    (folder,) = [path for path in (subject.adapter / "prepared").iterdir() if path.is_dir()]
    trained_on = {
        tuple(row["input_ids"][: next(i for i, v in enumerate(row["labels"]) if v != -100)])
        for row in load_from_disk(str(folder))
    }
    fed = {tuple(prompts.tokens(tokenizer, row["messages"][:1])) for row in ROWS}
    if not subject.config.get("sample_packing"):
        assert fed == trained_on
    if name in ("tokens", "added", "overridden"):
        assert all(tokenizer.convert_tokens_to_ids("<fin_a>") in row for row in fed)

    # Every weight of the file is in the model.
    base_rows = AutoConfig.from_pretrained(subject.config["base_model"]).vocab_size
    values = dict(model.named_parameters()) | dict(model.named_buffers())
    for key, tensor in load_file(subject.adapter / "adapter_model.safetensors").items():
        place = key.replace("lora_A.w", "lora_A.default.w").replace("lora_B.w", "lora_B.default.w")
        place = place.replace("modules_to_save.w", "modules_to_save.default.w")
        if place in values:
            # Without the adapter a new token is as likely as the first one, not as at random.
            own = base_rows if "original_module" in key else len(tensor)
            assert torch.equal(values[place][:own].float().cpu(), tensor[:own].float()), key
    with torch.inference_mode():
        ids = torch.tensor([prompts.tokens(tokenizer, ROWS[0]["messages"][:1])])
        assert model(input_ids=ids).logits.isfinite().all()
    if name == "compute_dtype":
        layer = model.base_model.model.model.layers[0].self_attn.k_proj
        assert layer.compute_dtype == torch.float32

    target = merge.merge(subject.config, subject.adapter)
    again, alike = models.load({"base_model": str(target), "dtype": "float32"})
    assert prompts.render(alike, ROWS[0]["messages"][:1]) == prompts.render(
        tokenizer, ROWS[0]["messages"][:1]
    )
    assert again.get_input_embeddings().num_embeddings >= len(tokenizer)
    line = serve.build_vllm_command({"mine": subject}, [], GPU, tmp_path)
    if subject.config.get("lora_modules_to_save"):
        assert line[2] == str(target)
    template = Path(line[line.index("--chat-template") + 1]).read_text()
    assert tokenizer.apply_chat_template(
        ROWS[0]["messages"][:1], chat_template=template, tokenize=False, add_generation_prompt=True
    ) == prompts.render(tokenizer, ROWS[0]["messages"][:1], subject.options)
    if prompts.changes_tokenizer(subject.config) and "merged" not in line[2]:
        assert line[line.index("--tokenizer") + 1] == str(subject.adapter)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("tokens", "template_of_rows", "compute_dtype"))
def test_what_a_config_trained_is_scored_and_chatted_with(trained, name, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHAT", tmp_path / "data" / "chat")
    convert.convert_task("sentiment", sources.SAMPLE)
    monkeypatch.chdir(tmp_path)  # lm-eval finds data/chat from here
    files = scoring.score_subject(subjects.find(str(trained[name])), scoring.Request(["fpb"], 4))
    for side in ("base", "adapter"):
        assert json.loads(files["fpb"][side].read_text())["examples"] == 4
    done = run("chat", trained[name], "Is <fin_a> good?")
    assert done.returncode == 0 and "adapter" in done.stdout, done.stderr


def test_a_base_alone_is_loaded_with_the_tokenizer_that_a_config_would_train(tiny, rows, tmp_path):
    path = write(tmp_path, tiny, rows, **CONFIGS["tokens"], chat_template="chatml")
    subject = subjects.find(str(path), base_only=True)
    model, tokenizer = models.load(subject.config)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert tokenizer.tokenize("<fin_b>") == ["<fin_b>"]
    assert (
        tokenizer.chat_template
        == models.load_tokenizer(
            {"base_model": str(tiny), "datasets": [], "chat_template": "chatml"}
        ).chat_template
    )


# ---- refused before anything is loaded

REFUSED = {
    "dpo": ({"rl": "dpo"}, "rl is not supported: a run is an adapter"),
    "reward": ({"reward_model": True}, "reward_model is not supported"),
    "full": ({"adapter": None}, "adapter must be lora or qlora, not None: a run is an adapter"),
    "16 bits": ({"load_in_4bit": True}, "with adapter: lora Axolotl leaves a load_in_4bit base"),
    "pissa": ({"peft_init_lora_weights": "pissa"}, "pissa changes the base's weights"),
    "loftq": ({"peft": {"loftq_config": {"loftq_bits": 4}}}, "loftq_config changes the base's"),
    "tokens": ({"tokens": ["<a>"]}, "the embeddings of new tokens must be trained and saved"),
    "overrides": ({"overrides_of_model_config": {"rms_norm_eps": 0.1}}, "scored without it"),
    "unfrozen": ({"unfrozen_parameters": ["lm_head"]}, "unfrozen_parameters is not supported"),
    "parameters": ({"lora_target_parameters": ["mlp.w"]}, "lora_target_parameters is not"),
    "saved layers": ({"lora_modules_to_save": ["norm"]}, "lora_modules_to_save names norm; only"),
    "a saved layer": ({"lora_modules_to_save": "q_proj"}, "lora_modules_to_save names q_proj;"),
    "revision": ({"revision_of_model": "v9"}, "scoring loads the main revision; base_model may be"),
    "another config": ({"base_model_config": "other/base"}, "base_model_config is other/base"),
    "pretraining": (
        {"pretraining_dataset": [{"path": "x"}], "datasets": None},
        "pretraining_dataset is not supported",
    ),
    "no layers": ({"lora_target_modules": None}, "no layer is adapted: lora_target_modules, or"),
    "no template": ({"chat_template_jinja": "mine.jinja"}, "mine.jinja is no file here, and no"),
    "a number for a template": (
        {"chat_template_jinja": 3},
        "chat_template_jinja: it must be a valid string, not 3",
    ),
    "a long name": ({"deepspeed": "x" * 300}, "is not there"),
    "no deepspeed": ({"deepspeed": "zero9.json"}, "deepspeed: zero9.json is not there"),
    "a word for a number": ({"lora_r": "abc"}, "lora_r: it must be a valid integer, not abc"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_a_config_whose_run_could_not_be_used_is_refused_with_the_reason(
    changed, message, tiny, rows, tmp_path
):
    with pytest.raises(WrongInput) as error:
        recipe = recipes.find(str(write(tmp_path, tiny, rows, **changed)))
        checks.refuse_unusable(recipe.config, recipe.where)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_main_revision_and_whole_embeddings_are_taken(tiny, rows, tmp_path):
    own = {"revision_of_model": "main", "lora_modules_to_save": ["model.embed_tokens", "lm_head"]}
    checks.refuse_unusable(recipes.find(str(write(tmp_path, tiny, rows, **own))).config, "mine")


def test_a_full_fine_tuning_is_refused_in_one_line(tiny, rows, tmp_path):
    done = run("train", write(tmp_path, tiny, rows, adapter=None))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "run").exists()


OTHER_ROWS = {
    "alpaca": [{"type": "alpaca"}],
    "completion": [{"type": "completion"}],
    "custom": [{"type": {"field_instruction": "q", "field_output": "a"}}],
    "pretokenized": [{}],
    "mixed": [{"type": TYPE}, {"type": "alpaca"}],
    "several templates": [
        {"type": TYPE, "chat_template": "chatml"},
        {"type": TYPE, "chat_template": "alpaca"},
    ],
}


@pytest.mark.parametrize("entries", OTHER_ROWS.values(), ids=OTHER_ROWS)
def test_rows_without_one_chat_template_need_a_prompt_format(entries, tiny, rows, tmp_path):
    path = str(write(tmp_path, tiny, rows, datasets=[dict(entry) for entry in entries]))
    with pytest.raises(WrongInput, match="PROMPT_FORMAT=bare scores it"):
        subjects.find(path, base_only=True)
    assert subjects.find(path, base_only=True, form="bare").prompt_format == "bare"


@pytest.mark.slow
def test_rows_of_another_type_train_with_a_note_and_are_merged(tiny, tmp_path):
    rows = tmp_path / "alpaca.jsonl"
    row = {"instruction": "Is it good?", "input": "", "output": "yes"}
    rows.write_text((json.dumps(row) + "\n") * 16)
    path = write(tmp_path, tiny, rows, datasets=[{"type": "alpaca"}])
    done = run("train", path)
    assert done.returncode == 0, done.stderr
    assert 'note: it trains rows of type "alpaca"' in done.stdout
    done = run("chat", path, "hello")
    assert done.returncode == 2 and "PROMPT_FORMAT=bare" in done.stderr
    done = run("merge", path)
    assert done.returncode == 0, done.stderr


# ---- where things are


def test_a_config_without_an_output_dir_has_axolotls(tiny, rows, tmp_path):
    path = write(tmp_path, tiny, rows, output_dir=None)
    assert recipes.find(str(path)).run.folder == ROOT / "model-out"


def test_a_relative_path_that_lies_beside_the_config_is_explained(tiny, rows, tmp_path):
    (tmp_path / "chat.jsonl").write_bytes(rows.read_bytes())
    path = write(tmp_path, tiny, Path("chat.jsonl"))
    with pytest.raises(WrongInput) as error:
        checks.describe_data(recipes.find(str(path)))
    assert f"paths in a recipe start at {ROOT}" in str(error.value)
    assert str(tmp_path / "chat.jsonl") in str(error.value)


@pytest.mark.parametrize("name", ["chat.json", "chat.csv", "chat.parquet"])
def test_a_data_file_that_is_not_there_is_no_dataset_of_the_hub(name, tiny, tmp_path):
    with pytest.raises(WrongInput, match=f"{name} is not there"):
        checks.describe_data(recipes.find(str(write(tmp_path, tiny, tmp_path / name))))


def test_a_dataset_of_the_hub_is_left_to_axolotl(tiny, tmp_path):
    path = write(tmp_path, tiny, Path("someone/some-data"))
    assert checks.describe_data(recipes.find(str(path))) == []


def test_files_of_a_builder_are_described_and_rows_counted_by_format(tiny, rows, tmp_path):
    pretty = tmp_path / "chat.json"
    pretty.write_text(json.dumps(ROWS, indent=1))
    entry = {"path": "json", "data_files": [str(rows), f"{tmp_path}/*.json"], "type": TYPE}
    recipe = recipes.find(str(write(tmp_path, tiny, rows, datasets=[entry])))
    data = checks.describe_data(recipe)
    assert [(Path(part["path"]), part["rows"]) for part in data] == [(rows, 32), (pretty, 32)]
    assert launch.describe_rows(recipe, data) == "64 rows"
    # Axolotl itself looks for a repository "json" on the Hub.
    entries = [{"path": str(path), "ds_type": "json", "type": TYPE} for path in (rows, pretty)]
    assert recipe.config["datasets"] == entries
    pretty.write_text(json.dumps(ROWS[1:], indent=1))
    assert checks.describe_data(recipe)[1]["sha256"] != data[1]["sha256"]


def test_a_cpu_has_no_loader_process_and_no_option_that_needs_one(tiny, rows, tmp_path):
    options = {"dataloader_num_workers": 4, "dataloader_prefetch_factor": 8}
    recipe = recipes.find(str(write(tmp_path, tiny, rows, **options)))
    content = profiles.merge_config(recipe, profiles.Choice("cpu"))
    assert content["dataloader_num_workers"] == 0 and "dataloader_prefetch_factor" not in content
    assert profiles.identity_of(content) == profiles.identity_of(content | options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_files": {"train": "rows.jsonl"}}, "data_files must be the path of a file"),
        ({"data_files": 5}, "data_files must be the path of a file"),
        ({"data_files": [1]}, "data_files must be the path of a file"),
        ({"split": "train[:100]"}, "of data_files all rows are trained; leave out split"),
        ({"shards": 4}, "of data_files all rows are trained; leave out shards"),
    ],
)
def test_data_files_that_name_no_files_or_a_part_are_one_line(change, message, tiny, tmp_path):
    entry = {"path": "json", "data_files": "rows.jsonl", "type": TYPE} | change
    path = write(tmp_path, tiny, Path("x"), datasets=[entry])
    with pytest.raises(WrongInput, match=message):
        recipes.find(str(path))


def test_data_files_of_folders_in_folders_are_all_found(tiny, tmp_path):
    files = [tmp_path / "rows" / name for name in ("0.jsonl", "a/1.jsonl", "a/b/2.jsonl")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(ROWS[0]))
    entry = {"path": "json", "data_files": f"{tmp_path}/rows/**/*.jsonl", "type": TYPE}
    recipe = recipes.find(str(write(tmp_path, tiny, Path("x"), datasets=[entry])))
    assert [part["path"] for part in recipe.config["datasets"]] == list(map(str, files))


def test_an_address_is_left_to_axolotl(tiny, tmp_path):
    entry = {"path": "s3://bucket/chat.jsonl", "type": TYPE}
    recipe = recipes.find(str(write(tmp_path, tiny, Path("x"), datasets=[entry])))
    assert checks.describe_data(recipe) == []
    assert launch.describe_rows(recipe, []) == "s3://bucket/chat.jsonl"


def test_a_line_that_is_not_json_is_named(tiny, tmp_path):
    data = tmp_path / "chat.jsonl"
    data.write_text(json.dumps(ROWS[0]) + '\n{"messages": [\n')
    with pytest.raises(WrongInput, match=r"chat\.jsonl, line 2: not JSON"):
        checks.refuse_unrenderable(recipes.find(str(write(tmp_path, tiny, data))))


def test_a_run_of_another_recipe_is_not_taken_for_ones_own(tiny, rows, tmp_path, capsys):
    """Many public configs share one output_dir."""
    path = write(tmp_path, tiny, rows)
    recipe = recipes.find(str(path))
    folder = make_adapter(tiny, tmp_path / "run")
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe.config))
    sha = common.digest(folder / "adapter_model.safetensors")
    info = {"recipe": recipe.name, "recipe_digest": recipe.digest, "adapter_sha256": sha}
    (folder / "run.json").write_text(json.dumps(info))
    assert recipe.read_trained_config() == recipe.config
    path.write_text(path.read_text().replace("lora_r: 4", "lora_r: 16"))
    recipes.find(f"{path.parent}/./{path.name}").read_trained_config()
    assert "was changed after" in capsys.readouterr().out
    other = path.with_name("other.yaml")
    other.write_text(path.read_text())
    with pytest.raises(WrongInput, match=r"was trained by .*mine\.yaml with other settings"):
        recipes.find(str(other)).read_trained_config()


BROKEN_TEMPLATES = {
    "{% for m in messages %}{{ m.content }}": "Unexpected end of template",
    "{{ messages[0].content }}": "the chat template leaves out the answer",
    "{{ messages[0].content + 1 }}": "the chat template refuses the turns user, assistant",
}


@pytest.mark.parametrize("template", BROKEN_TEMPLATES)
@pytest.mark.parametrize("as_file", [False, True])
def test_a_template_of_ones_own_is_tried_before_training(template, as_file, tiny, rows, tmp_path):
    (tmp_path / "mine.jinja").write_text(template)
    own = str(tmp_path / "mine.jinja") if as_file else template
    recipe = recipes.find(str(write(tmp_path, tiny, rows, chat_template_jinja=own)))
    checks.refuse_unusable(recipe.config, recipe.where)
    with pytest.raises(WrongInput) as error:
        checks.refuse_unrenderable(recipe)
    assert BROKEN_TEMPLATES[template] in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("mend chat_template_jinja")


def test_rows_that_axolotl_maps_are_not_rendered_as_they_stand(tiny, tmp_path):
    turns = [{"role": "user", "text": "Good?"}, {"role": "assistant", "text": "yes"}]
    data = tmp_path / "chat.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "system", "text": "s"}, *turns]}))
    mapped = {"type": TYPE, "message_property_mappings": {"role": "role", "content": "text"}}
    path = write(tmp_path, tiny, data, datasets=[mapped])
    checks.refuse_unrenderable(recipes.find(str(path)))


def test_a_training_publishes_nothing(tiny, rows, tmp_path):
    recipe = recipes.find(str(write(tmp_path, tiny, rows, hub_model_id="me/mine")))
    config = profiles.merge_config(recipe, profiles.Choice("cpu"))
    assert "hub_model_id" not in config
    changes = profiles.list_changes(recipe, config)
    assert "hub_model_id: me/mine → left out (`make push` publishes a run)" in changes


# ---- what Axolotl's schema makes of a config


def test_code_in_a_folder_is_never_run_and_never_asked_for():
    """transformers asks on the terminal where the argument is missing."""
    calls = []
    for path in [*ROOT.glob("tools/**/*.py"), *ROOT.glob("evals/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            keys = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            # GGUF files, merged models and SmolLM2 are this project's own.
            theirs = "gguf" not in ast.unparse(node) and path.stem not in (
                "gguf",
                "merge",
                "smollm2",
            )
            if node.func.attr == "from_pretrained" and "Auto" in ast.unparse(node.func) and theirs:
                calls.append((path.name, node.lineno, keys.get("trust_remote_code")))
    assert len(calls) > 10 and not [call for call in calls if call[2] != "False"]


LIGER = "axolotl.integrations.liger.LigerPlugin"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"plugins": [LIGER], "liger_rope": True, "debug": None}, ""),
        ({"plugins": [LIGER], "learning_rat": 5}, "no key learning_rat; did you mean"),
        ({"plugins": ["liger.LigerPlugin"], "liger_rope": True}, ""),
        ({"plugins": ["foo.Bar"]}, "the plugin foo.Bar cannot be loaded: No module named 'foo'"),
        ({"plugins": ["sys.exit"]}, "the plugin sys.exit cannot be loaded"),
        ({"fsdp_config": {"fsdp_offload_params": True}}, ""),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling. is no longer supported"),
    ],
)
def test_keys_of_plugins_and_of_old_are_known_and_misspelt_ones_are_found(
    own, message, tiny, rows, tmp_path
):
    config = recipes.find(str(write(tmp_path, tiny, rows))).config | own
    if not message:
        return recipes.validate(config, "mine.yaml")
    with pytest.raises(WrongInput, match=message):
        recipes.validate(config, "mine.yaml")


def test_validation_leaves_a_config_as_it_is(tiny, rows, tmp_path):
    config = recipes.find(str(write(tmp_path, tiny, rows, chat_template_jinja="x"))).config
    before = yaml.safe_dump(config)
    recipes.validate(config, "mine.yaml")
    assert yaml.safe_dump(config) == before


def test_a_number_in_the_way_of_yaml_1_2_is_a_number_as_it_is_for_axolotl(tiny, rows, tmp_path):
    path = write(tmp_path, tiny, rows)
    text = path.read_text().replace("learning_rate: 0.01", "learning_rate: 1e-2")
    path.write_text(text.replace("lora_r: 4", "lora_r: '4'") + "val_set_size: 5e-2\n")
    config = recipes.find(str(path)).config
    assert (config["learning_rate"], config["val_set_size"], config["lora_r"]) == (0.01, 0.05, 4)


TWICE = {
    "top": ("a: 1\nb: 2\na: 3\n", 'x.yaml, line 3: the key "a" is on line 1 already'),
    "nested": ("a:\n- b: 1\n  b: 1\n", 'x.yaml, line 3: the key "b" is on line 2'),
    "flow": ("a: {b: 1, b: 2}\n", 'the key "b"'),
}


@pytest.mark.parametrize(("text", "message"), TWICE.values(), ids=TWICE)
def test_a_key_that_stands_twice_is_named_with_its_lines(text, message):
    with pytest.raises(WrongInput) as error:
        parse_yaml(text, "x.yaml")
    assert message in str(error.value)


def test_merged_mappings_and_anchors_may_repeat_keys():
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\nd: [*a, *a]\n"
    assert parse_yaml(text, "x.yaml")["c"] == {"x": 3, "y": 4}
    with pytest.raises(WrongInput, match="x.yaml, line 2: not YAML"):
        parse_yaml("a: [", "x.yaml")


EXPANDING = "a0: &a0 [1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
UNBOUNDED = {
    "deep lists": ("[" * 100_000, "nested deeper than 100 levels"),
    "deep blocks": ("- " * 100_000, "nested deeper than 100 levels"),
    "aliases of aliases": (EXPANDING, "its aliases expand to over"),
    "a circle": ("a: &a [*a]", "its aliases expand to over"),
    "a date that is none": ("a: 2001-99-99", "not YAML"),
    "a number without end": ("a: " + "1" * 5000, "not YAML"),
}


@pytest.mark.parametrize(("text", "reason"), UNBOUNDED.values(), ids=UNBOUNDED)
def test_yaml_that_would_exhaust_the_process_is_refused(text, reason):
    with pytest.raises(WrongInput, match=f"x.yaml.*{reason}"):
        parse_yaml(text, "x.yaml")


# ---- profiles


@pytest.mark.parametrize("profile", ["cpu", "gpu", "multi_gpu,fsdp", "multi_node"])
@pytest.mark.parametrize(
    "own",
    [
        {"sample_packing": True, "pad_to_sequence_len": True},
        {"optimizer": "lion_8bit", "sample_packing": False},
        {"optimizer": "adafactor", "plugins": ["axolotl.integrations.liger.LigerPlugin"]},
        {"plugins": ["my.Plugin", "tools.train.plugin.RunPlugin"], "liger_rope": False},
        {"fp16": True, "attn_implementation": "eager"},
    ],
    ids=str,
)
def test_no_profile_changes_what_a_config_of_ones_own_learns(own, profile, tiny, rows, tmp_path):
    recipe = recipes.find(str(write(tmp_path, tiny, rows, **own)))
    content = profiles.merge_config(recipe, profiles.Choice(profile))
    for key in ("sample_packing", "pad_to_sequence_len", "liger_rope", "attn_implementation"):
        if key in own:
            assert content[key] == own[key]
    if "optimizer" in own:
        assert content["optimizer"] == own["optimizer"]
    names = content["plugins"]
    assert names.count("tools.train.plugin.RunPlugin") == 1 and len(names) == len(set(names))
    assert names[: len(own.get("plugins", []))] == own.get("plugins", [])


def test_what_a_profile_changes_of_ones_own_keys_is_said(tiny, rows, tmp_path):
    own = {"optimizer": "paged_adamw_8bit", "bf16": "auto", "plugins": ["my.Plugin"]}
    recipe = recipes.find(str(write(tmp_path, tiny, rows, **own, flash_attention=True)))
    lines = profiles.list_changes(recipe, profiles.merge_config(recipe, profiles.Choice("cpu")))
    for message in (
        "optimizer: paged_adamw_8bit → adamw_torch (the same algorithm",
        "bf16: auto → False",
        "plugins: tools.train.plugin.RunPlugin added",
        "flash_attention: True → left out",
    ):
        assert any(line.startswith(message) for line in lines), (message, lines)
    catalogue = recipes.find("sentiment_r4")
    assert (
        profiles.list_changes(catalogue, profiles.merge_config(catalogue, profiles.Choice("cpu")))
        == []
    )


@pytest.mark.slow
def test_gradient_checkpointing_is_turned_on_and_off(tiny, rows, tmp_path):
    path = write(tmp_path, tiny, rows, gradient_checkpointing=True)
    for option, state in (("", "on"), ("no-", "off")):
        done = run("profile", path, f"--{option}gradient-checkpointing", "--profile", "cpu")
        assert f"checkpointing    {state}" in done.stdout, done.stderr
    # As make passes what was typed.
    for value, state in (("1", "on"), ("0", "off"), ("", "off")):
        typed = {"OPTION_GRADIENT_CHECKPOINTING": value, "OPTION_PROFILE": "cpu"}
        done = run("profile", path, **typed)
        assert f"checkpointing    {state}" in done.stdout, done.stderr
    done = run("train", path, OPTION_GRADIENT_CHECKPOINTING="maybe")
    assert done.returncode == 2 and "GRADIENT_CHECKPOINTING: 'maybe' is not" in done.stderr
