#!/usr/bin/env bash
# Sourced by the stage scripts: runs one training stage as one launch, or reuses it if it is finished.
#
#   train_stage STAGE MODEL DATA OUTPUT [flag...]
#   split_data DATA FOLDER SHARES                    disjoint parts of the data, FOLDER/data.NAME.json
#
# A finished stage is reused when its flags, its data and the model it started from are the same; FRESH=1 does it again.
# A stage that was interrupted left OUTPUT.partial: it goes on from its newest whole step checkpoint there, from its
# beginning if there is none. Exit code 2 means bad input, found before a model is loaded; an earlier OUTPUT stays until
# the new one is complete.
#
#   MODEL_SIZE            7b or 13b: which models and folders are the defaults (default: 7b)
#   ZERO_CONFIG           DeepSpeed configuration (default: scripts/zero3.json)
#   GLOBAL_BATCH          samples per optimizer step over all processes (default: 128)
#   PER_DEVICE_BATCH      samples per process and pass (default: 4); accumulation follows from the two
#   IMAGE_FOLDER          folder that image paths are relative to (default: playground/data)
#   VERSION               conversation template (default: v1)
#   SAVE_STEPS            optimizer steps between step checkpoints (default: 1000)
#   NUM_WORKERS           processes per rank that read data (default: 4)
#   REPORT_TO             none, tensorboard or wandb (default: none)
#   SKIP_DATA_CHECK=1     start without looking at records and images
#   DECODE=1              decode every image in that look as well; finds damage in the middle of a file, takes longer
#   NUM_GPUS, DRY_RUN     see scripts/v1_5/common.sh; on a machine without a GPU two CPU processes are started
#   LAUNCHER, HOSTFILE, NUM_NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     see scripts/v1_5/launch.sh
set -euo pipefail

# shellcheck source=scripts/v1_5/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

MODEL_SIZE="${MODEL_SIZE:-7b}"
[[ "$MODEL_SIZE" == 7b || "$MODEL_SIZE" == 13b ]] ||
  fail "MODEL_SIZE is '$MODEL_SIZE'; use 7b or 13b, and MODEL_PATH and OUTPUT for any other model."
GLOBAL_BATCH="${GLOBAL_BATCH:-128}"
PER_DEVICE_BATCH="${PER_DEVICE_BATCH:-4}"
IMAGE_FOLDER="${IMAGE_FOLDER:-playground/data}"
VERSION="${VERSION:-v1}"
ZERO_CONFIG="${ZERO_CONFIG:-scripts/zero3.json}"

READING=( # flags of every stage
  --model_max_length 2048
  --dataloader_num_workers "${NUM_WORKERS:-4}"
  --lazy_preprocess True
  --report_to "${REPORT_TO:-none}"
)
TRAINING=( # flags of every stage that trains; LLaVA's and RoE's
  "${READING[@]}"
  --num_train_epochs 1
  --weight_decay 0.
  --lr_scheduler_type cosine
  --gradient_checkpointing True
  --logging_steps 1
  --save_strategy steps
  --save_steps "${SAVE_STEPS:-1000}"
  --save_total_limit 1
)
VISION=( # vision settings of LLaVA-1.5
  --mm_projector_type mlp2x_gelu
  --mm_vision_select_layer -2
  --mm_use_im_start_end False
  --mm_use_im_patch_token False
)
export TOKENIZERS_PARALLELISM=false
# PyTorch and DeepSpeed announce renamed collectives once per call; nothing a user of these scripts can act on.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"

((GLOBAL_BATCH % (PER_DEVICE_BATCH * NUM_RANKS) == 0)) ||
  fail "GLOBAL_BATCH $GLOBAL_BATCH is no multiple of PER_DEVICE_BATCH $PER_DEVICE_BATCH x $NUM_RANKS processes; change one."
ACCUMULATION=$((GLOBAL_BATCH / (PER_DEVICE_BATCH * NUM_RANKS)))

