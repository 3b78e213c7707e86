#!/usr/bin/env bash
# Router stage of FuzzyRoE for LLaVA-1.5: fits the fuzzy router by forward passes; no optimizer, nothing trains.
#
#   DATA_PATH=playground/data/fuzzyroe.router.json bash scripts/v1_5/fuzzyroe_router.sh
#
# Not run by us on a 7B model: no pretrained weights were at hand. Writes OUTPUT with config, rule base and router.
#
#   DATA_PATH       SFT JSON of this stage (required)
#   MODEL_PATH      checkpoint to start from (default: llava-hf/llava-1.5-7b-hf)
#   OUTPUT          folder to write (default: checkpoints/fuzzyroe-7b-router)
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
  --adapter_hidden_dim "${ADAPTER_HIDDEN_DIM:-1024}"
  --rule_base "${RULE_BASE:-default}"
  --target_skip_ratio "${SKIP_RATIO:-0.3}"
)
train_stage router "${MODEL_PATH:-llava-hf/llava-1.5-$MODEL_SIZE-hf}" \
  "$DATA_PATH" \
  "${OUTPUT:-checkpoints/fuzzyroe-$MODEL_SIZE-router}" "${READING[@]}" "${flags[@]}" "$@"
