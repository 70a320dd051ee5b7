#!/bin/bash
# Train on several machines under SLURM; submitted again with the same words it goes on where it stopped:
#   sbatch examples/slurm_train.sh sdxl_gdmd prompts.file=prompts.txt loop.batch_size=256
#SBATCH --job-name=gdmd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --signal=TERM@600
# SIGTERM comes ten minutes before the end: the iteration is finished and a checkpoint saved.
set -euo pipefail

RUN=${RUN:-runs/$1}  # in a file system that all machines see
GPUS=${SLURM_GPUS_ON_NODE:-8}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # reads to the end: no broken pipe
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=580  # seconds between SIGTERM and SIGKILL

if compgen -G "$RUN/checkpoints/step_*" > /dev/null; then
    WORDS=(train --resume "$RUN" --no-eval)
else
    WORDS=(train "$@" --run "$RUN" --no-eval)
fi

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" \
    -m -- gdmd "${WORDS[@]}"  # without the -- torchrun takes --run for one of its own words
