"""The space that `make tune` searches: recipes/tune.yaml, or a user's own file like it.

    settings = read_settings(None)
    space = Space(settings.space, recipe.config)
    space.own                            the recipe as a point of the space
    space.apply({"lora_r": 16, …})       the recipe's config at another point

A point holds plain values that Optuna can store; a list of modules is its names in one string.
"""

import math
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tools import recipes
from tools.common import WrongInput, read_yaml, shown

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

DEFAULT = recipes.FOLDER / "tune.yaml"
BATCH = "batch"  # rows per step: the one key that is not Axolotl's
RATE = "learning_rate"
RATE_FACTORS = (1, 2, 4, 0.5)  # of the recipe's learning rate, in the order in which they are tried
# Keys that decide what is compared with what, and cannot differ between candidates.
FIXED = {
    *("base_model", "datasets", "test_datasets", "val_set_size", "seed", "sequence_len"),
    *("max_steps", "num_epochs", "eval_steps", "save_steps", "evals_per_epoch", "saves_per_epoch"),
    *("output_dir", "dataset_prepared_path", "micro_batch_size", "gradient_accumulation_steps"),
    *("load_best_model_at_end", "metric_for_best_model", "early_stopping_patience"),
    *("eval_strategy", "save_strategy", "eval_sample_packing", "eval_batch_size"),
    *("greater_is_better", "logging_steps"),
}
Choice = str | int | float | bool | list[str] | None
Point = dict[str, Any]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Range(Section):
    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def check_order(self) -> Self:
        if not -math.inf < self.low < self.high < math.inf or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 on a logarithmic scale")
        return self


class Validation(Section):
    least: int = Field(ge=2)
    most: int

    @model_validator(mode="after")
    def check_order(self) -> Self:
        if self.least > self.most:
            raise ValueError("least must not be above most")
        return self


class SearchSettings(Section):
    space: dict[str, Range | list[Choice]] = Field(min_length=1)
    validation: Validation
    evaluations: int = Field(ge=2)  # transformers takes 1 / 1 for "at each step"
    reduction: int = Field(ge=2)

    @model_validator(mode="after")
    def check_space(self) -> Self:
        for key, entry in self.space.items():
            if key in FIXED:
                raise ValueError(f"{key} is the same for all candidates; leave it out of the space")
            if isinstance(entry, list):
                if key in recipes.NUMBER_KEYS:
                    entry[:] = map(recipes.parse_number, entry)
                if not all(math.isfinite(n) for n in entry if isinstance(n, float)):
                    raise ValueError(f"{key} needs finite numbers")
            if key == BATCH and not (
                isinstance(entry, list) and all(type(n) is int and n > 0 for n in entry)
            ):
                raise ValueError("batch needs a list of whole numbers: rows per step")
            if isinstance(entry, list) and len(set(map(encode, entry))) < max(1, len(entry)):
                raise ValueError(f"{key} needs at least one choice, and each once")
        return self


def read_settings(path: Path | None) -> SearchSettings:
    """The settings of a search; raises WrongInput that names the file and the key."""
    content = read_yaml(DEFAULT)
    if path:
        if not path.is_file():
            raise WrongInput(f"SPACE={path} is not there; {shown(DEFAULT)} is an example")
        changes = read_yaml(path)
        if not isinstance(changes, dict):
            raise WrongInput(f"SPACE={path}: sections such as those of {shown(DEFAULT)} are needed")
        content |= changes
    try:
        return SearchSettings.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"][:2]))
        message = first["msg"].removeprefix("Value error, ")
        raise WrongInput(
            f"{path or shown(DEFAULT)}: {f'{key}: ' if key else ''}{message}"
        ) from None


def encode(value: Any) -> Any:
    """A value as Optuna stores it."""
    return " ".join(value) if isinstance(value, list) else value


def round_number(number: float) -> float:
    """A number of a range to three digits: more would only be harder to read."""
    return number if isinstance(number, int) else float(f"{number:.3g}")


def is_choice(value: Any) -> bool:
    """Whether a value of a recipe can be one of a list of choices."""
    values = value if isinstance(value, list) else [value]
    kinds: Any = str if isinstance(value, list) else str | int | float | None
    return all(isinstance(part, kinds) for part in values)


