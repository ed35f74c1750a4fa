"""The search behind `make tune`: proposes candidates, trains them, and finds the winner.

    search = Search(recipe, request, "cpu", read_settings(None))
    search.open()
    search.run(show)                 # trains until the budget is spent
    search.confirm()                 # the winner with another seed

Optuna keeps its study in `search.log` beside the trainings, so that an interrupted search goes on:
a training from its last checkpoint, the search with the next candidate.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any, Literal

from evals import stats
from evals.run import SCORING
from tools import recipes
from tools.common import (
    ROOT,
    JobFailed,
    WrongInput,
    atomic,
    read_json,
    run_in_child,
    shown,
    write_json,
)
from tools.recipes import Recipe
from tools.runs import Run
from tools.train import checks, launch
from tools.train.hardware import detect_host
from tools.train.heldout import Division, hold_out
from tools.train.space import Point, SearchSettings, Space, count_batch
from tools.train.trial import PROBED_STEPS, Candidate, Measures, measure_speed, train_candidate

FOLDER = ROOT / "runs" / ".tune"
# Of a point, what does not change how long a step takes.
FREE = {"learning_rate", "lora_alpha", "lr_scheduler", "warmup_steps", "warmup_ratio"}
FREE |= {"weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "loraplus_lr_ratio"}
MOST_STEPS = 20  # times the recipe's: a probe that was fast by chance must not train for ever
Report = dict[str, Any]


@dataclass(frozen=True)
class SearchRequest:
    """What a user asks a search for; it ends at `minutes` or `trials`, whichever comes first."""

    minutes: float | None = None
    trials: int | None = None
    equal: Literal["time", "steps"] = "time"
    judge: Literal["loss", "metric"] = "loss"
    space: Path | None = None
    profile: str | None = None


def say(text: str) -> None:
    print(f"tune       {text}", flush=True)


def name_search(recipe: Recipe) -> str:
    """The recipe's name, or that of its file, as part of a path."""
    return Path(recipe.name).stem if recipe.name.endswith((".yaml", ".yml")) else recipe.name


def name_metric_of_rows(task: str | None, rows: Path) -> str:
    from evals.validation import explain_unavailable, find_scorer

    metric = find_scorer(task, rows).metric
    if reason := explain_unavailable(metric):
        raise WrongInput(f"JUDGE=metric: {reason}, or the loss can judge")
    return metric


def mend_log(file: Path) -> None:
    """Removes a damaged last line of Optuna's log: a crash may cut one, and Optuna appends to it.

    Raises WrongInput where another line is damaged.
    """
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            is_whole = line.endswith(b"\n") and "op_code" in json.loads(line)
        except (ValueError, TypeError):
            is_whole = False
        if not is_whole and number < len(lines):
            raise WrongInput(
                f"{shown(file)}, line {number}: damaged; move {shown(file.parent)} away, and the "
                "search starts afresh"
            )
        if not is_whole:
            with atomic(file) as mended:
                mended.writelines(lines[:-1])


# ---- figures of a training


def measure_half_width(evaluation: Report, metric: str) -> float | None:
    """Half of the 95 % interval of what judges; None where there is none."""
    if metric:
        score = evaluation["scores"][metric]
        return (score["high"] - score["low"]) / 2 if "low" in score else None
    losses = evaluation["losses"]
    return 1.96 * stdev(losses) / math.sqrt(len(losses))


def read_value(evaluation: Report, metric: str) -> float:
    return float(evaluation["scores"][metric]["value"] if metric else evaluation["loss"])


def list_values(evaluation: Report, metric: str) -> list[Any]:
    """What each row contributes, in an order that is the same for all candidates."""
    return list(evaluation["scores"][metric]["values"] if metric else evaluation["losses"])


@dataclass(frozen=True)
class Judged:
    """The evaluation of a training that counts: its last, or its best where the recipe says so."""

    evaluation: Report
    metric: str

    @property
    def value(self) -> float:
        return read_value(self.evaluation, self.metric)

    def describe(self) -> Report:
        half = measure_half_width(self.evaluation, self.metric)
        return {"value": self.value, "half_width": half, "steps": self.evaluation["steps"]}

    def compare(self, other: "Judged") -> Report:
        """What `other` gains over this on the same rows, with its interval."""
        ours, theirs = (list_values(side.evaluation, self.metric) for side in (self, other))
        scores = self.evaluation["scores"][self.metric] if self.metric else {}
        comparison = stats.compare(self.metric or "loss", ours, theirs, scores.get("clusters"))
        return {key: comparison.get(key) for key in ("value", "low", "high", "p")}


def keeps_best(config: dict[str, Any]) -> bool:
    """Whether a run is its best checkpoint: Axolotl's default where each evaluation is saved."""
    saves, evaluates = config.get("save_steps"), config.get("eval_steps")
    is_off = config.get("load_best_model_at_end") is False
    return bool(saves and evaluates and saves % evaluates == 0 and not is_off)


# ---- the search


