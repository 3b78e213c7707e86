#!/usr/bin/env bash
# LLaVA-1.5's first stage: trains the projector between CLIP and Vicuna on captions, both kept as they are.
#
#   DATA_PATH=playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json \
#     IMAGE_FOLDER=playground/data/LLaVA-Pretrain/images bash scripts/v1_5/pretrain.sh
#
# Not run by us on a 7B model: no pretrained weights were at hand; LLaVA's authors report 3.5 h on 8 A100-80G for 7B.
# Writes OUTPUT, a whole LLaVA checkpoint, with mm_projector.bin in it.
#
#   DATA_PATH       captions (required)
#   MODEL_PATH      language model (default: lmsys/vicuna-7b-v1.5)
#   VISION_TOWER    CLIP checkpoint (default: openai/clip-vit-large-patch14-336)
#   OUTPUT          folder to write (default: checkpoints/llava-v1.5-7b-pretrain)
#   GLOBAL_BATCH    default here: 256; PER_DEVICE_BATCH 32; ZERO_CONFIG scripts/zero2.json; VERSION plain
#
# Further variables: scripts/v1_5/stage.sh. Further arguments go to llava/train/train.py.
set -euo pipefail

FUZZYROE_EXTRAS="train" REQUIRED="DATA_PATH"
# shellcheck source=scripts/v1_5/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
GLOBAL_BATCH="${GLOBAL_BATCH:-256}" PER_DEVICE_BATCH="${PER_DEVICE_BATCH:-32}"
VERSION="${VERSION:-plain}" ZERO_CONFIG="${ZERO_CONFIG:-scripts/zero2.json}"
# shellcheck source=scripts/v1_5/stage.sh
source "$(dirname "${BASH_SOURCE[0]}")/stage.sh"

flags=(
  --vision_tower "${VISION_TOWER:-openai/clip-vit-large-patch14-336}"
  --tune_mm_mlp_adapter True
  --learning_rate 1e-3
  --warmup_ratio 0.03
  --image_aspect_ratio square
)
train_stage pretrain "${MODEL_PATH:-lmsys/vicuna-$MODEL_SIZE-v1.5}" "$DATA_PATH" \
  "${OUTPUT:-checkpoints/llava-v1.5-$MODEL_SIZE-pretrain}" "${VISION[@]}" "${TRAINING[@]}" "${flags[@]}" "$@"
