#!/usr/bin/env bash
# The comparison behind docs/results.md: FuzzyRoE, RoE and what is simpler than both, on the digits playground, three
# seeds each; every cell is one training run with its questions and one JSON file. About an hour and a half on two CPU
# cores, one process per core, no GPU and no DeepSpeed. Cells whose file is there are left alone, so it can be
# interrupted; the page is written anew from the files in the end.
#
#   bash scripts/playground/compare.sh
#   CELLS="dense_0 fuzzy_0" bash scripts/playground/compare.sh
#
#   CELLS       cells to run (default: all; python -m playground.compare --list prints them)
#   RESULTS     folder of the cells' files (default: docs/results/cells)
#   WORK        folder for checkpoints and logs (default: outputs/compare)
#   WORKERS     processes at a time (default: 2)
#   QUESTIONS   held-out questions about images (default: all 2,400)
#   RESULTS_ONLY=1  write the page from the files that are there, run nothing
set -euo pipefail

FUZZYROE_EXTRAS="train playground"
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"

RESULTS="${RESULTS:-docs/results/cells}"
DATA=playground/data/digits
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# glibc otherwise gives large activations back and has their pages cleared again
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864

if [[ -z "${RESULTS_ONLY:-}" ]]; then
  "$PYTHON" -m playground.digits.generate --output "$DATA" --seed 0 --train 24000
  "$PYTHON" random_drop.py --input "$DATA/digits_train.json" --output "$DATA/stages.json" --seed 42 \
    --split router=0.1,adapter=0.4,finetune=0.5 --overwrite
  # shellcheck disable=SC2086 # names are words
  "$PYTHON" -m playground.compare --data "$DATA" --work "${WORK:-outputs/compare}" --results "$RESULTS" \
    --workers "${WORKERS:-2}" ${QUESTIONS:+--questions "$QUESTIONS"} ${CELLS:+--cells $CELLS}
fi
"$PYTHON" -m playground.compare --page --results "$RESULTS"
