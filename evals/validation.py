"""Scores a model on validation rows as its test rows are scored, while it is still being trained.

    scorer = find_scorer("sentiment", Path("data/chat/sentiment_val.jsonl"))
    scorer.score(model, tokenizer, None)["accuracy"]["value"]

The rule is that of the task's evaluation: prompt, answer budget, filter and metric. Test rows are
not read.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals import report, run, stats
from evals.answers import Prompts
from tools import sources
from tools.common import WrongInput, shown

# What of a task file decides how a row is asked and scored.
RULE = ("doc_to_text", "process_results", "filter_list", "generation_kwargs", "metric_list")


@contextmanager
def keep_random_state() -> Iterator[None]:
    """Leaves the random numbers that a training draws as they are."""
    import random

    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])


@dataclass(frozen=True)
class Scorer:
    """Scores answers to the chat rows of a file by the rule of a dataset."""

    dataset: str
    rows: Path

    @property
    def metric(self) -> str:
        """The first metric of the dataset, as it is reported."""
        return list_metrics(self.dataset)[0]

    def answer(self, lm: Any, options: dict[str, Any] | None) -> list[dict[str, Any]]:
        """The rows with the values of their metrics. lm: any model of lm-eval."""
        task = run.load_task(self.dataset, self.rows)
        numbers = list(range(len(task.test_docs())))
        return run.measure_task(lm, task, numbers, Prompts("chat", options))[0]

    def score(
        self, model: Any, tokenizer: Any, options: dict[str, Any] | None
    ) -> dict[str, dict[str, Any]]:
        """Each metric of a loaded model with its interval, and the values and clusters of its rows.

        `options` are the arguments of the chat template. The model is left in evaluation mode.
        """
        from evals.model import Model

        with keep_random_state():
            count = sum(1 for _ in open(self.rows, "rb"))  # noqa: SIM115
            lm = Model(model, tokenizer, f"{self.dataset}, validation:", count)
            rows = self.answer(lm, options)
        scores = {}
        for metric in list_metrics(self.dataset):
            (values,), clusters = report.select_shared(metric, [{"predictions": rows}])
            if values:  # BERTScore is left out where its model is missing
                score = stats.estimate(metric, values, clusters)
                scores[metric] = score | {"values": values, "clusters": clusters}
        return scores


def list_metrics(dataset: str) -> list[str]:
    return [entry["metric"] for entry in run.read_tasks()[dataset]["metric_list"]]


def list_task_metrics(task: str | None) -> list[str]:
    """The metrics that the datasets of a task are scored by, each once."""
    names = sources.tables()["tasks"].get(task or "", {}).get("eval", [])
    present = (name for name in names if name in run.read_tasks())
    return list(dict.fromkeys(metric for name in present for metric in list_metrics(name)))


def explain_unavailable(metric: str) -> str:
    """Why the model that a metric needs is missing; "" where the metric can be computed."""
    from evals.tasks import utils

    try:
        if metric in utils.CORPUS:
            utils.CORPUS[metric]([])
    except utils.Unavailable as error:
        return f"{metric} is {error}"
    return ""


def find_scorer(task: str | None, rows: Path) -> Scorer:
    """The scorer of a task's validation rows; raises WrongInput where no single rule fits them.

    A rule fits where it counts every expected answer as right. Datasets of one task may have
    several rules (seven levels of sentiment, or three); where several fit, which is meant is open.
    """
    spec = sources.tables()["tasks"].get(task or "", {})
    reason = f"{shown(rows)} belongs to no task of the tables"
    if "parts" in spec:
        reason = f"{task} is several tasks, and each has a metric of its own"
    elif spec:
        fitting: dict[str, Scorer] = {}
        for name in spec["eval"]:
            scorer = Scorer(name, rows)
            if name in run.read_tasks() and is_fitting(scorer):
                content = run.read_tasks()[name]
                rule = json.dumps({key: content.get(key) for key in RULE}, sort_keys=True)
                fitting.setdefault(rule, scorer)
        if len(fitting) == 1:
            return next(iter(fitting.values()))
        names = ", ".join(scorer.dataset for scorer in fitting.values())
        reason = f"the evaluations of {task} have several rules for such rows ({names})"
        if not fitting:
            reason = f"no evaluation of {task} counts all expected answers in {shown(rows)} right"
    raise WrongInput(f"no metric scores the validation rows: {reason}; the loss can judge them")


def is_fitting(scorer: Scorer) -> bool:
    """Whether a rule counts each row's own key as right."""
    from lm_eval.api.model import LM

    from evals.tasks import utils

    class Key(LM):  # type: ignore[misc]
        """Answers each row with its key."""

        tokenizer, tokenizer_name = None, "key"

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [utils.key(request.doc) for request in requests]

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return chat_history[-1]["content"]

        def loglikelihood(self, requests: list[Any]) -> Any:
            raise NotImplementedError("a key has no probability")

        loglikelihood_rolling = loglikelihood

    rows = scorer.answer(Key(), None)
    computed = {name for row in rows for name in row["values"]}  # BERTScore may be left out
    metric = next((name for name in list_metrics(scorer.dataset) if name in computed), "")
    values = (row["values"].get(metric, 0.0) for row in rows)
    return all(
        math.isclose(value, 1, abs_tol=1e-4)
        if isinstance(value, float | int)
        else all(a == b for a, b in value)
        for value in values
    )