def widen(key: str, entry: Range, value: Any) -> Range:
    """A range that holds what the recipe has; raises WrongInput where none can."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise WrongInput(
            f"space: {key} is a range and the recipe has {value}; a list of choices is needed"
        )
    if entry.log and value <= 0:
        raise WrongInput(
            f"space: {key} is a range on a logarithmic scale and the recipe has {value}; leave out "
            "log, or write a list of choices"
        )
    widened = {"low": min(entry.low, value), "high": max(entry.high, value)}
    return entry.model_copy(update=widened)


class Space:
    """The values to try around a recipe's config, which is one of the points."""

    def __init__(self, entries: dict[str, Range | list[Choice]], config: dict[str, Any]):
        self.config, self.own = config, Point()
        self.choices: dict[str, dict[Any, Any]] = {}  # by key: stored value → value of the config
        self.ranges: dict[str, Range] = {}
        for key, entry in entries.items():
            value = self.read_own(key)
            if isinstance(entry, Range):
                self.ranges[key], self.own[key] = widen(key, entry, value), value
                continue
            if not is_choice(value):
                raise WrongInput(
                    f"space: {key} is {value} in the recipe, and only plain values and lists of "
                    "names can be searched; leave it out of the space"
                )
            choices = {encode(choice): self.decode(key, choice) for choice in entry}
            stored = [name for name, choice in choices.items() if choice == value]
            if not stored:
                choices = {encode(value): value} | choices
            self.choices[key], self.own[key] = choices, (stored or [encode(value)])[0]

    def read_own(self, key: str) -> Any:
        if key == BATCH:
            return count_batch(self.config)
        return self.config.get(key)

    def decode(self, key: str, choice: Choice) -> Any:
        if key == "lora_target_modules" and isinstance(choice, list):
            return recipes.fit_modules(recipes.find_base(self.config["base_model"])[1], choice)
        return choice

    def build_distributions(self) -> "dict[str, BaseDistribution]":
        """The space as Optuna takes it."""
        from optuna import distributions

        built: dict[str, BaseDistribution] = {}
        for key in self.own:  # in the order of the file
            if key in self.choices:
                built[key] = distributions.CategoricalDistribution(list(self.choices[key]))
                continue
            entry = self.ranges[key]
            whole = isinstance(entry.low, int) and isinstance(entry.high, int)
            kind = distributions.IntDistribution if whole else distributions.FloatDistribution
            built[key] = kind(entry.low, entry.high, log=entry.log)  # type: ignore[arg-type]
        return built

    def apply(self, point: Point) -> dict[str, Any]:
        """The recipe's config at a point; at its own point, the recipe's config."""
        config = deepcopy(self.config)
        for key, stored in point.items():
            if stored == self.own[key]:
                continue
            value = self.choices[key][stored] if key in self.choices else round_number(stored)
            if key == BATCH:
                # Divides the batch in micro-batches that the recipe's memory is enough for.
                micro = math.gcd(int(value), self.config.get("micro_batch_size") or 1)
                config |= {"micro_batch_size": micro, "gradient_accumulation_steps": value // micro}
            elif value is None:
                config.pop(key, None)
            else:
                config[key] = value
            if key == "lora_target_modules":
                config.pop("lora_target_linear", None)
        return config

    def list_first(self) -> list[Point]:
        """What is tried first: the recipe, then the same at other learning rates of a range.

        A step takes as long at any rate, so these need no probe.
        """
        if not (entry := self.ranges.get(RATE)):
            return [self.own]
        rates = [factor * self.own[RATE] for factor in RATE_FACTORS]
        return [self.own | {RATE: rate} for rate in rates if entry.low <= rate <= entry.high]

    def list_extremes(self) -> list[Point]:
        """Points that hold each choice, and both ends of each range, one at a time."""
        ends = {key: [entry.low, entry.high] for key, entry in self.ranges.items()}
        values = {key: list(choices) for key, choices in self.choices.items()} | ends
        return [self.own | {key: value} for key, row in values.items() for value in row]


def count_batch(config: dict[str, Any]) -> int:
    """Rows of an optimizer step."""
    micro = config.get("micro_batch_size") or 1
    return int(micro * (config.get("gradient_accumulation_steps") or 1))
