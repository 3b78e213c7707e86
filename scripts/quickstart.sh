#!/usr/bin/env bash
# The whole road on a small real model: environment, data, three ZeRO-3 stages, lmms-eval, one table and one report.
#
#   bash scripts/quickstart.sh            at most 25 minutes on two CPU cores, installs included; no GPU
#   bash scripts/quickstart.sh --fresh    keeps the environment, does all stages and evaluations again
#
# The base model (playground/digits/base) answers questions about scanned handwritten digits. Its training data is
# subsampled by random_drop.py, the fuzzy router is calibrated, adapters are trained, the routed model is finetuned, and
# the released lmms-eval asks 2,400 questions about unseen scans and 200 without image, dense and at several skip
# rates. What was finished before is reused; what was interrupted is done again. Exit status 1 if a stage did not run
# under ZeRO-3 on all ranks or if an evaluation lacks items.
#
#   OUTPUT       folder of results (default: outputs/quickstart)
#   SKIP_RATES   skip rates to evaluate (default: "0.3 0.4")
#   ORDER        router-first (default), or adapter-first: RoE's order, adapters on random skips before the router
#   NUM_TRAIN    canvases to train on (default: 24000)
set -euo pipefail

case "${1:-}" in
  "") ;;
  --fresh) export FRESH=1 ;;
  -h | --help) sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
  *) echo "quickstart: unknown argument '$1'; only --fresh and --help are known." >&2; exit 2 ;;
esac

started=$SECONDS
FUZZYROE_EXTRAS="train eval playground"
# shellcheck source=scripts/v1_5/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/v1_5/common.sh"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

BASE=playground/digits/base
DATA=playground/data/digits
OUTPUT="${OUTPUT:-outputs/quickstart}"
SKIP_RATES="${SKIP_RATES:-0.3 0.4}"
GLOBAL_BATCH=64 PER_DEVICE_BATCH=32 IMAGE_FOLDER="$DATA/images" VERSION=digits
((VISIBLE_GPUS < 2)) || PER_DEVICE_BATCH=$((64 / NUM_GPUS))
# shellcheck source=scripts/v1_5/stage.sh
source scripts/v1_5/stage.sh
mkdir -p "$OUTPUT"

say "1/4 data: digits on canvases, subsampled for each stage"
"$PYTHON" -m playground.digits.generate --output "$DATA" --seed 0 --train "${NUM_TRAIN:-24000}"
"$PYTHON" random_drop.py --input "$DATA/digits_train.json" --output "$DATA/stages.json" --seed 42 \
  --split router=0.1,adapter=0.4,finetune=0.5 --overwrite

say "2/4 training: router, adapter, finetune, one DeepSpeed ZeRO-3 launch each"
shared=(--model_max_length 512 --target_skip_ratio 0.3 --max_skip_ratio 0.5 --seed 0 --report_to "${REPORT_TO:-none}")
shared+=(--calibration_samples 512 --order_samples 128 --score_samples 2048 --calibration_batch_size 64)
training=(--warmup_steps 0.05 --lr_scheduler_type cosine --weight_decay 0. --group_by_modality_length True)
training+=(--logging_steps 10 --save_strategy no)
router=("$DATA/stages.router.json" "$OUTPUT/router" --adapter_hidden_dim 32 "${shared[@]}")
adapter=("$DATA/stages.adapter.json" "$OUTPUT/adapter" --max_steps 120 --roe_lr 2e-3 "${shared[@]}" "${training[@]}")
if [[ "${ORDER:-router-first}" == router-first ]]; then
  STAGES=(router adapter finetune)
  train_stage router "$BASE" "${router[@]}"
  train_stage adapter "$OUTPUT/router" "${adapter[@]}"
  trained="$OUTPUT/adapter"
else # RoE's order: adapters learn on random skips, before there is a router
  STAGES=(adapter router finetune)
  train_stage adapter "$BASE" "${adapter[@]}" --adapter_hidden_dim 32 --skip_pattern random
  train_stage router "$OUTPUT/adapter" "${router[@]}"
  trained="$OUTPUT/router"
