#!/usr/bin/env bash
# Finetunes a finished LLaVA-1.5 on data of one's own; dense, no router. With LORA=1 by LoRA.
#
#   DATA_PATH=my_task.json IMAGE_FOLDER=my_images bash scripts/v1_5/finetune_task.sh
#
# Not run by us on a 7B model: no pretrained weights were at hand. Writes OUTPUT with all weights, or the LoRA weights.
#
#   DATA_PATH       SFT JSON (required)
#   MODEL_PATH      LLaVA checkpoint (default: llava-hf/llava-1.5-7b-hf)
#   OUTPUT          folder to write (default: checkpoints/llava-v1.5-7b-task, with LORA=1 ...-task-lora)
#   PER_DEVICE_BATCH  default here: 16
#
# Further variables: scripts/v1_5/stage.sh. Further arguments go to llava/train/train.py.
set -euo pipefail

FUZZYROE_EXTRAS="train" REQUIRED="DATA_PATH"
# shellcheck source=scripts/v1_5/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
PER_DEVICE_BATCH="${PER_DEVICE_BATCH:-16}"
# shellcheck source=scripts/v1_5/stage.sh
source "$(dirname "${BASH_SOURCE[0]}")/stage.sh"

if [[ -n "${LORA:-}" ]]; then
  rates=(--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --learning_rate 2e-4)
else
  rates=(--learning_rate 2e-5)
fi
flags=(
  "${rates[@]}"
  --warmup_ratio 0.03
  --image_aspect_ratio pad
  --group_by_modality_length True
)
train_stage dense "${MODEL_PATH:-llava-hf/llava-1.5-$MODEL_SIZE-hf}" "$DATA_PATH" \
  "${OUTPUT:-checkpoints/llava-v1.5-$MODEL_SIZE-task${LORA:+-lora}}" "${VISION[@]}" "${TRAINING[@]}" "${flags[@]}" "$@"
