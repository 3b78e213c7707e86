#!/usr/bin/env bash
# Finetune stage of FuzzyRoE for LLaVA-1.5: trains adapters, projector and decoder together, then refits the router.
#
#   DATA_PATH=playground/data/fuzzyroe.finetune.json bash scripts/v1_5/fuzzyroe_finetune.sh
#
# Not run by us on a 7B model: no pretrained weights were at hand. Writes OUTPUT with all weights, 15 GB.
#
#   DATA_PATH       SFT JSON of this stage (required)
#   MODEL_PATH      checkpoint to start from (default: checkpoints/fuzzyroe-7b-adapter)
#   OUTPUT          folder to write (default: checkpoints/fuzzyroe-7b-finetune)
#   SKIP_RATIO      target skip ratio that the router is set to (default: 0.3)
#
# Further variables: scripts/v1_5/stage.sh. Further arguments go to llava/train/train.py.
set -euo pipefail

FUZZYROE_EXTRAS="train" REQUIRED="DATA_PATH"
# shellcheck source=scripts/v1_5/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=scripts/v1_5/stage.sh
source "$(dirname "${BASH_SOURCE[0]}")/stage.sh"

flags=(
  --roe_lr 4e-4
  --backbone_lr 2e-6
  --target_skip_ratio "${SKIP_RATIO:-0.3}"
  --warmup_ratio 0.05
  --group_by_modality_length True
)
train_stage finetune "${MODEL_PATH:-checkpoints/fuzzyroe-$MODEL_SIZE-adapter}" \
  "$DATA_PATH" \
  "${OUTPUT:-checkpoints/fuzzyroe-$MODEL_SIZE-finetune}" "${TRAINING[@]}" "${flags[@]}" "$@"
