#!/usr/bin/env bash
# LLaVA-1.5's second stage with LoRA weights in place of the language model's own weights; dense, no router.
#
#   DATA_PATH=playground/data/llava_v1_5_mix665k.json bash scripts/v1_5/finetune_lora.sh
#
# Not run by us on a 7B model: no pretrained weights were at hand. Writes OUTPUT with the LoRA weights in peft's format and
# the projector; it is loaded together with MODEL_PATH.
#
#   DATA_PATH       SFT JSON (required)
#   MODEL_PATH      checkpoint to update (default: checkpoints/llava-v1.5-7b-pretrain, which pretrain.sh writes)
#   OUTPUT          folder to write (default: checkpoints/llava-v1.5-7b-lora)
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

flags=(
  --lora_enable True
  --lora_r 128
  --lora_alpha 256
  --mm_projector_lr 2e-5
  --learning_rate 2e-4
  --warmup_ratio 0.03
  --image_aspect_ratio pad
  --group_by_modality_length True
)
train_stage dense "${MODEL_PATH:-checkpoints/llava-v1.5-$MODEL_SIZE-pretrain}" "$DATA_PATH" \
  "${OUTPUT:-checkpoints/llava-v1.5-$MODEL_SIZE-lora}" "${VISION[@]}" "${TRAINING[@]}" "${flags[@]}" "$@"
