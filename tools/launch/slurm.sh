#!/usr/bin/env bash
# Trains on GPU nodes under Slurm, one process for each GPU; goes on by itself after the time limit and after preemption.
#
#   sbatch --nodes=2 tools/launch/slurm.sh train --config=llama_1b --workdir=/shared/runs/mine
#   sbatch --nodes=1 --gpus-per-node=4 --ntasks-per-node=4 --time=2:00:00 tools/launch/slurm.sh ...
#
# Submit it from the checkout, whose .venv has jaxlm (JAXLM=PATH names another); workdir and corpus lie on a file system that all nodes share. jax finds the
# coordinator in Slurm's variables, and each process takes the GPU of its number on the node, so do not bind GPUs to tasks (no --gpus-per-task).
# Five minutes before the limit the run is asked to save and end; it is then queued again until it has FINISHED, at most JAXLM_RESTARTS (100) times.
#SBATCH --job-name=jaxlm
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=jaxlm-%j.log
set -euo pipefail
workdir=
for argument in "$@"; do
  case $argument in --workdir=*) workdir=${argument#*=} ;; esac
done
if [ "${1:-}" != train ] || [ -z "$workdir" ]; then
  echo "usage: sbatch [options of sbatch] $0 train --config=... --workdir=/SHARED/FOLDER" >&2
  exit 2
fi

code=0
srun --kill-on-bad-exit=1 "${JAXLM:-.venv/bin/jaxlm}" "$@" || code=$?
if [ -e "$workdir/FINISHED" ]; then
  echo "jaxlm: $workdir has finished"
elif [ "$code" -eq 2 ]; then
  echo "jaxlm: a mistake of the command (code 2): not queued again" >&2
elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${JAXLM_RESTARTS:-100}" ]; then
  echo "jaxlm: ended with code $code after ${SLURM_RESTART_COUNT} restarts: not queued again" >&2
else
  echo "jaxlm: ended with code $code before the run's end: queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
