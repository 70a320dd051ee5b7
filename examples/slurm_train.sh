#!/bin/bash
# Train on several machines under SLURM. Submit it again with the same arguments to resume:
#   sbatch examples/slurm_train.sh sdxl_gdmd prompts.file=prompts.txt loop.batch_size=256
#SBATCH --job-name=gdmd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --signal=TERM@600
# SIGTERM comes ten minutes before the end: enough to finish the iteration and save a checkpoint.
set -euo pipefail

RUN=${RUN:-runs/$1}  # in a file system that all machines see
GPUS=${SLURM_GPUS_ON_NODE:-8}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # sed reads to the end: no broken pipe
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=580  # seconds between SIGTERM and SIGKILL

if compgen -G "$RUN/checkpoints/step_*" > /dev/null; then
    ARGUMENTS=(train --resume "$RUN" --no-eval)
else
    ARGUMENTS=(train "$@" --run "$RUN" --no-eval)
fi

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$HEAD:29500" \
    -m -- gdmd "${ARGUMENTS[@]}"  # without the --, torchrun would parse --run itself
