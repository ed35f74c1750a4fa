"""Trains one candidate of a search: a process of its own, which the search watches and may stop.

    python -m tools.train.trial runs/.tune/smollm2-135m/sentiment_r4/003.yaml cpu

The candidates of a search share the prepared rows, which lie beside them.
"""

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools import recipes
from tools.common import ROOT, JobFailed, command, format_yaml, json_lines, shown, write_text
from tools.runs import Run
from tools.train import launch, profiles
from tools.train.hardware import detect_host
from tools.train.heldout import Division
from tools.train.machines import Machines
from tools.train.process import die_with_parent

POLL = 0.5  # seconds between two looks at a training
# Exit statuses of an interrupted candidate: of our own command, or before that handles signals.
INTERRUPTED = {130, -signal.SIGINT, -signal.SIGTERM}
PROBED_STEPS = 8  # enough to know how long a step takes
# What a recipe says of its own evaluations, checkpoints and data; a search sets its own.
REPLACED = {
    *("val_set_size", "test_datasets", "eval_steps", "evals_per_epoch", "eval_strategy"),
    *("save_steps", "saves_per_epoch", "save_strategy", "early_stopping_patience"),
    *("metric_for_best_model", "greater_is_better", "eval_sample_packing"),
}


@dataclass(frozen=True)
class Measures:
    """How the trainings of a search are judged: `evaluations` of each, by a metric or the loss."""

    division: Division
    evaluations: int
    metric: str = ""  # of the task; empty where the loss judges


@dataclass(frozen=True)
class Candidate:
    """A config to train in `folder`/`name`."""

    folder: Path
    name: str
    config: dict[str, Any]

    @property
    def run(self) -> Run:
        return Run(self.folder / self.name)

    def write(self, measures: Measures, steps: int | None, probes: bool = False) -> Path:
        """Writes the config that trains on the rows of a search; for `steps`, if they are given.

        A probe trains a few steps and is not judged.
        """
        entry = self.config["datasets"][0]
        content = {key: value for key, value in self.config.items() if key not in REPLACED}
        content |= {
            "datasets": [entry | {"path": shown(measures.division.train)}],
            "output_dir": shown(self.run.folder),
            "load_best_model_at_end": False,
            "logging_steps": 1,  # a step's time is the one between two logged steps
        }
        content |= {"max_steps": steps} if steps else {}
        if probes:
            content |= {"save_steps": steps}
        else:
            judged = (self.config.get("test_datasets") or [entry])[0]
            content |= {
                "test_datasets": [judged | {"path": shown(measures.division.validation)}],
                # Row by row: the loss is the mean over rows, whatever batch a candidate has.
                "eval_batch_size": 1,
                "eval_steps": 1 / measures.evaluations,
                "save_steps": 1 / measures.evaluations,
                "record_validation": True,
            }
            content |= {"eval_sample_packing": False} if content.get("sample_packing") else {}
            if measures.metric:
                name = f"eval_{measures.metric}"
                content |= {"metric_for_best_model": name, "greater_is_better": True}
        path = self.folder / f"{self.name}.yaml"
        write_text(path, format_yaml(content))
        return path


def train_candidate(file: Path, profile: str, should_stop: Callable[[], bool]) -> bool:
    """Trains in a child process; False where it was stopped before its end.

    Raises JobFailed with the reason where it fails. An interruption of this process stops it, too,
    and is passed on.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.train.trial", str(file), profile],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,  # its progress is in the run's files
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,  # Ctrl-C reaches the search alone, which passes it on
        preexec_fn=die_with_parent,
    )
    is_stopped, errors = False, None
    try:
        while errors is None:
            try:
                _, errors = process.communicate(timeout=POLL)
            except subprocess.TimeoutExpired:
                if not is_stopped and should_stop():
                    process.terminate()
                    is_stopped = True
    except BaseException:
        process.terminate()
        process.communicate()
        raise
    if process.returncode in INTERRUPTED and not is_stopped:
        raise KeyboardInterrupt  # a scheduler may signal the child first
    if process.returncode and not is_stopped:
        lines = errors.strip().splitlines() or [f"exit status {process.returncode}"]
        raise JobFailed(lines[-1].removeprefix("error: "))
    return process.returncode == 0


@dataclass(frozen=True)
class Speed:
    """What the steps of a training took, without its evaluations."""

    seconds: float
    tokens: int  # of the rows
    steps: int

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / max(self.tokens, 1)


def measure_speed(run: Run) -> Speed:
    """The speed of a training's steps, from its log; raises JobFailed where it has too few."""
    lines = json_lines(run.progress_file)
    pairs = [
        (before, after)
        for before, after in zip(lines, lines[1:], strict=False)
        # After an evaluation, the time until the next step is not that of the step alone.
        if "loss" in before and "loss" in after and after["step"] == before["step"] + 1
    ]
    if not pairs:
        raise JobFailed(
            f"{run}: too few steps without an evaluation to measure their time; EQUAL=steps does "
            "not need it"
        )
    seconds = sum(after["seconds"] - before["seconds"] for before, after in pairs)
    tokens = sum(after["real_tokens"] - before["real_tokens"] for before, after in pairs)
    return Speed(seconds, tokens, len(pairs))


@command
def main() -> None:
    file, profile = Path(sys.argv[1]), sys.argv[2]
    recipe, here = recipes.find(str(file)), detect_host()
    config = profiles.merge_config(recipe, profiles.Choice(profile), here)
    config["dataset_prepared_path"] = str(Path(recipe.config["output_dir"]).parent / "prepared")
    launch.execute(recipe, config, profile, False, Machines())


if __name__ == "__main__":
    main()
