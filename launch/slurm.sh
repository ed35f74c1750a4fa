#!/bin/bash
# An array over recipes, one a task; GPUs, nodes and time are options of sbatch:
#
#   sbatch --array=0-2 --gpus-per-node=1 --time=4:00:00 launch/slurm.sh sentiment_r4 ner_r4 headline_r4
#   sbatch --nodes=2 --gpus-per-node=4 --time=4:00:00 launch/slurm.sh sentiment_r8_fp16
#
# From the project's folder, on a disk that all nodes share, after `make setup data`. A task that is
# told to end (time limit, scancel, preemption) saves a checkpoint and the same command goes on.
#SBATCH --job-name=finlora
#SBATCH --ntasks-per-node=1
#SBATCH --output=runs/slurm-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the time limit: enough for a step and a checkpoint.
#SBATCH --signal=TERM@120
set -euo pipefail

recipes=("$@")
index=${SLURM_ARRAY_TASK_ID:-0}
[ "$index" -lt "${#recipes[@]}" ] || { echo "error: --array goes to $index, and ${#recipes[@]} recipes are named" >&2; exit 2; }
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RECIPE=${recipes[$index]} RDZV="$first:$((20000 + SLURM_JOB_ID % 10000))"
export PROFILE=${PROFILE:-} NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-}}

# srun starts one command a node and hands signals on to all of them.
exec srun --kill-on-bad-exit=1 bash -c 'exec .venv/bin/python -m tools train "$RECIPE" \
  ${PROFILE:+--profile "$PROFILE"} ${NPROC:+--nproc "$NPROC"} \
  --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --rdzv "$RDZV"'
