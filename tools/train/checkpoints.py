"""Checkpoints: written whole or not at all, verified before training resumes from one."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tools.common import digest, shown, write_json
from tools.runs import Run, step_of
from tools.train.ranks import gather

SEAL = "checkpoint.json"  # the SHA-256 of each file of a checkpoint


def is_sound(checkpoint: Path) -> bool:
    """Whether a checkpoint's files are those that were written, and no weight is NaN or infinite.

    Raises PermissionError where another user's files cannot be read: they may be sound.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        digests = json.loads((checkpoint / SEAL).read_text())
        if any(digest(checkpoint / name) != value for name, value in digests.items()):
            return False
        tensors = load_file(checkpoint / "adapter_model.safetensors")
        return all(tensor.isfinite().all() for tensor in tensors.values())
    except PermissionError:
        raise
    except (OSError, ValueError, SafetensorError):
        return False


def last_checkpoint(run: Run) -> int:
    """The step of the newest sound checkpoint, 0 without one; renames damaged ones."""
    for folder in run.checkpoints():
        if is_sound(folder):
            return step_of(folder)
        print(f"train      {shown(folder)} is damaged and left out")
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    return 0


def write_atomically(trainer: Any) -> None:
    """Makes a trainer's checkpoints appear whole or not at all.

    A checkpoint is written to `.writing/`, sealed, flushed to the disk and renamed.
    """
    from transformers.trainer_utils import rotate_checkpoints

    write, get_folder = trainer._save_checkpoint, trainer._get_output_dir

    def save(model: Any, trial: Any, **kwargs: Any) -> None:
        run, state = Path(get_folder(trial=trial)), trainer.state
        part, name = run / ".writing", f"checkpoint-{state.global_step}"
        if trainer.args.should_save:
            shutil.rmtree(part, ignore_errors=True)
        gather(None)  # no process writes before the folder is empty
        trainer._get_output_dir = lambda trial: str(part)
        try:
            write(model, trial, **kwargs)
        finally:
            trainer._get_output_dir = get_folder
        gather(None)  # nothing is moved before all processes have written
        if trainer.args.should_save:
            best = state.best_model_checkpoint
            if best and Path(best).parent == part:
                state.best_model_checkpoint = str(run / name)
                state.save_to_json(str(part / name / "trainer_state.json"))
            seal(part / name)
            shutil.rmtree(run / name, ignore_errors=True)
            os.replace(part / name, run / name)
            rotate_checkpoints(str(run), trainer.args.save_total_limit, state.best_model_checkpoint)
        gather(None)

    trainer._save_checkpoint = save


def seal(checkpoint: Path) -> None:
    """Flushes a checkpoint to the disk and writes its SEAL."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for path in [*files, checkpoint]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    digests = {str(path.relative_to(checkpoint)): digest(path) for path in files}
    write_json(checkpoint / SEAL, digests)
