"""The keys of an Axolotl config that this project reads before Axolotl's schema does.

    check_keys(config, "my.yaml")       WrongInput where one has another type, or is out of range

Axolotl's own schema takes seconds to import, and `make plan` has no need of the rest of it. Numbers
may be written as texts, which `tools.recipes` has made numbers before.
"""

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from tools.common import WrongInput


def refuse_truth(value: Any) -> Any:
    """The value; raises ValueError for true and false, which are numbers in Python."""
    if isinstance(value, bool):
        raise ValueError("it must be a number")
    return value


def check_expression(names: Any) -> Any:
    """The value; raises ValueError for a text that is no regular expression."""
    try:
        re.compile(names if isinstance(names, str) else "")
    except re.error as error:
        raise ValueError(f"a regular expression is needed ({error})") from None
    return names


Number = Annotated[float, BeforeValidator(refuse_truth), Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(refuse_truth), Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(refuse_truth), Field(gt=0)]
Whole = Annotated[int, BeforeValidator(refuse_truth)]
Layer = Annotated[int, Field(strict=True, ge=0)]
Names = Annotated[str | list[str], AfterValidator(check_expression)]
Options = dict[str, Any]
OF_PYDANTIC = ("str", "list[str]", "[key]")  # parts of a place that are no keys


class Keys(BaseModel):
    model_config = ConfigDict(extra="allow")


class Dataset(Keys):
    path: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    chat_template_jinja: str | None = None
    shards: Count | None = None


class Peft(Keys):
    loftq_config: Options | None = None


class ConfigKeys(Keys):
    base_model: str
    datasets: list[Dataset]
    test_datasets: list[Dataset] | None = None
    output_dir: str | None = None
    chat_template: str | None = None
    chat_template_jinja: str | None = None
    chat_template_kwargs: Options | None = None
    special_tokens: Options | None = None
    tokens: list[str] | None = None
    plugins: list[str] | None = None
    bnb_config_kwargs: Options | None = None
    fsdp_config: Options | None = None
    gradient_checkpointing_kwargs: Options | None = None
    peft: Peft | None = None
    peft_layers_to_transform: list[Layer] | None = None
    lora_target_modules: Names | None = None
    lora_modules_to_save: str | list[str] | None = None
    lora_rank_pattern: dict[Annotated[str, AfterValidator(check_expression)], Count] | None = None
    lora_r: Count | None = None
    lora_alpha: Number | None = None
    learning_rate: Number | None = None
    num_epochs: Number | None = None
    max_steps: Whole | None = None
    sequence_len: Count | None = None
    micro_batch_size: Count | None = None
    gradient_accumulation_steps: Count | None = None
    val_set_size: Share | None = None
    weight_decay: Share | None = None
    seed: Whole | None = None


def check_keys(config: dict[Any, Any], where: str) -> None:
    """Raises WrongInput that names the first key whose value is of another type or out of range."""
    try:
        ConfigKeys.model_validate(config)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    else:
        return
    value = str(first["input"])[:60]
    if first["type"] == "invalid_key":
        raise WrongInput(f"{where}: the key {value} is no text for YAML; put it in quotes")
    key = ".".join(str(part) for part in first["loc"] if part not in OF_PYDANTIC)
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] != "value_error":
        reason = (
            reason.partition(",")[0].partition(" or instance")[0].replace("Input should", "it must")
        )
    raise WrongInput(f"{where}: {key}: {reason}, not {value}")
