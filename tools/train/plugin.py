"""The Axolotl plugin that `make train` adds to a config; a recipe does not depend on it.

It writes into the run folder `progress.jsonl` (a line for each optimizer step) and, after the last
one, `stats.json`. Axolotl exits with status 0 when it is interrupted: only `stats.json` says that
training is finished.
"""

import sys
import time
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from transformers import TrainerCallback, set_seed

from tools import versions
from tools.common import json_lines, write_json
from tools.models import dequantize_once, keep_8bit_scales, round_in_forward
from tools.runs import Run
from tools.train.batches import (
    compute_answer_logits_only,
    count_real_tokens,
    order_by_epoch,
    weigh_parts,
)
from tools.train.callbacks import Progress, Watch, measure_peak_memory
from tools.train.checkpoints import write_atomically
from tools.train.checks import name_metric
from tools.train.hardware import detect_host
from tools.train.judge import Judge
from tools.train.ranks import allow_deepspeed_on_cpu, read_rank
from tools.train.shared_prefix import accept_packs, share_prefixes


class Args(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    dequantize_once: bool | None = None
    answer_logits_only: bool | None = None
    shared_prefix: bool | None = None
    merge_aware: bool | None = None  # adapted layers compute with the weights of a 4-bit merge
    record_validation: bool | None = None  # each row's loss, and an evaluation at the last step
    processes: int | None = None  # that train together; fewer means that some train apart
    micro_batch_parts: int | None = None  # processes that share one micro-batch of the recipe


def find_last(lines: list[dict[str, Any]], name: str) -> float | None:
    """The last logged value of `name`; None where there is none."""
    return next((line[name] for line in reversed(lines) if name in line), None)


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def save_in_this_process() -> None:
    """Lets Axolotl save prepared rows without other processes, which take seconds to start.

    It starts at least one, also where `dataset_num_proc` is 0.
    """
    from datasets import Dataset

    save = Dataset.save_to_disk

    def save_to_disk(
        rows: Any, *arguments: Any, num_proc: int | None = None, **options: Any
    ) -> None:
        save(rows, *arguments, **options)

    Dataset.save_to_disk = save_to_disk


class RunPlugin(BasePlugin):
    watch: Watch | None = None  # until there is a trainer

    def get_input_args(self) -> str:
        return "tools.train.plugin.Args"

    def register(self, cfg: Any) -> None:
        import torch

        if cfg.get("dataset_num_proc") == 0:
            save_in_this_process()
        versions.skip_gpu_kernels()
        if not cfg.get("processor_type"):
            versions.skip_processor()
        if read_rank("WORLD_SIZE") > 1 and not torch.cuda.is_available():
            versions.skip_peer_check()
            # Each process's device is cpu:N, to which torch.load knows no way for an optimizer.
            torch.serialization.register_package(
                0, lambda storage: None, lambda storage, to: storage if to[:4] == "cpu:" else None
            )
            if cfg.get("deepspeed"):
                allow_deepspeed_on_cpu()

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        import torch

        if read_rank("WORLD_SIZE") > 1 and not torch.cuda.is_available():
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
        if cfg.merge_aware:
            round_in_forward(model)
        # The losses of classes with a vision tower (Qwen3.5's) do not take the moved labels.
        if cfg.answer_logits_only and not cfg.is_multimodal:
            compute_answer_logits_only(model)
        if cfg.shared_prefix:
            accept_packs(model)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        run, metric = Run(Path(cfg.output_dir)), name_metric(cfg)
        self.progress = Progress(run.folder, f"eval_{metric}" if metric else "")
        self.trainer = trainer
        self.watch = Watch(cfg, trainer, self.progress)
        count_real_tokens(trainer, self.progress)
        if cfg.shared_prefix:
            share_prefixes(trainer)
        write_atomically(trainer)
        order_by_epoch(trainer)
        if (cfg.micro_batch_parts or 1) > 1:
            weigh_parts(trainer, cfg.micro_batch_parts)
        callbacks = [self.progress, self.watch]
        judges = cfg.record_validation or cfg.early_stopping_patience or metric
        return [*callbacks, Judge(cfg, trainer, run)] if judges else callbacks

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
        real = lines[-1]["real_tokens"] if lines else 0
        parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        on_gpu, processes = torch.cuda.is_available(), read_rank("WORLD_SIZE")
        write_json(
            Path(cfg.output_dir) / "stats.json",
            {
                "steps": state.global_step,
                # Axolotl drops rows that are longer than sequence_len.
                "rows_trained": len(self.trainer.train_dataset),
                "epochs": round(state.epoch or 0.0, 4),
                "train_loss": mean([line["loss"] for line in lines if "loss" in line]),
                "last_loss": find_last(lines, "loss"),
                "last_eval_loss": find_last(lines, "eval_loss"),
                "seconds": round(seconds, 1),
                "peak_memory_bytes": max([measure_peak_memory(), *memory]),
                "real_tokens": real,  # of the rows
                "computed_tokens": int(counted.get("total", 0)),  # that went through the model
                "trained_tokens": int(counted.get("trainable", 0)),
                "tokens_per_second": round(real / seconds, 1) if seconds else None,
                "trainable_parameters": sum(p.numel() for p in parameters),
                "device": torch.cuda.get_device_name(0) if on_gpu else "cpu",
                "processes": processes,
                "machine": detect_host().describe_machine(processes),
                "weights_of_processes": self.watch.same,
                "seed": cfg.seed,
            },
        )
