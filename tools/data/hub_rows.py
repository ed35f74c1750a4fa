"""Streams the rows of a dataset of the Hub, at a commit that is recorded.

hf:owner/name[/config][@revision][:split]

Files are read through the `datasets` library, which runs no code of the dataset.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from tools.common import JobFailed, WrongInput
from tools.hub_errors import explain_errors

NAME = re.compile(
    r"hf:(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<split>[\w.-]+))?"
)


@dataclass
class HubDataset:
    """A split of a dataset at a commit."""

    name: str
    config: str | None
    revision: str  # a commit
    split: str
    other_splits: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        """The name under which the same rows are read again."""
        config = f"/{self.config}" if self.config else ""
        return f"hf:{self.name}{config}@{self.revision}:{self.split}"

    @cached_property
    def stream(self) -> Any:
        from datasets import load_dataset

        with explain(self.name):
            return load_dataset(
                self.name, self.config, split=self.split, revision=self.revision, streaming=True
            )

    @property
    def schema(self) -> Any:
        features = self.stream.features
        return features.arrow_schema if features else None

    def read_columns(self) -> list[str]:
        if features := self.stream.features:
            return list(features)
        return [key for _, row in islice(self.read(), 1) for key in row]

    def read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with explain(self.name):
            for number, row in enumerate(self.stream, 1):
                yield f"row {number}", row


def find_dataset(source: str) -> HubDataset:
    """The dataset that `hf:…` names, with its commit; a split is chosen where none is named."""
    parts = NAME.fullmatch(source)
    if not parts:
        raise WrongInput(
            f"DATA={source} names no dataset; it is hf:owner/name or hf:owner/name:split"
        )
    from datasets import get_dataset_config_names, get_dataset_split_names
    from huggingface_hub import HfApi

    name, config, split = parts["name"], parts["config"], parts["split"]
    with explain(name):
        revision = HfApi().dataset_info(name, revision=parts["revision"]).sha
        configs = get_dataset_config_names(name, revision=revision)
        if config and config not in configs:
            raise WrongInput(f"{name} has no config {config}; it has {', '.join(configs)}")
        if not config and len(configs) > 1 and "default" not in configs:
            listed = ", ".join(configs[:10])
            raise WrongInput(f"{name} has several configs: {listed}; name one, as hf:{name}/config")
        config = config or ("default" if "default" in configs else configs[0])
        splits = get_dataset_split_names(name, config, revision=revision)
    notes = []
    if not split:
        split = "train" if "train" in splits else splits[0]
        if len(splits) > 1:
            notes.append(f"the split {split} is read, of {', '.join(splits)}")
    if split not in splits:
        raise WrongInput(f"{name} has no split {split}; it has {', '.join(splits)}")
    notes.append(f"{name} at commit {revision}")
    others = [other for other in splits if other != split]
    return HubDataset(name, config if configs[1:] else None, str(revision), split, others, notes)


def name_split(source: str, split: str) -> str:
    """The same dataset at the same commit, another split."""
    return re.sub(r":[\w.-]+$", f":{split}", source)


@contextmanager
def explain(name: str) -> Iterator[None]:
    """Turns what `datasets` and the Hub's client raise into one line."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError, DatasetsError

    try:
        with explain_errors(name):
            try:
                yield
            except (EmptyDatasetError, DataFilesNotFoundError):
                raise WrongInput(f"{name} holds no files of rows that `datasets` reads") from None
    except (WrongInput, JobFailed):
        raise
    except DatasetNotFoundError:
        raise WrongInput(
            f"{name} is not on the Hub, or it is private and the token may not see it"
        ) from None
    except (DatasetsError, OSError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        if "script" in reason:
            raise WrongInput(
                f"{name} is made by code of its owner, which is not run; name a dataset of files"
            ) from None
        raise JobFailed(f"{name}: the Hub's rows cannot be read: {reason}") from None
