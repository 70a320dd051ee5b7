#!/bin/bash
# Train on several machines without a scheduler: run the same command on each of them; HEAD is the name of one of them.
# Run it again on all of them with the same arguments to resume.
#   HEAD=node1 NODES=2 RUN=/shared/runs/first examples/several_nodes.sh sdxl_gdmd prompts.file=/shared/prompts.txt
set -euo pipefail

: "${HEAD:?the name or address of one of the machines, the same on all}" "${NODES:?how many machines}"
: "${RUN:?a run folder that all machines see}" "${1:?a recipe, then KEY=VALUE overrides}"
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}  # of this machine; equal on all
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-580}  # seconds between SIGTERM and SIGKILL

if compgen -G "$RUN/checkpoints/step_*" > /dev/null; then
    ARGUMENTS=(train --resume "$RUN" --no-eval)
else
    ARGUMENTS=(train "$@" --run "$RUN" --no-eval)
fi

exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" \
    --rdzv-id "$(basename "$RUN")" --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" \
    -m -- gdmd "${ARGUMENTS[@]}"  # without the --, torchrun would parse --run itself
