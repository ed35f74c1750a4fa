"""Searches for a recipe that learns more at the same cost, and says what it gained.

    python -m tools tune smollm2-135m/sentiment_r4 --minutes 60

Optuna proposes candidates from the space of recipes/tune.yaml. Each trains in a process of its own,
at the cost of the recipe in time or steps, is judged by validation rows alone, and is stopped early
where it falls behind (successive halving). The first candidate is the recipe as it stands; all have
its seed. A winner that is not the recipe is trained once more with another seed, which shows how
much of it was luck.

The search lies in runs/.tune/<recipe>/ and goes on where it was interrupted. What came of it goes
to results/_tune/<recipe>.json, with a figure beside it, unless a fuller search lies there.
"""

import signal
import time
from pathlib import Path
from typing import Any

from evals.results import EXAMPLES
from tools import recipes, smollm2
from tools.common import (
    ROOT,
    digest,
    format_table,
    format_yaml,
    read_json,
    run_in_child,
    shown,
    write_json,
)
from tools.recipes import Recipe
from tools.runs import Run
from tools.train import checks, hardware, profiles
from tools.train.search import Judged, Report, Search, SearchRequest, say
from tools.train.space import Space, count_batch, read_settings
from tools.train.status import read_last_step

RESULTS = ROOT / "results" / "_tune"


def validate_points(space: Space, where: str) -> None:
    """Raises WrongInput where Axolotl or `make train` rejects a value of the space."""
    for point in space.list_extremes():
        config = space.apply(point)
        recipes.validate(config, f"{where}, space")
        checks.refuse_unusable(config, f"{where}, space")


# ---- what came of it


def scale_schedule(config: dict[str, Any], ratio: float, rows_ratio: float) -> dict[str, Any]:
    """The keys that let a recipe train `ratio` times its steps, `rows_ratio` times its rows."""
    changes: dict[str, Any] = {}
    if abs(ratio - 1) > 1e-9:
        for key in ("eval_steps", "save_steps"):
            if isinstance(config.get(key), int):
                changes[key] = max(1, round(config[key] * ratio))
        evaluates, saves = config.get("eval_steps"), config.get("save_steps")
        if isinstance(evaluates, int) and isinstance(saves, int) and saves % evaluates == 0:
            changes["save_steps"] = changes["eval_steps"] * (saves // evaluates)
    if config.get("max_steps"):
        steps = max(1, round(config["max_steps"] * ratio))
        return changes | ({"max_steps": steps} if steps != config["max_steps"] else {})
    epochs = round((config.get("num_epochs") or 1) * rows_ratio, 2)
    return changes | ({"num_epochs": epochs} if abs(rows_ratio - 1) > 1e-9 else {})


def raise_version(version: str) -> str:
    """The next minor version: 1.1.0 → 1.2.0."""
    parts = [int(part) if part.isdigit() else 0 for part in version.split(".")]
    major, minor = (*parts, 0)[:2]
    return f"{major}.{minor + 1}.0"


def list_changes_of_winner(search: Search) -> dict[str, Any]:
    """The keys in which the winner differs from the recipe; {} where that wins."""
    best, first = search.study.best_trial, search.list_trials()[0]
    if best.number == 0:
        return {}
    config = search.space.apply(best.params)
    own = search.recipe.config
    changes = {
        key: config.get(key) for key in sorted({*own, *config}) if own.get(key) != config.get(key)
    }
    ratio = best.user_attrs["steps"] / first.user_attrs["steps"]
    rows = ratio * count_batch(config) / search.own_batch
    return changes | scale_schedule(own, ratio, rows)


def describe_trial(search: Search, trial: Any) -> Report:
    judged = search.judge(search.candidate(trial.number).run) if trial.params else None
    state = {"COMPLETE": "finished", "PRUNED": "stopped", "FAIL": "failed"}
    return {
        "number": trial.number,
        "state": state.get(trial.state.name, trial.state.name.lower()),
        **(judged.describe() if judged else {"value": None, "half_width": None, "steps": None}),
        "seconds": trial.user_attrs.get("seconds"),
        "point": trial.params,
        "reason": trial.user_attrs.get("reason"),
    }


def build_report(search: Search, again: Judged | str | None) -> Report:
    """What results/_tune/<recipe>.json holds.

    again: what came of the winner with another seed, or why it failed; None where it was not tried.
    """
    request, recipe, division = search.request, search.recipe, search.division
    best = search.study.best_trial
    first, winner = (search.judge(search.candidate(n).run) for n in (0, best.number))
    assert first and winner  # complete trials were evaluated
    changes = list_changes_of_winner(search)
    second: Report | None = None
    if isinstance(again, str):
        second = {"seed": search.seed + 1, "failed": again}
    elif again:
        second = {"seed": search.seed + 1, **again.describe(), "gain": first.compare(again)}
    return {
        "recipe": search.name,
        "recipe_version": recipe.version,
        "recipe_digest": recipe.digest,
        "machine": str(hardware.detect_host()),
        "profile": search.profile,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "equal": request.equal,
        "judged_by": search.measures.metric or "loss",
        "rows": {
            "trained": division.trained,
            "judged": division.judged,
            "held_back": division.held_back,
            "validation_sha256": digest(division.validation),
            "from": sorted({str(entry["from"]) for entry in checks.describe_data(recipe)}),
        },
        "settings": search.settings.model_dump(),
        "seed": search.seed,
        "trials": [describe_trial(search, trial) for trial in search.list_trials()],
        "recipe_itself": first.describe(),
        "winner": {
            "number": best.number,
            "point": best.params,
            **winner.describe(),
            "gain": first.compare(winner),
            "another_seed": second,
        },
        "changes": changes,
        "next_version": raise_version(recipe.version) if changes else recipe.version,
    }


def shorten_value(value: Any) -> str:
    """A value of a point in a table."""
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value).replace("_proj", "")
    return text if len(text) <= 28 else f"{text[:25]}…"


