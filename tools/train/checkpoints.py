"""Checkpoints: written whole or not at all, verified before training resumes from one."""

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from tools.common import JobFailed, digest, name_owner, shown, write_json
from tools.runs import Run, step_of
from tools.train.ranks import gather


def is_sound(checkpoint: Path) -> bool:
    """Whether a checkpoint is what was written: by its digests, and no weight is NaN.

    Where it has none (plain `axolotl train` wrote it), its tensors and archives must open.
    """
    from safetensors import SafetensorError, safe_open

    try:
        seal = checkpoint / "checkpoint.json"
        if seal.is_file():
            told = json.loads(seal.read_text())
            if any(digest(checkpoint / name) != value for name, value in told.items()):
                return False
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        with safe_open(checkpoint / "adapter_model.safetensors", "pt") as tensors:
            names = list(tensors.keys())
            finite = all(tensors.get_tensor(name).isfinite().all() for name in names)
        archives = [checkpoint / name for name in ("optimizer.pt", "scheduler.pt")]
        whole = seal.is_file() or all(zipfile.ZipFile(a).testzip() is None for a in archives)
        return whole and finite and bool(names) and state["global_step"] == step_of(checkpoint)
    except PermissionError as error:  # another user's, and perhaps sound
        path = Path(error.filename or checkpoint)
        raise JobFailed(
            f"{shown(path)} cannot be read: {error.strerror}{name_owner(path)}"
        ) from None
    except (OSError, ValueError, KeyError, SafetensorError, zipfile.BadZipFile):
        return False


def last_checkpoint(run: Run) -> int:
    """The step of the newest sound checkpoint, 0 without one; damaged ones are renamed."""
    for folder in run.checkpoints():
        if is_sound(folder):
            return step_of(folder)
        print(f"train      {shown(folder)} is damaged and left out")
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    return 0


def write_atomically(trainer: Any) -> None:
    """Lets a checkpoint appear whole or not at all, with the SHA-256 of its files.

    It is written under `.writing/`, flushed to the disk and renamed. `checkpoint.json` inside it
    holds what `tools.train.launch` compares before it resumes.
    """
    from transformers.trainer_utils import rotate_checkpoints

    write, folder = trainer._save_checkpoint, trainer._get_output_dir

    def save(model: Any, trial: Any, **kwargs: Any) -> None:
        run = Path(folder(trial=trial))
        part, name = run / ".writing", f"checkpoint-{trainer.state.global_step}"
        if trainer.args.should_save:
            shutil.rmtree(part, ignore_errors=True)
        gather(None)  # nobody writes before the folder is empty
        trainer._get_output_dir = lambda trial: str(part)
        try:
            write(model, trial, **kwargs)
        finally:
            trainer._get_output_dir = folder
        gather(None)  # nor is it moved before everybody has written
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
        gather(None)

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
