#!/usr/bin/env bash
# Adapter stage of FuzzyRoE for LLaVA-1.5-7B: trains what stands in for a skipped layer, then refits the router.
#
#   DATA_PATH=playground/data/fuzzyroe.adapter.json bash scripts/v1_5/adapter.sh
#
# Not run by us on a 7B model: no pretrained weights were at hand. Writes OUTPUT with 268 M adapter weights.
#
#   DATA_PATH       SFT JSON of this stage (required); IMAGE_FOLDER (default: playground/data)
#   MODEL_PATH      checkpoint to start from (default: checkpoints/fuzzyroe-7b-router)
#   OUTPUT          folder to write (default: checkpoints/fuzzyroe-7b-adapter)
#   SKIP_RATIO      mean skip rate the router is set to (default: 0.3)
#
# Further variables: scripts/v1_5/stage.sh. Further arguments go to llava/train/train.py.
set -euo pipefail

FUZZYROE_EXTRAS="train"
# shellcheck source=scripts/v1_5/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
IMAGE_FOLDER="${IMAGE_FOLDER:-playground/data}"
# shellcheck source=scripts/v1_5/stage.sh
source "$(dirname "${BASH_SOURCE[0]}")/stage.sh"

flags=(
  --roe_lr 4e-4
  --skip_ratio "${SKIP_RATIO:-0.3}"
  --model_max_length 2048
  --dataloader_num_workers 4
  --num_train_epochs 1
  --weight_decay 0.
  --warmup_steps 0.05
  --lr_scheduler_type cosine
  --gradient_checkpointing True
  --group_by_modality_length True
  --logging_steps 1
  --save_strategy no
)
train_stage adapter "${MODEL_PATH:-checkpoints/fuzzyroe-7b-router}" "${DATA_PATH:?path to the SFT JSON of this stage}" \
  "${OUTPUT:-checkpoints/fuzzyroe-7b-adapter}" "${flags[@]}" "$@"