def format_trials(report: Report) -> str:
    """The table of all candidates, the recipe first."""
    keys = list(report["trials"][0]["point"])
    names = [key.removeprefix("lora_").replace("_", " ") for key in keys]
    rows = [["", "", report["judged_by"], "±", "steps", "min", *names]]
    for trial in report["trials"]:
        name = "recipe" if trial["number"] == 0 else str(trial["number"])
        value, half = (
            "-" if trial[key] is None else f"{trial[key]:.4f}" for key in ("value", "half_width")
        )
        minutes = "-" if trial["seconds"] is None else f"{trial['seconds'] / 60:.1f}"
        point = [shorten_value(trial["point"].get(key, "")) for key in keys]
        rows.append(
            [name, trial["state"], value, half, str(trial["steps"] or "-"), minutes, *point]
        )
    return format_table(rows, "<<>>>>" + "<" * len(keys))


def format_gain(gain: Report) -> str:
    interval = f" ({gain['low']:+.4f} … {gain['high']:+.4f})" if gain["low"] is not None else ""
    return f"{gain['value']:+.4f}{interval}"


def format_entries(report: Report) -> str:
    """The winner as entries of recipes/matrix.yaml, where modules are named without a pattern."""
    changes, name = dict(report["changes"]), report["recipe"]
    if "lora_target_modules" in changes:
        changes["lora_target_modules"] = report["winner"]["point"]["lora_target_modules"].split()
    version = {"versions": {name: report["next_version"]}}
    return format_yaml(version | {"overrides": {name: changes}})


def print_winner(report: Report) -> None:
    """Prints what the search gained, and the YAML for the tables."""
    winner, judged_by, name = report["winner"], report["judged_by"], report["recipe"]
    tried = len(report["trials"])
    say(f"{judged_by} of the recipe: {report['recipe_itself']['value']:.4f}")
    if winner["number"]:
        say(
            f"{judged_by} of candidate {winner['number']}: {winner['value']:.4f}, "
            f"{format_gain(winner['gain'])}, the best of {tried}, so partly luck"
        )
    if not report["changes"]:
        say(
            f"no candidate of {tried - 1} learned more than {name}, which stays as it is; a "
            "larger MINUTES or TRIALS searches on"
        )
        return
    again = winner["another_seed"]
    if "failed" in again:
        say(f"with seed {again['seed']} it failed: {again['failed']}")
    else:
        say(
            f"with seed {again['seed']}: {again['value']:.4f}, {format_gain(again['gain'])}, where "
            f"the recipe has seed {report['seed']}; the interval is over rows, not over seeds"
        )
    if name in recipes.list_names() and not recipes.is_local(name):
        say("for recipes/matrix.yaml, the last entries of the two tables:")
        print(format_entries(report), end="")
    else:
        say(f"for {name}, whose version becomes {report['next_version']}:")
        print(format_yaml(report["changes"]), end="")


def draw(report: Report, file: Path) -> None:
    """Writes the figure of the candidates by learning rate; none where it was not searched."""
    from evals import figures

    points = [
        figures.Tried(trial["point"].get("learning_rate"), trial["value"], trial["state"])
        for trial in report["trials"]
        if trial["value"] is not None
    ]
    if drawing := figures.draw_search(points, report["judged_by"]):
        figures.save_svg(drawing["figure"], file)


