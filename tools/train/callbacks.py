"""Watches a training from inside: progress lines, stops, divergence."""

import json
import math
import resource
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from tools.common import ROOT, atomic, digest, json_lines
from tools.train.ranks import digest_weights, gather, read_rank

WINDOW = 10  # steps whose mean loss tells whether a training diverges
# Consecutive logged steps whose gradient may overflow in fp16. The loss is scaled by 2^16 at first
# (torch, DeepSpeed) and by half of that after each overflow, in DeepSpeed from the second one on:
# after 18 the scale is 1/2, and the scale cannot be the cause. Two more are a margin.
OVERFLOWS = 20


UNTRAINED = 3  # first logged steps; a training stops if none has a gradient


class Stopped(RuntimeError):
    """The training must not go on; `tools.train.process` shows the text as it stands."""


def measure_peak_memory() -> int:
    """Peak bytes: allocated on the GPU where there is one, else resident in this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Watch(TrainerCallback):
    """Stops a training that must not go on, and saves one that receives SIGTERM or SIGINT.

    The current step is finished and saved first. An evaluation is left after the current batch, and
    done when the training resumes.
    """

    def __init__(self, cfg: Any, trainer: Any, progress: "Progress"):
        self.cfg, self.trainer, self.progress = cfg, trainer, progress
        self.should_stop = self.stopping = self.ended = False
        self.same: list[Any] = []  # digests of the weights, by rank
        self.first_step = 0  # that this process resumes from
        self.overflows = 0  # consecutive logged steps whose gradient is not finite

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        expected, started = self.cfg.processes or 1, read_rank("WORLD_SIZE")
        if not expected == args.world_size == started:
            raise Stopped(
                f"{expected} processes were asked for and {started} started, and this one "
                f"trains with {args.world_size}: they would train apart. `make train` with NPROC=… "
                "starts them together (on a CPU it needs ACCELERATE_USE_CPU=true)"
            )
        if self.cfg.deepspeed and not self.trainer.is_deepspeed_enabled:
            raise Stopped("DeepSpeed was asked for, and accelerate trains without it")
        self.check_data()
        args.logging_nan_inf_filter = False  # it would show the mean of earlier losses instead

        def stop(number: int, frame: FrameType | None) -> None:
            self.should_stop = True

        # After Axolotl's own handler of SIGINT, which would save the adapter of a half-done run.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        self.first_step = state.global_step
        if self.first_step:
            self.finish_step(args, state, control)

    def finish_step(self, args: Any, state: Any, control: Any) -> None:
        """Does what was left undone at the step that the training resumes from, and no more."""
        args.eval_on_start = False  # Axolotl sets it; the run has that evaluation
        saved = state.stateful_callbacks["TrainerControl"]["args"]
        if saved["should_evaluate"]:
            metrics = self.trainer._evaluate(None, None)
            if self.trainer._determine_best_metric(metrics, None):
                # transformers names the best checkpoint where it saves one, and this one is saved.
                state.best_model_checkpoint = f"{args.output_dir}/checkpoint-{state.global_step}"
        if 0 < state.max_steps <= state.global_step:
            # All steps are trained; transformers would train one more before it notices.
            self.trainer._run_epoch = lambda **_: None
            control.should_training_stop = True

    def check_data(self) -> None:
        """Raises Stopped where the data changed since the run began, or differs by process."""
        identity = Path(self.cfg.output_dir) / "identity.json"
        before = json.loads(identity.read_text())["data"] if identity.is_file() else []
        entries = [*self.cfg.datasets, *(self.cfg.test_datasets or [])]
        files = [path for entry in entries if (path := ROOT / entry["path"]).is_file()]
        now = [digest(path) for path in files]
        if before and now != before:
            raise Stopped(f"{', '.join(map(str, files))} changed while the training was starting")
        if any(other != now for other in gather(now)):
            raise Stopped("the processes have different data; copy it to every machine")

    def check_weights(self) -> None:
        """Raises Stopped where the processes hold different weights."""
        self.same = gather(digest_weights(self.trainer.model))
        if len(set(self.same)) > 1:
            raise Stopped(
                f"the processes hold different weights at step {self.trainer.state.global_step}: "
                "they train apart"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.check_weights()
        if any(gather(self.should_stop)) and state.global_step < state.max_steps:
            # An evaluation that is due is left in `on_prediction_step`: its loader draws from the
            # random numbers that the next step is trained with.
            self.stopping = control.should_save = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not any(gather(self.should_stop)):
            return
        if state.global_step > self.first_step:  # at the first one nothing is new
            self.stopping = True
            self.trainer._save_checkpoint(self.trainer.model, None)
            self.on_save(args, state, control)
        sys.exit(0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Raises Stopped for a lost loss or gradient, before anything of this step is saved."""
        place = f"is not a number at step {state.global_step} (epoch {state.epoch or 0:.2f})"
        advice = "; try a lower learning_rate"
        logs = logs or {}
        for name, value in logs.items():
            if not name.endswith("loss") or math.isfinite(value):
                continue
            if name.startswith("eval"):
                raise Stopped(
                    f"the evaluation loss {place}, although the training loss is finite: "
                    "look for validation rows whose answers lie beyond sequence_len"
                )
            raise Stopped(f"the training loss {place}{advice}")
        if "grad_norm" in logs:
            self.overflows = 0 if math.isfinite(logs["grad_norm"]) else self.overflows + 1
            # Only fp16 scales its loss, and skips a step that overflows. Without that the step was
            # taken, and the weights are not numbers any more.
            if self.overflows >= (OVERFLOWS if args.fp16 else 1):
                steps = f", nor at the {OVERFLOWS - 1} logged before" if args.fp16 else ""
                raise Stopped(f"the gradient of the training loss {place}{steps}{advice}")
        norms = [line["grad_norm"] for line in self.progress.lines if "grad_norm" in line]
        # DeepSpeed reports 0 for a step that overflows.
        if norms[:UNTRAINED] == [0.0] * UNTRAINED and not self.cfg.deepspeed:
            raise Stopped(
                f"no gradient reached the adapter in {UNTRAINED} steps: all rows may be without an "
                "answer to train on, or the config freezes the adapter"
            )
        if reason := explain_divergence([line for line in self.progress.lines if "loss" in line]):
            raise Stopped(f"the loss diverges: {reason} before step {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.check_weights()
        if self.stopping:
            sys.exit(0)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.check_weights()
        self.ended = True


def explain_divergence(lines: list[dict[str, Any]]) -> str | None:
    """How the logged steps of a training diverge, None where they do not.

    The mean loss of the last WINDOW steps is twice that of the first ones, or it is no better and
    the gradient is a thousand times longer: then no step undoes what earlier steps did.
    """
    if len(lines) < 2 * WINDOW:
        return None
    windows = lines[:WINDOW], lines[-WINDOW:]
    before, now = (sum(line["loss"] for line in window) / WINDOW for window in windows)
    short, long = (
        min((line["grad_norm"] for line in window if "grad_norm" in line), default=0.0)
        for window in windows
    )
    if now > max(2 * before, before + 1) or (now >= before and long > 1000 * short > 0):
        return f"{before:.2f} at first, {now:.2f} (gradient norm {long:.3g}) over {WINDOW} steps"
    return None


class Progress(TrainerCallback):
    """Appends a line to `progress.jsonl` for each logged step.

    `metric` is what an evaluation logs beside its loss, such as `eval_accuracy`.
    """

    def __init__(self, folder: Path, metric: str = ""):
        self.file, self.metric = folder / "progress.jsonl", metric
        self.start = time.monotonic()
        self.before = 0.0  # seconds that this training took before an interruption
        self.lines: list[dict[str, Any]] = []
        self.real_tokens: Any = 0  # of this process; a tensor after the first batch
        self.peak_memory = 0  # bytes, of this process

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.lines = [line for line in json_lines(self.file) if line["step"] <= state.global_step]
        last_line = self.lines[-1] if self.lines else {}
        self.before = last_line.get("seconds", 0.0)
        self.real_tokens = last_line.get("real_tokens", 0) if read_rank("RANK") == 0 else 0
        if state.is_world_process_zero:
            with atomic(self.file) as file:
                file.write("".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self.start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Axolotl sets CUDA's peak back when it logs, which is before `on_log`.
        self.peak_memory = max(self.peak_memory, measure_peak_memory())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs:
            return
        tokens = getattr(state, "tokens", None) or {}
        line = {
            "step": state.global_step,
            "steps": state.max_steps,
            "seconds": round(self.before + time.monotonic() - self.start, 2),
            "trained_tokens": int(tokens.get("trainable", 0)),
            "total_tokens": int(tokens.get("total", 0)),
            "real_tokens": sum(gather(int(self.real_tokens))),
            "memory": max(gather(max(self.peak_memory, measure_peak_memory()))),
        }
        # JSON has no NaN; `Watch` reports one where it stops the training.
        for name in ("loss", "grad_norm", "learning_rate", "eval_loss", self.metric):
            if name in logs and math.isfinite(number := float(logs[name])):
                line[name] = number
        self.lines.append(line)
        if state.is_world_process_zero:
            with open(self.file, "a") as file:
                file.write(json.dumps(line) + "\n")
