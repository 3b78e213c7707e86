#!/usr/bin/env bash
# All of FuzzyRoE for LLaVA-1.5: subsample the data, then router, adapter and finetune stage, one launch each.
#
#   DATA_PATH=playground/data/llava_v1_5_mix665k.json bash scripts/v1_5/finetune_fuzzyroe.sh
#   DATA_PATH=... MODEL_SIZE=13b bash scripts/v1_5/finetune_fuzzyroe.sh
#
# The shares are RoE's (20% router, 30% adapters, 50% everything), the router's cut to a third as in the FuzzyRoE paper.
# A stage that is finished is reused, one that was interrupted goes on; DRY_RUN=1 prints the commands.
#
#   DATA_PATH       SFT JSON (required)
#   MODEL_PATH      LLaVA-1.5 checkpoint (default: llava-hf/llava-1.5-7b-hf)
#   OUTPUT          prefix of the three folders (default: checkpoints/fuzzyroe-7b)
#   SPLIT           shares of the data (default: router=0.066,adapter=0.3,finetune=0.5)
#
# Further variables: scripts/v1_5/stage.sh. Further arguments go to llava/train/train.py in every stage.
set -euo pipefail

FUZZYROE_EXTRAS="train" REQUIRED="DATA_PATH"
# shellcheck source=scripts/v1_5/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=scripts/v1_5/stage.sh
source "$(dirname "${BASH_SOURCE[0]}")/stage.sh"

OUTPUT="${OUTPUT:-checkpoints/fuzzyroe-$MODEL_SIZE}"
split_data "$DATA_PATH" "$OUTPUT-data" "${SPLIT:-router=0.066,adapter=0.3,finetune=0.5}"
model="${MODEL_PATH:-llava-hf/llava-1.5-$MODEL_SIZE-hf}"
for stage in router adapter finetune; do
  MODEL_PATH="$model" DATA_PATH="$OUTPUT-data/data.$stage.json" OUTPUT="$OUTPUT-$stage" \
    bash "scripts/v1_5/fuzzyroe_$stage.sh" "$@"
  model="$OUTPUT-$stage"
done