# ---- the command


class LiveTable:
    """The table while the search goes on: redrawn on a terminal, else a line for each candidate."""

    def __init__(self, search: Search):
        from rich.console import Console
        from rich.live import Live

        self.search, self.console = search, Console()
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.ended = 0
        self.printed_line, self.printed_at = "", 0.0

    def __enter__(self) -> "LiveTable":
        if self.console.is_terminal:
            self.live.start()
        self.ended = len(self.search.list_trials("COMPLETE", "PRUNED", "FAIL"))
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def show(self) -> None:
        trials = [describe_trial(self.search, trial) for trial in self.search.list_trials()]
        trials = [trial for trial in trials if trial["point"]]
        if not trials:
            return
        report = {"trials": trials, "judged_by": self.search.measures.metric or "loss"}
        last = trials[-1]
        if self.console.is_terminal:
            from rich.text import Text

            text = f"{format_trials(report)}\n{self.describe_step(last)}"
            self.live.update(Text(text, no_wrap=True, overflow="ellipsis"))
            self.live.refresh()
            return
        ended = [trial for trial in trials if trial["state"] in ("finished", "stopped", "failed")]
        if len(ended) > self.ended:
            self.ended = len(ended)
            print("\n".join(format_trials(report | {"trials": trials[-1:]}).splitlines()[1:]))
            if last["reason"]:
                say(f"candidate {last['number']} failed: {last['reason']}")
        elif time.monotonic() - self.printed_at > 20:
            self.printed_at = time.monotonic()
            if (line := self.describe_step(last)) != self.printed_line:
                self.printed_line = line
                say(line)

    def describe_step(self, trial: Report) -> str:
        """How far the candidate that trains now is."""
        row = read_last_step(self.search.candidate(trial["number"]).run.progress_file)
        name = "the recipe" if trial["number"] == 0 else f"candidate {trial['number']}"
        if not row:
            return f"{name} starts"
        return f"{name}: step {row['step']}/{row['steps']}, training loss {row['loss']:.3f}"


def open_search(name: str, request: SearchRequest) -> Search:
    """Checks all that a training would check, and opens the search."""
    recipe, here = recipes.find(name), hardware.detect_host()
    settings = read_settings(request.space)
    profile, _, reason = profiles.choose(here, profiles.Choice(request.profile, 1), 1)
    checks.require_hardware(recipe, here, profile, advice="")  # a search has no FORCE
    checks.refuse_unusable(recipe.config, recipe.where)
    search = Search(recipe, request, profile, settings)
    run_in_child(validate_points, search.space, recipe.where)
    smollm2.ensure(recipe.config["base_model"])
    run_in_child(checks.refuse_unrenderable, recipe)
    say(f"{recipe.name}, profile {profile} ({reason})")
    return search


def choose_file(search: Search, report: Report) -> tuple[Path, str]:
    """Where a report is kept; with the reason where that is beside the search.

    results/_tune is for evidence: of no examples, and never less than what lies there. A search
    that goes on has more candidates than its own report, or the same ones.
    """
    file, reason = RESULTS / f"{search.name}.json", ""
    before = read_json(file) if file.is_file() else {}
    if EXAMPLES in report["rows"]["from"]:
        reason = "its rows are this project's examples"
    elif before.get("recipe_digest") == report["recipe_digest"]:
        count = len(before["trials"])
        if before["trials"] != report["trials"][:count]:  # another search
            finished, new = map(count_finished, (before, report))
            reason = f"{shown(file)} has as many candidates" if finished >= new else ""
    return (search.folder / "report.json" if reason else file), reason


def count_finished(report: Report) -> int:
    return sum(trial["state"] == "finished" for trial in report["trials"])


def tune(name: str, request: SearchRequest) -> tuple[Recipe, Report]:
    """Searches, prints what came of it and writes it; returns the recipe and the report."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    search = open_search(name, request)
    with Run(search.folder).lock():
        checks.require_space(search.folder)
        search.folder.mkdir(parents=True, exist_ok=True)
        search.open()
        say(f"{search.division}; judged by {search.measures.metric or 'loss'}")
        with LiveTable(search) as table:
            search.run(table.show)
        report = build_report(search, search.confirm())
    file, reason = choose_file(search, report)
    write_json(file, report)
    draw(report, file.with_suffix(".svg"))
    print(format_trials(report))
    print_winner(report)
    say(f"all of it is in {shown(file)}{reason and f', as {reason}'}")
    return search.recipe, report
