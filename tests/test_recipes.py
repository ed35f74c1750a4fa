"""The catalogue is what its tables give, is FinLoRA's to the number, and has no misspelt key."""

import shutil
import types
import typing
from copy import deepcopy

import pytest
import yaml

from tools import recipes
from tools.common import ROOT, WrongInput
from tools.config_keys import ConfigKeys

# FinLoRA's settings, as its repository has them (not read from recipes/matrix.yaml).
FINLORA = {
    "base_model": "meta-llama/Llama-3.1-8B-Instruct",
    "learning_rate": 1e-4,
    "lr_scheduler": "cosine",
    "warmup_steps": 10,
    "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj"],
    "sequence_len": 4096,
    "sample_packing": False,
    "gradient_checkpointing": True,
    "weight_decay": 0,
    "special_tokens": {"pad_token": "<|end_of_text|>"},
}
# Epochs, micro-batch, gradient accumulation.
TASKS = {
    **dict.fromkeys(("sentiment", "headline", "ner", "general_multi"), (4, 8, 2)),
    "finer": (4, 1, 8),
    "xbrl_extract": (1, 1, 8),
    "financebench": (4, 1, 2),
    **dict.fromkeys(("formula", "xbrl_term"), (1, 4, 2)),
    "cfa": (4, 4, 2),
}
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
EIGHT = {"adapter": "lora", "lora_r": 8, "load_in_8bit": True, "optimizer": "adamw_bnb_8bit"}
METHODS = {
    "4bits_r4": {
        **{"adapter": "qlora", "lora_r": 4, "load_in_4bit": True, "bnb_config_kwargs": NF4},
        "optimizer": "paged_adamw_8bit",
    },
    "8bits_r8": EIGHT,
    "8bits_r8_dora": EIGHT | {"peft_use_dora": True},
    "8bits_r8_dora_a32": EIGHT | {"peft_use_dora": True},
    "8bits_r8_rslora": EIGHT | {"peft_use_rslora": True},
    "fp16_r8": {**{"adapter": "lora", "lora_r": 8, "optimizer": "adamw_bnb_8bit"}},
}
# What a method may set; where it is not named above, it must be absent.
OF_METHODS = {
    *("adapter", "lora_r", "load_in_4bit", "load_in_8bit", "bnb_config_kwargs", "optimizer"),
    *("peft_use_dora", "peft_use_rslora"),
}
SMALL = {"base_model": "m", "datasets": [{"path": "rows.jsonl"}], "output_dir": "runs/x"}