fi
train_stage finetune "$trained" "$DATA/stages.finetune.json" "$OUTPUT/finetune" \
  --max_steps 120 --roe_lr 1e-3 --backbone_lr 3e-4 "${shared[@]}" "${training[@]}"

check_engines() { # stage folders...: every stage must have run on a DeepSpeed engine, ZeRO stage 3, on all ranks
  "$PYTHON" - "$NUM_RANKS" "$@" <<'PY'
import json, pathlib, sys
ranks, wrong = int(sys.argv[1]), []
for folder in sys.argv[2:]:
    found = json.loads((pathlib.Path(folder) / "stage.json").read_text())
    if (found["engine"], found["zero_stage"], found["world_size"]) != ("DeepSpeedEngine", 3, ranks):
        wrong.append(f"{folder}: {found['engine']}, ZeRO {found['zero_stage']}, world size {found['world_size']}")
if wrong:
    sys.exit(f"a stage did not run on DeepSpeedEngine, ZeRO 3, world size {ranks}: {'; '.join(wrong)}")
PY
}
check_engines "${STAGES[@]/#/$OUTPUT/}"

evaluate() { # model, skip rate or off, folder, label: one lmms-eval run, or the one done before
  local model="$1" rate="$2" folder="$3" label="$4" run_folder mark
  if [[ "$rate" == off ]]; then run_folder="$folder/dense"; else run_folder="$folder/skip_$rate"; fi
  mark="$(run_hash "$DATA/digits_test.json" "$model" "$rate" "$label")"
  if [[ -z "${FRESH:-}" && "$(cat "$run_folder/run_hash" 2>/dev/null)" == "$mark" ]]; then
    echo "[quickstart] $label: evaluated before, reused from $run_folder"
    return
  fi
  rm -rf "$run_folder"
  mkdir -p "$folder"
  if ! MODEL_PATH="$model" TASKS=digits_vqa SKIP_RATES="$rate" OUTPUT="$folder" CONV_TEMPLATE=digits BATCH_SIZE=64 \
    INCLUDE_PATH=playground/digits/lmms_eval NUM_GPUS=1 bash scripts/v1_5/eval.sh >"$folder/log-$rate.txt" 2>&1; then
    tail -n 20 "$folder/log-$rate.txt" >&2
    fail "lmms-eval failed for $label; the whole log is $folder/log-$rate.txt"
  fi
  "$PYTHON" -m llava.report.evaluation collect "$run_folder" --label "$label" --items 2600
  printf '%s\n' "$mark" >"$run_folder/run_hash"
}

say "3/4 lmms-eval: 2,600 questions about unseen scans, dense and routed, two runs at a time"
evaluate "$BASE" off "$OUTPUT/eval/base" "base model" & jobs=($!)
evaluate "$OUTPUT/finetune" off "$OUTPUT/eval/finetune" "finetuned, routing off" & jobs+=($!)
runs=("$OUTPUT/eval/base/dense" "$OUTPUT/eval/finetune/dense")
for rate in $SKIP_RATES; do
  if ((${#jobs[@]} >= 2)); then
    for job in "${jobs[@]}"; do wait "$job"; done
    jobs=()
  fi
  evaluate "$OUTPUT/finetune" "$rate" "$OUTPUT/eval/finetune" "routed, target $rate" & jobs+=($!)
  runs+=("$OUTPUT/eval/finetune/skip_$rate")
done
for job in "${jobs[@]}"; do wait "$job"; done

say "4/4 report"
stages=()
for stage in "${STAGES[@]}"; do stages+=(--stages "$OUTPUT/$stage"); done
fuzzyroe report "${runs[@]/%//evaluation.json}" "${stages[@]}" --output "$OUTPUT/report"
"$PYTHON" scripts/bench/inference.py --quick --model "$OUTPUT/finetune" --data "$DATA" --json "$OUTPUT/report/prefill.json"
say "done in $((SECONDS - started)) s; open $OUTPUT/report/report.html"