split_data() { # data, folder, name=share,...: parts that have no record in common
  local last="${3##*,}"
  run mkdir -p "$2"
  wait_for_node_0 "$2/data.${last%%=*}.json.manifest.json" # the last file that is written; then all are found there
  run "$PYTHON" random_drop.py --input "$1" --output "$2/data.json" --seed 42 --split "$3"
}

value_of() { # name, flags...: the last value that a flag is given, in either way of writing it
  local name="--$1" value="" previous="" word
  shift
  for word in "$@"; do
    if [[ "$previous" == "$name" ]]; then value="$word"; fi
    if [[ "$word" == "$name="* ]]; then value="${word#"$name="}"; fi
    previous="$word"
  done
  printf '%s' "$value"
}

check_data() { # flags...: look at records, images and lengths as this training would read them
  local tower length
  tower="$(value_of vision_tower "$@")" length="$(value_of model_max_length "$@")"
  local words=(
    "$(value_of data_path "$@")"
    --image-folder "$(value_of image_folder "$@")"
    --version "$(value_of version "$@")"
    --model "$(value_of model_name_or_path "$@")"
    ${tower:+--vision-tower "$tower"}
    ${length:+--model-max-length "$length"}
    ${DECODE:+--decode}
  )
  if [[ "$(value_of allow_truncation "$@")" == [Tt]rue ]]; then words+=(--allow-truncation); fi
  "$PYTHON" -c "from llava.cli import main; main()" check-data "${words[@]}"
}

run_hash() { # data, model, flags...: what a stage's result depends on
  local data="$1" model="$2"
  shift 2
  {
    printf '%s\n' "$model" "$NUM_RANKS" "$@"
    cat "$data"
    cat "$ZERO_CONFIG" "$model/stage.json" "$model/config.json" 2>/dev/null || true
  } | sha256sum | cut -d' ' -f1
}

train_stage() { # stage, model, data, output, flags...
  local stage="$1" model="$2" data="$3" output="$4" mark="" resume="" port="${MASTER_PORT:-29500}" found
  shift 4
  local flags=(
    --stage "$stage"
    --model_name_or_path "$model"
    --data_path "$data"
    --image_folder "$IMAGE_FOLDER"
    --version "$VERSION"
    --deepspeed "$ZERO_CONFIG"
    --per_device_train_batch_size "$PER_DEVICE_BATCH"
    --gradient_accumulation_steps "$ACCUMULATION"
    "${PRECISION[@]}"
    "$@"
  )
  if [[ -n "${FRESH:-}" ]]; then resume=none; fi
  if [[ -z "${DRY_RUN:-}" ]]; then
    found="$output"
    if [[ ! -e "$output" && -d "$output.old" ]]; then # killed while replacing it
      if ((NODE_RANK == 0)); then mv "$output.old" "$output"; else found="$output.old"; fi
    fi
    if [[ -f "$data" ]]; then mark="$(run_hash "$data" "$model" "${flags[@]}")"; fi
    if [[ -z "${FRESH:-}" && -n "$mark" && "$(cat "$found/run_hash" 2>/dev/null)" == "$mark" ]]; then
      say "$stage: finished before, reused from $output (FRESH=1 does it again)"
      return
    fi
    if [[ -d "$output.partial" ]]; then say "$stage: an earlier run was interrupted"; fi
    command -v deepspeed >/dev/null ||
      fail "DeepSpeed is not installed in this environment; run pip install 'fuzzyroe[train]' and start again."
    [[ -n "${SKIP_DATA_CHECK:-}" ]] || check_data "${flags[@]}"
    port="$(choose_port)"
  fi
  say "$stage: $NUM_RANKS processes, global batch $GLOBAL_BATCH, into $output"
  launch "$port" llava/train/train.py \
    --output_dir "$output" --skip_data_check True ${mark:+--run_hash "$mark"} \
    ${resume:+--resume_from_checkpoint "$resume"} "${flags[@]}"
  # DeepSpeed's launcher ends with status 0 when the process below it is killed
  ((NODE_RANK > 0)) || [[ -n "${DRY_RUN:-}" || "$(cat "$output/run_hash" 2>/dev/null)" == "$mark" ]] ||
    { say "error: $stage ended without writing $output; start it again." >&2; exit 1; }
}