def write(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_llama_recipe_has_finloras_numbers(task, method):
    recipe = recipes.find(f"{task}_llama_3_1_8b_{method}")
    epochs, batch, accumulation = TASKS[task]
    numbers = {"num_epochs": epochs, "micro_batch_size": batch}
    expected = FINLORA | numbers | {"gradient_accumulation_steps": accumulation}
    expected |= {"lora_alpha": 32 if method.endswith("_a32") else 16}
    assert {key: recipe.config.get(key) for key in expected} == expected
    of_method = {key: value for key, value in recipe.config.items() if key in OF_METHODS}
    assert of_method == METHODS[method]
    (train,), (val,) = recipe.config["datasets"], recipe.config["test_datasets"]
    assert train["path"] == f"data/chat/{task}_train.jsonl"
    assert val == train | {"path": f"data/chat/{task}_val.jsonl"}
    assert "val_set_size" not in recipe.config


NAMES = {
    "sentiment_r4": "llama-3.1-8b/sentiment_r4",
    "llama-3.1-8b/sentiment_r4": "llama-3.1-8b/sentiment_r4",
    "smollm2-135m/sentiment_r8_dora": "smollm2-135m/sentiment_r8_dora",
    "sentiment_llama_3_1_8b_8bits_r8_rslora": "llama-3.1-8b/sentiment_r8_rslora",
    "sentiment_llama_3_1_8b_fp16_r8": "llama-3.1-8b/sentiment_r8_fp16",
    "sentiment_llama_3_1_8b_8bits_r8_dora_a32": "llama-3.1-8b/sentiment_r8_dora_a32",
    "recipes/qwen3-4b/sentiment_qlora_all.yaml": "qwen3-4b/sentiment_qlora_all",
}
WITHOUT_FILE = [
    *("qwen3-8b/ner_r8_dora", "recipes/qwen3-8b/ner_r8_dora.yaml"),
    str(ROOT / "recipes/qwen3-8b/ner_r8_dora.yaml"),
]


@pytest.mark.parametrize(("typed", "name"), NAMES.items())
def test_a_recipe_is_found_by_each_of_its_names(typed, name):
    recipe = recipes.find(typed)
    assert (recipe.name, recipe.task) == (name, "sentiment")
    assert recipe.path == ROOT / "recipes" / f"{name}.yaml"


@pytest.mark.parametrize("typed", WITHOUT_FILE)
def test_a_recipe_without_a_file_is_found_and_named_like_any_other(typed):
    recipe = recipes.find(typed)
    assert (recipe.name, recipe.path) == ("qwen3-8b/ner_r8_dora", None)
    assert (recipe.where, recipe.task, recipe.version) == (recipe.name, "ner", "1.1.0")
    assert recipe.run.folder == ROOT / "runs/qwen3-8b/ner_r8_dora"


@pytest.mark.parametrize(
    "before", ["smollm2-135m/sentiment_r4_all", "SmolLM2-135m/sentiment_r4_all", "sentiment_r4_all"]
)
def test_a_name_that_a_recipe_had_before_goes_on_working(before):
    assert recipes.find(before).name == "smollm2-135m/sentiment_tuned"


def test_no_former_name_is_that_of_another_recipe():
    renamed = recipes.read_matrix()["renamed"]
    assert renamed and not renamed.keys() & recipes.list_names().keys()
    assert set(renamed.values()) <= recipes.list_names().keys()


@pytest.mark.parametrize("name", ["llama-3.1-8b/ner_r8_dora", "smollm2-135m/sentiment_tuned"])
def test_a_recipe_is_the_same_with_its_file_and_without(name, tmp_path, monkeypatch):
    """What a recipe is, its digest and version do not come from its file."""
    file = recipes.find(name)
    assert file.path == ROOT / "recipes" / f"{name}.yaml"
    shutil.copy(recipes.FOLDER / "matrix.yaml", tmp_path)
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    recipes.clear_caches()
    try:
        table = recipes.find(name)
    finally:
        monkeypatch.undo()
        recipes.clear_caches()
    assert table.path is None
    assert (table.config, table.digest, table.version) == (file.config, file.digest, file.version)


def test_a_config_that_a_caller_changes_leaves_the_tables_as_they_are():
    name = "qwen3-8b/ner_r8_dora"
    config = recipes.find(name).config
    config["lora_target_modules"].append("o_proj")
    config["datasets"][0]["roles_to_train"].append("user")
    config["special_tokens"]["pad_token"] = "x"
    assert recipes.find(name).config != config
    assert recipes.find(name).config["test_datasets"][0]["roles_to_train"] == ["assistant"]


def test_a_users_own_file_goes_before_the_catalogues(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "LOCAL", tmp_path)
    recipes.clear_caches()
    (tmp_path / "qwen3-8b").mkdir()
    own = tmp_path / "qwen3-8b" / "ner_r8_dora.yaml"
    write(own, recipes.build_config("qwen3-8b/ner_r8_dora") | {"lora_r": 12})
    try:
        assert recipes.find("qwen3-8b/ner_r8_dora").config["lora_r"] == 12
        assert recipes.find(str(own)).name == "qwen3-8b/ner_r8_dora"
    finally:
        recipes.clear_caches()


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("sentimnet_r4", "sentiment_r4"),
        ("smollm2/sentiment_r8", "smollm2-135m/sentiment_r8"),
        ("sentiment_llama_3_1_8b_4bits_r8", "sentiment_llama_3_1_8b_8bits_r8"),
        ("../recipes/llama-3.1-8b/sentiment_r4", "llama-3.1-8b/sentiment_r4"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(typed, near):
    with pytest.raises(WrongInput) as error:
        recipes.find(typed)
    problem, _, hint = str(error.value).partition("; did you mean ")
    assert problem == f'unknown recipe "{typed}"'
    assert near in hint.rstrip("?").split(", ")


@pytest.mark.parametrize("typed", ["", "zzzzzz"])
def test_where_nothing_is_near_the_list_is_named(typed):
    with pytest.raises(WrongInput, match="`make recipes` lists what there is"):
        recipes.find(typed)


def test_a_recipe_of_ones_own_is_found_by_its_path(tmp_path):
    path = write(tmp_path / "mine.yaml", "# Version: 2.1 (0123456789ab)\n" + yaml.safe_dump(SMALL))
    recipe = recipes.find(path)
    assert (recipe.config, recipe.version, recipe.task) == (SMALL, "2.1", None)


BROKEN = {
    "not YAML": ("base_model: m\ndatasets: [\noutput_dir: }\n", "line 3: not YAML"),
    "a list": ("- a\n- b\n", "a mapping of Axolotl options is needed"),
    "empty": ("", "a mapping of Axolotl options is needed"),
    "no base": ({**SMALL, "base_model": None}, 'the key "base_model" is missing'),
    "no data": ({**SMALL, "datasets": []}, 'the key "datasets" is missing'),
    "no path": (
        {**SMALL, "datasets": [{"path": None}]},
        "datasets.0.path: it must be a valid string, not None",
    ),
    "an empty path": (
        {**SMALL, "datasets": [{"path": " "}]},
        "datasets.0.path: String should have at least 1 character",
    ),
    "a file": (
        {**SMALL, "test_datasets": "x.jsonl"},
        "test_datasets: it must be a valid list, not x.jsonl",
    ),
    "a plugin": (
        {**SMALL, "plugins": "axolotl.x"},
        "plugins: it must be a valid list, not axolotl.x",
    ),
    "numbers of plugins": (
        {**SMALL, "plugins": [3]},
        "plugins.0: it must be a valid string, not 3",
    ),
    "a layer": (
        {**SMALL, "peft_layers_to_transform": 3},
        "peft_layers_to_transform: it must be a valid list, not 3",
    ),
    "yes": (
        {**SMALL, "bnb_config_kwargs": True},
        "bnb_config_kwargs: it must be a valid dictionary, not True",
    ),
    "a list of ranks": (
        {**SMALL, "lora_rank_pattern": [1]},
        "lora_rank_pattern: it must be a valid dictionary, not [1]",
    ),
    "a list for peft": ({**SMALL, "peft": ["a"]}, "peft: it must be a valid dictionary, not ['a']"),
    "a pattern": (
        {**SMALL, "lora_target_modules": "q_(proj"},
        "lora_target_modules: a regular expression is needed (missing",
    ),
    "rank 0": ({**SMALL, "lora_r": 0}, "lora_r: it must be greater than 0, not 0"),
    "epochs": ({**SMALL, "num_epochs": -1}, "num_epochs: it must be greater than 0, not -1"),
    "a share": (
        {**SMALL, "val_set_size": -0.1},
        "val_set_size: it must be greater than or equal to 0, not -0.1",
    ),
    "infinity": (
        {**SMALL, "learning_rate": float("inf")},
        "learning_rate: it must be a finite number, not inf",
    ),
    "a folder": ({**SMALL, "output_dir": 5}, "output_dir: it must be a valid string, not 5"),
    "templates": (
        {**SMALL, "chat_template_jinja": ["x"]},
        "chat_template_jinja: it must be a valid string, not ['x']",
    ),
    "a seed": ({**SMALL, "seed": "abc"}, "seed: it must be a valid integer, not abc"),
    "half a rank": ({**SMALL, "lora_r": 8.5}, "lora_r: it must be a valid integer, not 8.5"),
    "a number of modules": (
        {**SMALL, "lora_target_modules": 5},
        "lora_target_modules: it must be a valid string, not 5",
    ),
    "saved": (
        {**SMALL, "lora_modules_to_save": True},
        "lora_modules_to_save: it must be a valid string, not True",
    ),
    "layers": (
        {**SMALL, "peft_layers_to_transform": ["3"]},
        "peft_layers_to_transform.0: it must be a valid integer, not 3",
    ),
    "ranks": (
        {**SMALL, "lora_rank_pattern": {"q_proj": "x"}},
        "lora_rank_pattern.q_proj: it must be a valid integer, not x",
    ),
    "a pattern of ranks": (
        {**SMALL, "lora_rank_pattern": {"(": 4}},
        "lora_rank_pattern.(: a regular expression is needed (missing",
    ),
    "loftq": (
        {**SMALL, "peft": {"loftq_config": 4}},
        "peft.loftq_config: it must be a valid dictionary, not 4",
    ),
    "on": (f"{yaml.safe_dump(SMALL)}on: 1\n", "the key True is no text for YAML"),
    "a date": (f"{yaml.safe_dump(SMALL)}since: 2024-01-01\n", "2024-01-01 is a date for YAML"),
    "a long number": (SMALL | {"lora_r": -(10**400)}, "lora_r: it must be greater than 0"),
    "a truth": (
        {**SMALL, "micro_batch_size": True},
        "micro_batch_size: it must be a number, not True",
    ),
}


def test_true_and_false_in_quotes_are_what_they_are_for_axolotl(tmp_path):
    content = {**SMALL, "sample_packing": "false", "lora_target_linear": "True"}
    config = recipes.find(write(tmp_path / "mine.yaml", yaml.safe_dump(content))).config
    assert config["sample_packing"] is False and config["lora_target_linear"] is True


def test_keys_that_are_read_before_the_schema_have_its_types():
    from axolotl.utils.schemas.config import AxolotlInputConfig

    for key, field in ConfigKeys.model_fields.items():
        allowed = list_kinds(AxolotlInputConfig.model_fields[key].annotation)
        own = list_kinds(field.annotation)
        if "int" in own or "float" in own:  # a text becomes a number first
            own |= {"int", "float", "str"}
        assert allowed <= own | {"NoneType"}, (key, allowed, own)


def list_kinds(annotation):
    """The names of the types that an annotation allows; a pydantic model is a mapping."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return list_kinds(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(list_kinds, typing.get_args(annotation)))
    if origin is typing.Literal:
        return {type(value).__name__ for value in typing.get_args(annotation)}
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, str):  # an enumeration of texts
        return {"str"}
    return {"dict" if hasattr(kind, "model_fields") else kind.__name__}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_recipe_is_named_with_what_is_wrong(tmp_path, content, message):
    path = write(tmp_path / "mine.yaml", content)
    with pytest.raises(WrongInput) as error:
        recipes.find(path)
    assert path in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recipe_file_that_is_missing_or_not_utf_8_is_named(tmp_path):
    with pytest.raises(WrongInput, match="nowhere.yaml is not there"):
        recipes.find(str(tmp_path / "nowhere.yaml"))
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"base_model: \xff\n")
    with pytest.raises(WrongInput, match="mine.yaml: not UTF-8 at byte 13"):
        recipes.find(str(path))


def digest(**changed):
    config = recipes.find("sentiment_r4").config | changed
    return recipes.Recipe("x", ROOT / "x.yaml", config, "1").digest


@pytest.mark.parametrize("key", [*recipes.RUNTIME_KEYS, *recipes.OUTPUT_KEYS])
def test_the_digest_is_the_same_wherever_things_lie(key):
    assert digest(**{key: "elsewhere"}) == digest()


DATA = recipes.find("sentiment_r4").config["datasets"][0]
LEARNED = [
    *({"lora_r": 5}, {"learning_rate": 2e-4}, {"seed": 1}, {"lora_target_modules": ["q_proj"]}),
    {"test_datasets": [DATA | {"path": "data/chat/ner_val.jsonl"}]},
    {"datasets": [DATA | {"path": "data/chat/ner_train.jsonl"}]},
    {"datasets": [DATA | {"train_on_eos": "all"}]},
]


@pytest.mark.parametrize("changed", LEARNED, ids=str)
def test_the_digest_changes_with_what_is_learned(changed):
    assert digest(**changed) != digest()


def test_the_digest_does_not_depend_on_the_folder_of_the_rows():
    for key, side in (("datasets", "train"), ("test_datasets", "val")):
        moved = DATA | {"path": f"/else/where/sentiment_{side}.jsonl"}
        assert digest(**{key: [moved]}) == digest()


# ---- keys that Axolotl's schema does not know


DATASET = {"path": "a", "type": "chat_template"}
UNKNOWN = {
    "a misspelt key": ({"lora_rank": 4}, "lora_rank; did you mean "),
    "a key of nothing": ({"zzz": 1}, "zzz"),
    "in a list": (
        {"datasets": [DATASET, DATASET | {"roles_to_trian": ["user"]}]},
        "datasets[1].roles_to_trian; did you mean roles_to_train",
    ),
    "in a mapping": (
        {"peft": {"loftq_config": {"loftq_bitz": 4}}},
        "peft.loftq_config.loftq_bitz; did you mean loftq_bits",
    ),
}


@pytest.mark.parametrize(("change", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_misspelt_key_is_refused_at_any_depth_although_axolotl_takes_it(change, message):
    from axolotl.utils.schemas.config import AxolotlInputConfig

    config = recipes.find("sentiment_r4").config | change
    AxolotlInputConfig.model_validate(deepcopy(config))
    with pytest.raises(WrongInput) as error:
        recipes.validate(config, "mine.yaml")
    assert str(error.value).startswith(f"mine.yaml: Axolotl has no key {message}")


def test_keys_of_each_permitted_kind_of_dataset_and_wrong_values_are_told_apart():
    config = recipes.find("sentiment_r4").config
    pretraining = {"path": "a", "type": "completion", "field": "text"}
    other = {"datasets": [DATASET, pretraining], "model_type": "AutoModelForCausalLM"}  # an alias
    recipes.validate(config | other, "mine.yaml")
    with pytest.raises(WrongInput, match=r"^mine.yaml: lora_r: "):
        recipes.validate(config | {"lora_r": "four"}, "mine.yaml")
