#!/usr/bin/env bash
# Trains the playground's base model from nothing and puts it into playground/digits/base (7.4 MB): generates 60,000
# canvases, trains a tokenizer, lets the vision tower learn digits, then trains the whole LLaVA by the project's own
# trainer (stage "scratch", no routing). About 35 minutes on two CPU cores. Fixed seed; the log is train_log.jsonl.
#
#   bash scripts/playground/train_base.sh
#
#   WORK        folder for data and intermediate models (default: outputs/base)
#   OUTPUT      folder of the finished model (default: playground/digits/base)
#   MAX_STEPS   optimizer steps of 32 conversations (default: 3000)
set -euo pipefail

FUZZYROE_EXTRAS="train playground"
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

WORK="${WORK:-outputs/base}"
OUTPUT="${OUTPUT:-playground/digits/base}"
MAX_STEPS="${MAX_STEPS:-3000}"
DECAY_STEPS=$((MAX_STEPS * 7 / 30))
# One thread each for the trainer and its data worker; glibc otherwise returns every large activation to the system.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

"$PYTHON" -m playground.digits.generate --output "$WORK/data" --seed 0 --train 60000
"$PYTHON" -m playground.digits.tokenizer --data "$WORK/data" --output "$WORK/tokenizer"
"$PYTHON" -m playground.digits.base_model --tokenizer "$WORK/tokenizer" --output "$WORK/untrained" --seed 0
"$PYTHON" -m playground.digits.pretrain_tower --model "$WORK/untrained" --data "$WORK/data" --seed 0

flags=(
  --stage scratch
  --model_name_or_path "$WORK/untrained"
  --version digits
  --data_path "$WORK/data/digits_train.json"
  --image_folder "$WORK/data/images"
  --output_dir "$WORK/trained"
  --use_cpu True
  --model_max_length 512
  --group_by_modality_length True
  --per_device_train_batch_size 32
  --max_steps "$MAX_STEPS"
  --seed 0
  --learning_rate 1e-3
  --weight_decay 0.01
  --warmup_steps 200
  --lr_scheduler_type warmup_stable_decay
  --lr_scheduler_kwargs "{\"num_decay_steps\": $DECAY_STEPS, \"decay_type\": \"linear\", \"min_lr_ratio\": 0.02}"
  --logging_steps 50
  --dataloader_num_workers 1
  --dataloader_prefetch_factor 8
  --save_strategy steps
  --save_steps 250
  --save_total_limit 3
)
"$PYTHON" llava/train/train.py "${flags[@]}" "$@"

mkdir -p "$OUTPUT"
cp "$WORK/trained/"{config.json,generation_config.json,model.safetensors,preprocessor_config.json} "$OUTPUT/"
cp "$WORK/trained/"{tokenizer.json,tokenizer_config.json} "$OUTPUT/"
cp "$WORK/trained/metrics.jsonl" "$OUTPUT/train_log.jsonl"
echo "base model written to $OUTPUT; measure it with lmms-eval: bash scripts/quickstart.sh"
