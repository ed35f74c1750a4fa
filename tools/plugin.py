"""An Axolotl plugin that reports a training: progress while it runs, its facts when it is done.

`tools.train` adds it to the merged config, so a recipe does not depend on it. It writes into the
run folder `progress.jsonl` (a line for each optimizer step) and, after the last one, `stats.json`.
Axolotl exits with status 0 when it is interrupted: only `stats.json` says that a run is finished.
"""

import json
import math
import os
import resource
import time
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import TrainerCallback, set_seed

from tools.cli import json_lines, write_json
from tools.weights import dequantize_once, keep_8bit_scales


class Args(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    dequantize_once: bool | None = None
    answer_logits_only: bool | None = None


def answer_logits_only(model: Any) -> None:
    """Lets a causal model compute logits only where some row of the batch has a label.

    The loss ignores every other position, so it stays the same; what is saved is the product with
    the vocabulary matrix, its gradient and their memory. Shapes: labels (batch, length) of token
    ids or -100; transformers' `logits_to_keep` takes the column indices, `shift_labels` the labels
    of those columns, already moved by one.
    """
    import torch

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        labels = kwargs.get("labels")
        if labels is None:
            return None
        shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        columns = (shifted != -100).any(0).nonzero().flatten()
        if len(columns) == 0:
            return None
        chosen = {"logits_to_keep": columns, "shift_labels": shifted[:, columns].contiguous()}
        return args, kwargs | chosen

    model.register_forward_pre_hook(before, with_kwargs=True)


def peak_memory() -> int:
    """Peak bytes: allocated on the GPU where there is one, else resident in this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def last(lines: list[dict[str, Any]], name: str) -> float | None:
    """The last logged value of `name`; None where there is none or it is not finite."""
    values = [line[name] for line in lines if name in line]
    return values[-1] if values and math.isfinite(values[-1]) else None


class Progress(TrainerCallback):
    """Appends a line to `progress.jsonl` for each logged step."""

    def __init__(self, folder: Path):
        self.file = folder / "progress.jsonl"
        self.start = time.monotonic()
        self.before = 0.0  # seconds of the parts of this training before an interruption

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kept = []
        if self.file.exists():
            kept = [line for line in json_lines(self.file) if line["step"] <= state.global_step]
        self.before = kept[-1]["seconds"] if kept else 0.0
        self.file.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.start = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        counted = getattr(state, "tokens", None) or {}
        line = {
            "step": state.global_step,
            "steps": state.max_steps,
            "seconds": round(self.before + time.monotonic() - self.start, 2),
            "trained_tokens": int(counted.get("trainable", 0)),
            "total_tokens": int(counted.get("total", 0)),
            "memory": peak_memory(),
        }
        names = ("loss", "grad_norm", "learning_rate", "eval_loss")
        line |= {name: float(logs[name]) for name in names if name in logs}
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\n")


class RunPlugin(BasePlugin):
    def get_input_args(self) -> str:
        return "tools.plugin.Args"

    def pre_model_load(self, cfg: Any) -> None:
        if cfg.load_in_8bit:
            keep_8bit_scales()

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        # Axolotl seeds when it makes the trainer, which is after the adapter's random A: without
        # this, two runs of one recipe differ from the third step on.
        if cfg.seed is not None:
            set_seed(cfg.seed)

    def post_model_load(self, cfg: Any, model: Any) -> None:
        if cfg.dequantize_once:
            dequantize_once(model)
        if cfg.answer_logits_only:
            answer_logits_only(model)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        self.progress, self.trainer = Progress(Path(cfg.output_dir)), trainer
        return [self.progress]

    def post_train_unload(self, cfg: Any) -> None:
        # The last hook of all: `post_train` is called before the adapter is saved, too.
        import torch

        if not self.trainer.is_world_process_zero():
            return
        state = self.trainer.state
        seconds = self.progress.before + time.monotonic() - self.progress.start
        lines = json_lines(self.progress.file)
        memory = [line["memory"] for line in lines]
        counted = getattr(state, "tokens", None) or {}
        total = int(counted.get("total", 0))
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        on_gpu = torch.cuda.is_available()
        write_json(
            Path(cfg.output_dir) / "stats.json",
            {
                "steps": state.global_step,
                "epochs": round(state.epoch or 0.0, 4),
                "last_loss": last(lines, "loss"),
                "last_eval_loss": last(lines, "eval_loss"),
                "seconds": round(seconds, 1),
                "peak_memory_bytes": max([peak_memory(), *memory]),
                "total_tokens": total,
                "trained_tokens": int(counted.get("trainable", 0)),
                "tokens_per_second": round(total / seconds, 1) if seconds else None,
                "trainable_parameters": sum(p.numel() for p in parameters),
                "device": torch.cuda.get_device_name(0) if on_gpu else "cpu",
                "processes": int(os.environ.get("WORLD_SIZE", "1")),
                "seed": cfg.seed,
            },
        )
