"""An Axolotl plugin that watches over a training: progress, checkpoints, stops, several processes.

`tools.train` adds it to the merged config, so a recipe does not depend on it. It writes into the
run folder `progress.jsonl` (a line for each optimizer step) and, after the last one, `stats.json`.
Axolotl exits with status 0 when it is interrupted: only `stats.json` says that a run is finished.
"""

import hashlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import TrainerCallback, set_seed

from tools import versions
from tools.cli import ROOT, atomic, digest, json_lines, write_json
from tools.weights import dequantize_once, keep_8bit_scales

WINDOW = 10  # steps whose mean loss tells whether a training diverges
# Logged steps in a row whose gradient may overflow in fp16. The loss is scaled by 2^16 at first
# (torch, DeepSpeed) and by half of that after each overflow, in DeepSpeed from the second one on:
# after 18 the scale is 1/2, and it is not the scale that overflows. Two more are a margin.
OVERFLOWS = 20


class Args(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    dequantize_once: bool | None = None
    answer_logits_only: bool | None = None
    processes: int | None = None  # that train together; fewer means that some train apart
    micro_batch_parts: int | None = None  # processes that share one micro-batch of the recipe


class Stopped(RuntimeError):
    """The training must not go on; `tools.train` shows the text as it stands."""


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
    """The last logged value of `name`; None where there is none."""
    return next((line[name] for line in reversed(lines) if name in line), None)


def local(name: str) -> int:
    """A number that torchrun tells each process: RANK, LOCAL_RANK, WORLD_SIZE."""
    return int(os.environ.get(name, "1" if name == "WORLD_SIZE" else "0"))


def gathered(value: Any) -> list[Any]:
    """The `value` of every process, by rank."""
    import torch.distributed as dist

    if local("WORLD_SIZE") == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def weights_digest(model: Any) -> str | None:
    """SHA-256 over the trained weights; None where ZeRO-3 or FSDP divides them among processes."""
    import torch
    from torch.distributed.tensor import DTensor

    total = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            if hasattr(parameter, "ds_id") or isinstance(parameter, DTensor):
                return None
            bits = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
            total.update(bits.numpy().tobytes())
    return total.hexdigest()


def write_atomically(trainer: Any) -> None:
    """Lets a checkpoint appear whole or not at all, with the SHA-256 of its files.

    It is written under `.writing/`, flushed to the disk and renamed. `checkpoint.json` inside it
    holds what `tools.train` compares before it resumes.
    """
    from transformers.trainer_utils import rotate_checkpoints

    write, folder = trainer._save_checkpoint, trainer._get_output_dir

    def save(model: Any, trial: Any, **kwargs: Any) -> None:
        run = Path(folder(trial=trial))
        part, name = run / ".writing", f"checkpoint-{trainer.state.global_step}"
        if trainer.args.should_save:
            shutil.rmtree(part, ignore_errors=True)
        gathered(None)  # nobody writes before the folder is empty
        trainer._get_output_dir = lambda trial: str(part)
        try:
            write(model, trial, **kwargs)
        finally:
            trainer._get_output_dir = folder
        gathered(None)  # nor is it moved before everybody has written
        if trainer.args.should_save:
            best = trainer.state.best_model_checkpoint
            if best and Path(best).parent == part:
                trainer.state.best_model_checkpoint = str(run / name)
                trainer.state.save_to_json(str(part / name / "trainer_state.json"))
            seal(part / name)
            shutil.rmtree(run / name, ignore_errors=True)
            os.replace(part / name, run / name)
            limit, best = trainer.args.save_total_limit, trainer.state.best_model_checkpoint
            rotate_checkpoints(str(run), limit, best)
        gathered(None)

    trainer._save_checkpoint = save


def seal(checkpoint: Path) -> None:
    """Writes `checkpoint.json`: the SHA-256 of every file in a checkpoint, after a flush."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for path in [*files, checkpoint]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    content = {str(path.relative_to(checkpoint)): digest(path) for path in files}
    write_json(checkpoint / "checkpoint.json", content)


def order_by_epoch(trainer: Any) -> None:
    """Draws the order of `group_by_length` from the seed and the epoch.

    transformers draws it from the global random state, which dropout moves: a training resumed
    after its first epoch would see its rows in another order, and each of several processes in one
    of its own. The groups are those of one process, so the order is, too.
    """
    import torch
    from torch.utils.data import Sampler
    from transformers.trainer_pt_utils import LengthGroupedSampler

    make = trainer._get_train_sampler

    class ByEpoch(Sampler):
        def __init__(self, inner: Any):
            self.inner = inner

        def __len__(self) -> int:
            return len(self.inner)

        def __iter__(self) -> Any:
            epoch = int(trainer.state.epoch or 0)
            self.inner.generator = torch.Generator().manual_seed(trainer.args.seed + epoch)
            return iter(self.inner)

    def sampler(dataset: Any = None) -> Any:
        inner = make(dataset)
        if not isinstance(inner, LengthGroupedSampler):
            return inner
        inner.batch_size *= local("WORLD_SIZE")
        return ByEpoch(inner)

    trainer._get_train_sampler = sampler


def count_real_tokens(trainer: Any, progress: "Progress") -> None:
    """Counts the tokens of each batch that are no padding, in this process."""
    compute = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        if model.training:
            mask = inputs.get("attention_mask")
            progress.real_tokens += inputs["labels"].numel() if mask is None else mask.sum()
        return compute(model, inputs, return_outputs=return_outputs, **kwargs)

    trainer.compute_loss = compute_loss


def weigh_parts(trainer: Any, parts: int) -> None:
    """Where `parts` processes share a micro-batch, lets their mean loss be that of the whole one.

    The loss is a mean over answer tokens. A process's mean counts by its share of the tokens, so
    that the gradient, averaged over the processes, is that of the undivided micro-batch.
    """
    import torch
    import torch.distributed as dist

    groups = [
        dist.new_group(list(range(first, first + parts)))
        for first in range(0, local("WORLD_SIZE"), parts)
    ]
    group, compute = groups[local("RANK") // parts], trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        own = (inputs["labels"][:, 1:] != -100).sum()
        found = compute(model, inputs, return_outputs=return_outputs, **kwargs)
        if not model.training:
            return found
        total = own.clone()
        dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group)
        scale = (own * parts / total).to(torch.float32)
        return (found[0] * scale, found[1]) if return_outputs else found * scale

    trainer.compute_loss = compute_loss


def deepspeed_on_cpu() -> None:
    """Lets accelerate start DeepSpeed's processes over gloo where there is no GPU.

    accelerate knows no backend for DeepSpeed without one, and trains each process apart. Gloo
    gathers into views of the output, which autograd forbids on weights unless it is off.
    """
    import torch
    import torch.distributed as dist
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    prepare = PartialState._prepare_backend

    def with_gloo(state: Any, *args: Any, **kwargs: Any) -> Any:
        backend, kind = prepare(state, *args, **kwargs)
        return (backend, kind) if backend else ("gloo", DistributedType.MULTI_CPU)

    PartialState._prepare_backend = with_gloo
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(dist, name, torch.no_grad()(getattr(dist, name)))


class Watch(TrainerCallback):
    """Stops a training that must not go on, and saves one that is told to stop.

    `should_stop` is set by SIGTERM or SIGINT; the step is finished and saved first. An evaluation
    is left after the batch at hand, and done when the training goes on.
    """

    def __init__(self, cfg: Any, trainer: Any, progress: "Progress"):
        self.cfg, self.trainer, self.progress = cfg, trainer, progress
        self.should_stop = self.stopping = self.ended = False
        self.same: list[Any] = []  # the digests of the weights, by rank
        self.first_step = 0  # that this process goes on from
        self.overflows = 0  # logged steps in a row whose gradient is not finite

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        asked = self.cfg.processes or 1
        if not asked == args.world_size == local("WORLD_SIZE"):
            raise Stopped(
                f"{asked} processes were asked for and {local('WORLD_SIZE')} started, and this one "
                f"trains with {args.world_size}: they would train apart. `make train` with NPROC=… "
                "starts them together (on a CPU it needs ACCELERATE_USE_CPU=true)"
            )
        if self.cfg.deepspeed and not self.trainer.is_deepspeed_enabled:
            raise Stopped("DeepSpeed was asked for, and accelerate trains without it")
        self.same_data()
        args.logging_nan_inf_filter = False  # it would show the mean of the losses before

        def stop(number: int, frame: FrameType | None) -> None:
            self.should_stop = True

        # After Axolotl's own handler of SIGINT, which would save the adapter of a half-done run.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        self.first_step = state.global_step
        if self.first_step:
            self.make_up(args, state, control)

    def make_up(self, args: Any, state: Any, control: Any) -> None:
        """Does what was left undone at the step that the training goes on from, and no more."""
        args.eval_on_start = False  # Axolotl sets it; here it would repeat what the run has
        saved = state.stateful_callbacks["TrainerControl"]["args"]
        if saved["should_evaluate"]:
            self.trainer._determine_best_metric(self.trainer._evaluate(None, None), None)
        if 0 < state.max_steps <= state.global_step:
            # All steps are trained; transformers would train one more before it sees that.
            self.trainer._run_epoch = lambda **_: None
            control.should_training_stop = True

    def same_data(self) -> None:
        """The data is still what the run began with, and the same for every process."""
        written = Path(self.cfg.output_dir) / "identity.json"
        begun = json.loads(written.read_text())["data"] if written.is_file() else []
        entries = [*self.cfg.datasets, *(self.cfg.test_datasets or [])]
        files = [path for entry in entries if (path := ROOT / entry["path"]).is_file()]
        now = [digest(path) for path in files]
        if begun and now != begun:
            raise Stopped(f"{', '.join(map(str, files))} changed while the training was starting")
        if any(other != now for other in gathered(now)):
            raise Stopped("the processes have different data; copy it to every machine")

    def same_weights(self) -> None:
        self.same = gathered(weights_digest(self.trainer.model))
        if len(set(self.same)) > 1:
            raise Stopped(
                f"the processes hold different weights at step {self.trainer.state.global_step}: "
                "they train apart"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.same_weights()
        if any(gathered(self.should_stop)) and state.global_step < state.max_steps:
            # An evaluation that is due is left in `on_prediction_step`: its loader draws from the
            # random numbers that the next step is trained with.
            self.stopping = control.should_save = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not any(gathered(self.should_stop)):
            return
        if state.global_step > self.first_step:  # at the first one nothing is new
            self.stopping = True
            self.trainer._save_checkpoint(self.trainer.model, None)
            self.on_save(args, state, control)
        sys.exit(0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Before anything of this step is saved."""
        place = f"is not a number at step {state.global_step} (epoch {state.epoch or 0:.2f})"
        logs = logs or {}
        for name, value in logs.items():
            if name.endswith("loss") and not math.isfinite(value):
                if name.startswith("eval"):
                    raise Stopped(
                        f"the evaluation loss {place}, where the training loss is one: "
                        "look for validation rows whose answers lie beyond sequence_len"
                    )
                raise Stopped(f"the training loss {place}; try a lower learning_rate")
        if "grad_norm" in logs:
            self.overflows = 0 if math.isfinite(logs["grad_norm"]) else self.overflows + 1
            # Only fp16 scales its loss, and skips a step that overflows. Without that the step was
            # taken, and the weights are no numbers any more.
            if self.overflows >= (OVERFLOWS if args.fp16 else 1):
                steps = f", nor at the {OVERFLOWS - 1} logged before" if args.fp16 else ""
                raise Stopped(
                    f"the gradient of the training loss {place}{steps}; try a lower learning_rate"
                )
        if why := diverging([line for line in self.progress.lines if "loss" in line]):
            raise Stopped(f"the loss diverges: {why} before step {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.same_weights()
        if self.stopping:
            sys.exit(0)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.same_weights()
        self.ended = True


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def diverging(lines: list[dict[str, Any]]) -> str | None:
    """Why the logged steps of a training diverge, None where they do not.

    The mean loss of the last WINDOW steps is twice that of the first ones, or it is no better and
    the gradient a thousand times longer: then no step undoes what the steps before did.
    """
    if len(lines) < 2 * WINDOW:
        return None
    first, recent = lines[:WINDOW], lines[-WINDOW:]
    was, now = (sum(line["loss"] for line in part) / WINDOW for part in (first, recent))
    short, long = (
        min((line["grad_norm"] for line in part if "grad_norm" in line), default=0.0)
        for part in (first, recent)
    )
    if now > max(2 * was, was + 1) or (now >= was and long > 1000 * short > 0):
        return f"{was:.2f} at first, {now:.2f} (gradient norm {long:.3g}) over {WINDOW} steps"
    return None


class Progress(TrainerCallback):
    """Appends a line to `progress.jsonl` for each logged step."""

    def __init__(self, folder: Path):
        self.file = folder / "progress.jsonl"
        self.start = time.monotonic()
        self.before = 0.0  # seconds of the parts of this training before an interruption
        self.lines: list[dict[str, Any]] = []
        self.real_tokens: Any = 0  # of this process; a tensor once it counted

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.lines = [line for line in json_lines(self.file) if line["step"] <= state.global_step]
        last_line = self.lines[-1] if self.lines else {}
        self.before = last_line.get("seconds", 0.0)
        self.real_tokens = last_line.get("real_tokens", 0) if local("RANK") == 0 else 0
        if state.is_world_process_zero:
            with atomic(self.file) as file:
                file.write("".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self.start = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs:
            return
        counted = getattr(state, "tokens", None) or {}
        line = {
            "step": state.global_step,
            "steps": state.max_steps,
            "seconds": round(self.before + time.monotonic() - self.start, 2),
            "trained_tokens": int(counted.get("trainable", 0)),
            "total_tokens": int(counted.get("total", 0)),
            "real_tokens": sum(gathered(int(self.real_tokens))),
            "memory": peak_memory(),
        }
        names = ("loss", "grad_norm", "learning_rate", "eval_loss")
        numbers = {name: float(logs[name]) for name in names if name in logs}
        # JSON has no NaN; `Watch` tells of it where it stops a training.
        line |= {name: number for name, number in numbers.items() if math.isfinite(number)}
        self.lines.append(line)
        if state.is_world_process_zero:
            with open(self.file, "a") as file:
                file.write(json.dumps(line) + "\n")


class RunPlugin(BasePlugin):
    watch: Watch | None = None  # until there is a trainer

    def get_input_args(self) -> str:
        return "tools.plugin.Args"

    def register(self, cfg: Any) -> None:
        import torch

        if local("WORLD_SIZE") > 1 and not torch.cuda.is_available():
            versions.skip_peer_check()
            # Each process's device is cpu:N, to which torch.load knows no way for an optimizer.
            torch.serialization.register_package(
                0, lambda storage: None, lambda storage, to: storage if to[:4] == "cpu:" else None
            )
            if cfg.get("deepspeed"):
                deepspeed_on_cpu()

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        import torch

        if local("WORLD_SIZE") > 1 and not torch.cuda.is_available():
            cfg.device_map = {"": "cpu"}  # Axolotl maps to accelerator 0 from two processes on

    def pre_model_load(self, cfg: Any) -> None:
        import torch

        if cfg.load_in_8bit:
            keep_8bit_scales()
            if not torch.cuda.is_available() and not cfg.bf16 and not cfg.fp16:
                # Axolotl takes float16 for 8-bit bases: slow on a CPU, and not what scoring runs in
                cfg.torch_dtype = torch.float32

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        # Axolotl seeds when it makes the trainer, which is after the adapter's random A: without
        # this, two runs of one recipe differ from the third step on.
        if cfg.seed is not None:
            set_seed(cfg.seed)

    def post_model_load(self, cfg: Any, model: Any) -> None:
        if cfg.dequantize_once:
            dequantize_once(model, training=True)
        if cfg.answer_logits_only:
            answer_logits_only(model)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        self.progress, self.trainer = Progress(Path(cfg.output_dir)), trainer
        self.watch = Watch(cfg, trainer, self.progress)
        count_real_tokens(trainer, self.progress)
        write_atomically(trainer)
        order_by_epoch(trainer)
        if (cfg.micro_batch_parts or 1) > 1:
            weigh_parts(trainer, cfg.micro_batch_parts)
        return [self.progress, self.watch]

    def post_train_unload(self, cfg: Any) -> None:
        # The last hook of all: `post_train` is called before the adapter is saved, too. Axolotl
        # 0.21 also calls it on the way out of a training that was stopped or failed.
        import torch

        if self.watch is None or not self.watch.ended or sys.exc_info()[0] is not None:
            return
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
                "train_loss": mean([line["loss"] for line in lines if "loss" in line]),
                "last_loss": last(lines, "loss"),
                "last_eval_loss": last(lines, "eval_loss"),
                "seconds": round(seconds, 1),
                "peak_memory_bytes": max([peak_memory(), *memory]),
                "total_tokens": total,
                "real_tokens": lines[-1]["real_tokens"] if lines else 0,
                "trained_tokens": int(counted.get("trainable", 0)),
                "tokens_per_second": round(total / seconds, 1) if seconds else None,
                "trainable_parameters": sum(p.numel() for p in parameters),
                "device": torch.cuda.get_device_name(0) if on_gpu else "cpu",
                "processes": local("WORLD_SIZE"),
                "weights_of_processes": self.watch.same,
                "seed": cfg.seed,
            },
        )
