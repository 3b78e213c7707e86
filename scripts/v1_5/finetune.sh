#!/usr/bin/env bash
# LLaVA-1.5's second stage: trains projector and language model on instructions; dense, no router.
#
#   DATA_PATH=playground/data/llava_v1_5_mix665k.json bash scripts/v1_5/finetune.sh
#
# Not run by us on a 7B model: no pretrained weights were at hand; LLaVA's authors report 10 h on 8 A100-40G for 7B.
# Writes OUTPUT with all weights, 14 GB at 7B.
#
#   DATA_PATH       SFT JSON (required)
#   MODEL_PATH      language model (default: lmsys/vicuna-7b-v1.5), or the checkpoint that pretrain.sh wrote; that has
#                   tower and projector inside, so set VISION_TOWER= and PROJECTOR= to nothing
#   VISION_TOWER    CLIP checkpoint (default: openai/clip-vit-large-patch14-336)
#   PROJECTOR       pretrained projector (default: checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin)
#   OUTPUT          folder to write (default: checkpoints/llava-v1.5-7b)
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

VISION_TOWER="${VISION_TOWER-openai/clip-vit-large-patch14-336}"
PROJECTOR="${PROJECTOR-checkpoints/llava-v1.5-$MODEL_SIZE-pretrain/mm_projector.bin}"
flags=(
  ${VISION_TOWER:+--vision_tower "$VISION_TOWER"}
  ${PROJECTOR:+--pretrain_mm_mlp_adapter "$PROJECTOR"}
  --learning_rate 2e-5
  --warmup_ratio 0.03
  --image_aspect_ratio pad
  --group_by_modality_length True
)
train_stage dense "${MODEL_PATH:-lmsys/vicuna-$MODEL_SIZE-v1.5}" "$DATA_PATH" \
  "${OUTPUT:-checkpoints/llava-v1.5-$MODEL_SIZE}" "${VISION[@]}" "${TRAINING[@]}" "${flags[@]}" "$@"
