#!/usr/bin/env bash
# Trains the playground's base model from nothing and puts it into playground/digits/base (7.4 MB): generates 60,000
# canvases, trains a tokenizer, lets the vision tower learn digits, then trains the whole LLaVA by the project's own
# trainer (stage "scratch", no routing) in four courses: what stands at a place, everything, matching, everything.
# About an hour on two CPU cores. Fixed seeds; what was logged is train_log.jsonl beside the model.
#
#   bash scripts/playground/train_base.sh
#
#   WORK        folder for data and intermediate models (default: outputs/base)
#   OUTPUT      folder of the finished model (default: playground/digits/base)
set -euo pipefail

FUZZYROE_EXTRAS="train playground"
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

WORK="${WORK:-outputs/base}"
OUTPUT="${OUTPUT:-playground/digits/base}"
# One thread each for the trainer and its data worker; glibc otherwise returns every large activation to the system.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

"$PYTHON" -m playground.digits.generate --output "$WORK/data" --seed 0 --train 60000
"$PYTHON" -m playground.digits.tokenizer --data "$WORK/data" --output "$WORK/tokenizer"
for course in place match; do
  "$PYTHON" -m playground.digits.curriculum --course "$course" --input "$WORK/data/digits_train.json" \
    --output "$WORK/$course.json"
done
"$PYTHON" -m playground.digits.base_model --tokenizer "$WORK/tokenizer" --output "$WORK/untrained" --data "$WORK/data" \
  --seed 0

train() { # name, model to start from, data, steps, batch, warm-up steps, decay steps
  local flags=(
    --stage scratch
    --model_name_or_path "$2"
    --version digits
    --data_path "$3"
    --image_folder "$WORK/data/images"
    --output_dir "$WORK/$1"
    --use_cpu True
    --model_max_length 512
    --group_by_modality_length True
    --per_device_train_batch_size "$5"
    --max_steps "$4"
    --seed 0
    --learning_rate 1e-3
    --weight_decay 0.01
    --warmup_steps "$6"
    --lr_scheduler_type warmup_stable_decay
    --lr_scheduler_kwargs "{\"num_decay_steps\": $7, \"decay_type\": \"linear\", \"min_lr_ratio\": 0.02}"
    --logging_steps 25
    --dataloader_num_workers 1
    --dataloader_prefetch_factor 8
    --save_strategy no
  )
  "$PYTHON" llava/train/train.py "${flags[@]}"
}

# A decay of one step is a constant rate: the next course goes on from where this one stands.
train course-place "$WORK/untrained" "$WORK/place.json" 500 64 100 1
train course-all "$WORK/course-place" "$WORK/data/digits_train.json" 1750 32 100 1
train course-match "$WORK/course-all" "$WORK/match.json" 300 64 30 1
train course-last "$WORK/course-match" "$WORK/data/digits_train.json" 900 32 50 600

mkdir -p "$OUTPUT"
for file in config.json generation_config.json model.safetensors preprocessor_config.json tokenizer.json \
  tokenizer_config.json; do
  cp "$WORK/course-last/$file" "$OUTPUT/"
done
for course in place all match last; do
  sed "s/^{/{\"course\": \"$course\", /" "$WORK/course-$course/metrics.jsonl"
done >"$OUTPUT/train_log.jsonl"
echo "base model written to $OUTPUT; scripts/quickstart.sh measures it with lmms-eval"