class Search:
    """A search of one recipe; `study` is Optuna's, on the disk."""

    def __init__(
        self, recipe: Recipe, request: SearchRequest, profile: str, settings: SearchSettings
    ):
        self.recipe, self.request, self.profile, self.settings = recipe, request, profile, settings
        self.name = name_search(recipe)
        self.folder = FOLDER / self.name
        self.space = Space(settings.space, recipe.config)
        self.seed = recipe.seed
        self.has_best = keeps_best(recipe.config)

    def open(self) -> None:
        """Divides the rows and opens the study, a new one where anything changed."""
        identity = self.identify()
        record = Run(self.folder).identity_file
        before = read_json(record) if record.is_file() else identity
        if before.get("recipe") not in (None, identity["recipe"]):
            raise WrongInput(
                f"{shown(self.folder)} holds the search of {before['recipe']}, a recipe file of "
                "the same name; rename one of the two, or move that folder away"
            )
        if before != identity:
            what = "recipe, rows, settings, packages or machine"
            say(f"starts afresh: {what} changed; {Run(self.folder).move_aside()}")
        self.division: Division = hold_out(self.recipe, self.settings.validation, self.folder)
        write_json(record, identity)
        metric = ""
        if self.request.judge == "metric":
            metric = run_in_child(name_metric_of_rows, self.recipe.task, self.division.validation)
        self.measures = Measures(self.division, self.settings.evaluations, metric)
        self.study = self.open_study()

    def identify(self) -> Report:
        """What makes another search where it changes."""
        data, path = checks.describe_data(self.recipe), self.recipe.path
        is_named = self.name == self.recipe.name  # in the catalogue, with a file or without
        identity = {
            "recipe": self.name if is_named or not path else str(path.resolve()),
            "config": recipes.select_learned(self.recipe.config),
            "has_best": self.has_best,  # by keys that do not count as learned
            "data": [entry["sha256"] for entry in data],
            "settings": self.settings.model_dump(),
            "equal": self.request.equal,
            "judge": self.request.judge,
            "profile": self.profile,
            "packages": launch.list_packages(),
            # Steps that fit into a time are those of one machine.
            "machine": detect_host().describe_machine(1) if self.request.equal == "time" else "",
            "scoring": SCORING if self.request.judge == "metric" else None,
        }
        return dict(json.loads(json.dumps(identity)))  # as it is compared with what was written

    def open_study(self) -> Any:
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        log = self.folder / "search.log"
        mend_log(log)
        storage = JournalStorage(JournalFileBackend(str(log)))
        study = optuna.create_study(
            study_name=self.name,
            storage=storage,
            direction="maximize" if self.measures.metric else "minimize",
            pruner=optuna.pruners.SuccessiveHalvingPruner(
                min_resource=1, reduction_factor=self.settings.reduction
            ),
            load_if_exists=True,
        )
        # A seed for each call: with the same one, a search that goes on would repeat its points.
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.trials))
        if not study.trials:
            for point in self.space.list_first():
                study.enqueue_trial(point)
        return study

    # -- what there is

    def list_trials(self, *states: str) -> list[Any]:
        """Optuna's trials in these states, all that began if none is named."""
        names = states or ("RUNNING", "COMPLETE", "PRUNED", "FAIL")
        return [t for t in self.study.get_trials(deepcopy=False) if t.state.name in names]

    def candidate(self, number: int, suffix: str = "") -> Candidate:
        point = self.study.get_trials(deepcopy=False)[number].params
        return Candidate(self.folder, f"{number:03d}{suffix}", self.space.apply(point))

    def judge(self, run: Run) -> Judged | None:
        """What a training is judged by; None before its first evaluation."""
        metric, evaluations = self.measures.metric, run.evaluations()
        evaluations = [line for line in evaluations if line["step"]]
        if not evaluations:
            return None
        if not self.has_best:
            return Judged(evaluations[-1], metric)
        choose = max if metric else min
        return Judged(choose(evaluations, key=lambda line: read_value(line, metric)), metric)

    def has_budget(self) -> bool:
        """Whether another candidate may start. The recipe and one candidate always do.

        Time is kept for the candidate itself and for the winner's second training.
        """
        ended = self.list_trials("COMPLETE", "PRUNED", "FAIL")
        if len(ended) < 2:
            return True
        if self.request.trials and len(ended) >= self.request.trials:
            return False
        if not self.request.minutes:
            return True
        took = [trial.user_attrs.get("seconds", 0.0) for trial in ended]
        return sum(took) + 2 * max(took) <= self.request.minutes * 60

    # -- one candidate

    def run(self, show: Callable[[], None]) -> None:
        """Trains candidates until the budget is spent; `show` is called as they advance."""
        import optuna

        while True:
            running = self.list_trials("RUNNING")
            if running:  # of a call that was interrupted
                trial = optuna.trial.Trial(self.study, running[0]._trial_id)
                for key, distribution in self.space.build_distributions().items():
                    trial._suggest(key, distribution)  # what it lacks; else what it has
            elif self.has_budget():
                trial = self.study.ask(self.space.build_distributions())
            else:
                return
            self.try_candidate(trial, show)

    def try_candidate(self, trial: Any, show: Callable[[], None]) -> None:
        """Trains a trial and tells Optuna what came of it.

        Raises JobFailed where it is the recipe that fails: nothing can be compared with it, so its
        trial stays open, and the same command goes on with it once the cause is gone.
        """
        from optuna.trial import TrialState

        run = self.candidate(trial.number).run
        start, before = time.monotonic(), trial.user_attrs.get("seconds", 0.0)
        state, value, reason = TrialState.COMPLETE, None, ""
        try:
            steps = self.choose_steps(trial)
            file = self.candidate(trial.number).write(self.measures, steps)

            def should_stop() -> bool:
                show()
                return self.pass_on(trial, run) and trial.number > 0

            is_finished = train_candidate(file, self.profile, should_stop)
            self.pass_on(trial, run)
            judged = self.judge(run)
            if not is_finished:
                state = TrialState.PRUNED
            elif judged is None or not math.isfinite(judged.value):
                raise JobFailed("it was never evaluated")
            else:
                value = judged.value
                if trial.number == 0:
                    self.measure_recipe(trial, run)
        except JobFailed as error:
            if trial.number == 0:
                raise JobFailed(f"the recipe itself cannot be trained: {error}") from None
            state, reason = TrialState.FAIL, str(error)
        finally:
            trial.set_user_attr("seconds", round(before + time.monotonic() - start, 1))
        if reason:
            trial.set_user_attr("reason", reason)
        self.study.tell(trial, value, state=state)
        run.remove_weights()
        show()

    def measure_recipe(self, trial: Any, run: Run) -> None:
        """Notes what the recipe costs, which is what other candidates may cost."""
        steps = run.info["steps"]
        trial.set_user_attr("steps", steps)
        if self.request.equal == "time":
            speed = measure_speed(run)
            trial.set_user_attr("tokens_per_row", speed.tokens / speed.steps / self.own_batch)
            trial.set_user_attr("training_seconds", speed.seconds / speed.steps * steps)

    @property
    def own_batch(self) -> int:
        return count_batch(self.recipe.config)

    def pass_on(self, trial: Any, run: Run) -> bool:
        """Tells Optuna of new evaluations; returns whether it would stop the trial."""
        reported = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        would_stop = False
        for line in run.evaluations():
            place = round(self.settings.evaluations * line["step"] / line["steps"])
            value = read_value(line, self.measures.metric)
            if place and place not in reported and math.isfinite(value):
                trial.report(value, place)
                is_behind = trial.should_prune()
                would_stop |= is_behind and place < self.settings.evaluations
        return would_stop

    def choose_steps(self, trial: Any) -> int | None:
        """How many steps a candidate trains for; None for the recipe, whose own they are.

        With EQUAL=time, a few steps are timed where no candidate like it was. A step's time goes
        by its tokens, since rows differ in length.
        """
        if trial.number == 0:
            return None
        if steps := trial.user_attrs.get("steps"):
            return int(steps)
        first = self.list_trials()[0]
        steps = first.user_attrs["steps"]
        cost = self.select_cost(trial.params)
        if self.request.equal == "time" and cost != self.select_cost(first.params):
            rate = self.find_rate(cost)
            if rate is None:
                rate = self.probe(trial)
            trial.set_user_attr("cost", cost)
            trial.set_user_attr("seconds_per_token", rate)
            batch = count_batch(self.candidate(trial.number).config)
            step = rate * first.user_attrs["tokens_per_row"] * batch
            wanted = round(first.user_attrs["training_seconds"] / max(step, 1e-9))
            steps = min(max(wanted, self.settings.evaluations), MOST_STEPS * steps)
        trial.set_user_attr("steps", steps)
        return int(steps)

    def select_cost(self, point: Point) -> Point:
        return {key: value for key, value in point.items() if key not in FREE}

    def find_rate(self, cost: Point) -> float | None:
        """The seconds per token of an earlier candidate that costs the same."""
        for trial in self.list_trials():
            if trial.user_attrs.get("cost") == cost:
                return float(trial.user_attrs["seconds_per_token"])
        return None

    def probe(self, trial: Any) -> float:
        """Trains a candidate for a few steps; returns its seconds per token."""
        candidate = self.candidate(trial.number, "-probe")
        file = candidate.write(self.measures, PROBED_STEPS, probes=True)
        train_candidate(file, self.profile, lambda: False)
        rate = measure_speed(candidate.run).seconds_per_token
        candidate.run.remove_weights()
        return rate

    # -- the winner

    def confirm(self) -> Judged | str | None:
        """Trains the winner with another seed; what came of it, or why it failed.

        None where the recipe itself has won: there is no gain that could be luck.
        """
        best = self.study.best_trial
        if not best.number:
            return None
        say("the winner is trained with another seed")
        candidate = self.candidate(best.number, "-again")
        config = candidate.config | {"seed": self.seed + 1}
        candidate = Candidate(self.folder, candidate.name, config)
        if not candidate.run.is_finished:
            file = candidate.write(self.measures, best.user_attrs["steps"])
            try:
                train_candidate(file, self.profile, lambda: False)
            except JobFailed as error:
                return str(error)
            candidate.run.remove_weights()
        return self.judge(candidate.run) or "it was never evaluated"
