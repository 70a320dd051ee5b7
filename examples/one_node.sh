#!/bin/bash
# Train on all GPUs of this machine. Run it again with the same arguments to resume:
#   examples/one_node.sh sdxl_gdmd prompts.file=prompts.txt
#   GPUS=2 RUN=runs/try examples/one_node.sh sd15_gdmd prompts.file=prompts.txt
set -euo pipefail

RUN=${RUN:-runs/${1:?give a recipe, then KEY=VALUE overrides}}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

if compgen -G "$RUN/checkpoints/step_*" > /dev/null; then
    exec gdmd train --resume "$RUN" --gpus "$GPUS"
fi
exec gdmd train "$@" --run "$RUN" --gpus "$GPUS"
