#!/usr/bin/env bash
# Evaluates one checkpoint with lmms-eval: dense, and routed at each skip rate, with the same harness and batch size.
#
#   MODEL_PATH=checkpoints/fuzzyroe-7b bash scripts/v1_5/eval.sh
#   MODEL_PATH=... TASKS=pope,mme SKIP_RATES="off 0.3" NUM_GPUS=4 bash scripts/v1_5/eval.sh --limit 100
#
# Makes OUTPUT/dense and OUTPUT/skip_RATE, each with lmms-eval's results and samples and with routing.jsonl (the layers
# that every request ran, its times), then prints one table. Needs a GPU with 16 GB for a 7B model in float16, and a few
# hours for the default tasks on one; runs on a CPU for small models. Exit status 2 if any result is missing.
#
#   MODEL_PATH      checkpoint folder or hub id (required)
#   TASKS           lmms-eval tasks, separated by commas; the default adds mmvet, which is judged by OpenAI's API, only
#                   where OPENAI_API_KEY is set
#   SKIP_RATES      mean skip rates, separated by blanks; "off" is the dense model (default: "off 0.25 0.3")
#   OUTPUT          folder of the runs (default: outputs/eval/NAME_OF_MODEL)
#   CONV_TEMPLATE   conversation template (default: the one the checkpoint was trained with)
#   BATCH_SIZE      requests per batch and GPU (default: 8)
#   DTYPE           auto, float16, bfloat16 or float32 (default: auto)
#   INCLUDE_PATH    folder of local tasks, e.g. playground/digits/lmms_eval
#   OFFLINE=1       use no network; list the data sets that are not on this machine before a model is loaded
#   NUM_GPUS, DRY_RUN   see scripts/v1_5/common.sh
#
# Further arguments go to lmms-eval.
set -euo pipefail

FUZZYROE_EXTRAS="eval" REQUIRED="MODEL_PATH"
# shellcheck source=scripts/v1_5/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

default_tasks="gqa,textvqa_val,mme,pope,scienceqa_img,mmbench_en,seedbench${OPENAI_API_KEY:+,mmvet}"
TASKS="${TASKS:-$default_tasks}"
SKIP_RATES="${SKIP_RATES:-off 0.25 0.3}"
OUTPUT="${OUTPUT:-outputs/eval/$(basename "$MODEL_PATH")}"
BATCH_SIZE="${BATCH_SIZE:-8}"

# `accelerate launch` without its other commands, which need packages that are not needed here; everything it would
# otherwise look for in a configuration file is given
launch=(
  "$PYTHON" -m accelerate.commands.launch
  --num_processes "$NUM_GPUS"
  --num_machines 1
  --mixed_precision no
  --dynamo_backend no
)
if ((NUM_GPUS > 1)); then
  ((NUM_GPUS <= VISIBLE_GPUS)) || [[ -n "${DRY_RUN:-}" ]] ||
    fail "NUM_GPUS is $NUM_GPUS, but $VISIBLE_GPUS are visible; give at most that many, or 1 to run on a CPU."
  launch+=(--multi_gpu --main_process_port "${MASTER_PORT:-0}")
elif ((VISIBLE_GPUS == 0)); then
  launch+=(--cpu)
fi

if [[ -n "${OFFLINE:-}" ]]; then
  export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
  run "$PYTHON" -m llava.eval.datasets_offline --tasks "$TASKS" ${INCLUDE_PATH:+--include-path "$INCLUDE_PATH"}
fi

evaluate() { # folder, skip rate, arguments for lmms-eval...
  local folder="$1" rate="$2" model_args
  shift 2
  model_args="pretrained=$MODEL_PATH,skip_rate=$rate${CONV_TEMPLATE:+,conv_template=$CONV_TEMPLATE}"
  model_args+=",dtype=${DTYPE:-auto},routing_log=$folder/routing.jsonl"
  local arguments=(
    --model fuzzyroe
    --model_args "$model_args"
    --tasks "$TASKS"
    --batch_size "$BATCH_SIZE"
    --log_samples
    --output_path "$folder"
    ${INCLUDE_PATH:+--include_path "$INCLUDE_PATH"}
  )
  run "${launch[@]}" -m lmms_eval "${arguments[@]}" "$@"
  run "$PYTHON" -m llava.report.evaluation check --tasks "$TASKS" "$folder" # lmms-eval exits with 0 when it fails
}

folders=()
for rate in $SKIP_RATES; do
  if [[ "$rate" == off ]]; then folder="$OUTPUT/dense"; else folder="$OUTPUT/skip_$rate"; fi
  if compgen -G "$folder/*/*_results.json" >/dev/null; then
    fail "$folder holds the results of an earlier run; remove it, or name another OUTPUT or other SKIP_RATES."
  fi
  folders+=("$folder")
done

index=0
for rate in $SKIP_RATES; do
  say "skip rate $rate into ${folders[index]}"
  evaluate "${folders[index]}" "$rate" "$@"
  index=$((index + 1))
done
if ((${#folders[@]} > 1)); then
  run "$PYTHON" -m llava.report.evaluation check --tasks "$TASKS" "${folders[@]}"
fi
