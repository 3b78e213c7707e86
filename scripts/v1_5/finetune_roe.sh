#!/usr/bin/env bash
# All of RoE for LLaVA-1.5: adapters under drawn skips, then linear routers too, then everything, one launch each.
#
#   DATA_PATH=playground/data/llava_v1_5_mix665k_50.json bash scripts/v1_5/finetune_roe.sh
#
# RoE's published hyper-parameters. RoE is one run over about half of LLaVA's mixture (random_drop.py makes the half),
# of which the stages are the first 30%, the next 20% and the last 50%; temperature and bias follow that run. Each stage
# warms up and cools down on its own, where RoE has one learning-rate schedule for all. Not run by us on a 7B model: no
# pretrained weights were at hand. Writes three folders; the last holds all weights, 15 GB at 7B.
#
#   DATA_PATH       SFT JSON (required)
#   MODEL_PATH      LLaVA-1.5 checkpoint (default: llava-hf/llava-1.5-7b-hf)
#   OUTPUT          prefix of the three folders (default: checkpoints/roe-7b)
#   SKIP_RATIO      target skip ratio (default: 0.3)
#   ADAPTER_HIDDEN_DIM  width of the adapters (default: 1024)
#   SPLIT           shares of the data (default: adapter=0.3,router=0.2,finetune=0.5)
#
# Further variables: scripts/v1_5/stage.sh. Further arguments go to llava/train/train.py in every stage.
set -euo pipefail

FUZZYROE_EXTRAS="train" REQUIRED="DATA_PATH"
# shellcheck source=scripts/v1_5/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=scripts/v1_5/stage.sh
source "$(dirname "${BASH_SOURCE[0]}")/stage.sh"

OUTPUT="${OUTPUT:-checkpoints/roe-$MODEL_SIZE}"
split_data "$DATA_PATH" "$OUTPUT-data" "${SPLIT:-adapter=0.3,router=0.2,finetune=0.5}"
flags=(
  "${TRAINING[@]}"
  --roe_lr 4e-4
  --skip_ratio "${SKIP_RATIO:-0.3}"
  --warmup_ratio 0.05
  --image_aspect_ratio pad
  --group_by_modality_length True
)
train_stage roe_adapter "${MODEL_PATH:-llava-hf/llava-1.5-$MODEL_SIZE-hf}" "$OUTPUT-data/data.adapter.json" \
  "$OUTPUT-adapter" "${flags[@]}" --adapter_hidden_dim "${ADAPTER_HIDDEN_DIM:-1024}" "$@"
train_stage roe_router "$OUTPUT-adapter" "$OUTPUT-data/data.router.json" \
  "$OUTPUT-router" "${flags[@]}" "$@"
train_stage roe_finetune "$OUTPUT-router" "$OUTPUT-data/data.finetune.json" \
  "$OUTPUT-finetune" "${flags[@]}" --backbone_lr 2e-6 "$@"
