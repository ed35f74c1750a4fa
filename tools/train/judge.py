"""Judges a training on its validation rows: the loss of each row, and the task's metric.

A config whose `metric_for_best_model` is a metric of the task's evaluation, such as
`eval_accuracy`, gets it: at each evaluation the model answers the validation rows, and the answers
are scored as `make eval` scores them. transformers then finds the best checkpoint by it, and stops
early. Of a search (tools/train/tune.py), each evaluation adds a line to `validation.jsonl`.
"""

import hashlib
import json
import math
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from evals.validation import Scorer, find_scorer
from tools import models, recipes
from tools.common import ROOT, WrongInput, atomic, json_lines
from tools.runs import Run
from tools.train.callbacks import Stopped
from tools.train.checks import name_metric


class Judge(TrainerCallback):
    """Adds scores to a trainer's evaluations, and writes `validation.jsonl` where it `records`."""

    def __init__(self, cfg: Any, trainer: Any, run: Run):
        self.trainer, self.run = trainer, run
        self.records, self.metric = bool(cfg.record_validation), name_metric(cfg)
        self.losses: dict[str, float] = {}  # by row
        self.scorer: Scorer | None = None
        if self.metric:
            config = run.config
            self.options = config.get("chat_template_kwargs")
            self.tokenizer = models.load_tokenizer(config)
            self.tokenizer.padding_side = "left"
            (entry,) = config["test_datasets"]
            rows = (ROOT / entry["path"]).resolve()
            try:
                self.scorer = find_scorer(recipes.find_task(config), rows)
            except WrongInput as error:
                raise Stopped(str(error)) from None
        self.evaluate, self.predict = trainer.evaluation_loop, trainer.prediction_step
        trainer.evaluation_loop = self.evaluation_loop
        if self.records:
            trainer.prediction_step = self.prediction_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.records:
            # Axolotl sets it. Before the first step, all candidates of a search are the base.
            args.eval_on_start = False
            # Without a line that a full disk or a kill left unfinished.
            lines = json_lines(self.run.validation_file)
            with atomic(self.run.validation_file) as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        # transformers forgets how many evaluations in a row were no better before an interruption.
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and state.global_step:
                saved = state.stateful_callbacks["EarlyStoppingCallback"]["attributes"]
                callback.early_stopping_patience_counter = saved["early_stopping_patience_counter"]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.records and state.global_step >= state.max_steps:
            control.should_evaluate = True

    def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        # A search evaluates row by row. Their order may be random, so a row is known by its tokens.
        tokens = inputs["input_ids"].cpu().numpy().tobytes()
        number = len(self.losses)
        output = self.predict(model, inputs, *arguments, **options)
        key = hashlib.blake2b(tokens, digest_size=8).hexdigest()
        self.losses[f"{key}-{number}"] = float(output[0])
        return output

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        self.losses.clear()
        output, scores = self.evaluate(*arguments, **options), {}
        state, trainer = self.trainer.state, self.trainer
        if self.scorer:
            model = trainer.accelerator.unwrap_model(trainer.model)
            scores = self.scorer.score(model, self.tokenizer, self.options)
            output.metrics[f"eval_{self.metric}"] = scores[self.metric]["value"]
        if self.records and math.isfinite(output.metrics["eval_loss"]):
            line = {
                "step": state.global_step,
                "steps": state.max_steps,
                "loss": output.metrics["eval_loss"],
                "losses": [self.losses[key] for key in sorted(self.losses)],
                "scores": scores,
            }
            with open(self.run.validation_file, "a") as file:
                file.write(json.dumps(line) + "\n")
        return output
