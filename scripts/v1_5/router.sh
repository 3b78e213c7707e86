#!/usr/bin/env bash
# Router stage of FuzzyRoE for LLaVA-1.5-7B: fits the fuzzy router by forward passes; no optimizer, nothing trains.
#
#   DATA_PATH=playground/data/fuzzyroe.router.json bash scripts/v1_5/router.sh
#
# Not run by us on a 7B model: no pretrained weights were at hand. Writes OUTPUT with config, rule base and router.
#
#   DATA_PATH       SFT JSON of this stage (required); IMAGE_FOLDER (default: playground/data)
#   MODEL_PATH      checkpoint to start from (default: llava-hf/llava-1.5-7b-hf)
#   OUTPUT          folder to write (default: checkpoints/fuzzyroe-7b-router)
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
  --adapter_hidden_dim "${ADAPTER_HIDDEN_DIM:-1024}"
  --rule_base "${RULE_BASE:-default}"
  --skip_ratio "${SKIP_RATIO:-0.3}"
  --model_max_length 2048
  --dataloader_num_workers 4
)
train_stage router "${MODEL_PATH:-llava-hf/llava-1.5-7b-hf}" "${DATA_PATH:?path to the SFT JSON of this stage}" \
  "${OUTPUT:-checkpoints/fuzzyroe-7b-router}" "${flags[@]}" "$@"
