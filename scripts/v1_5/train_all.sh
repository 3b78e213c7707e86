#!/usr/bin/env bash
# Trains a whole method and starts it again where it stood if it is interrupted, so that a long run needs no watching.
#
#   METHOD=fuzzyroe DATA_PATH=playground/data/llava_v1_5_mix665k.json bash scripts/v1_5/train_all.sh
#   METHOD=roe DATA_PATH=... ATTEMPTS=5 bash scripts/v1_5/train_all.sh
#
# Runs scripts/v1_5/finetune_METHOD.sh: finished stages are reused, an interrupted one goes on from its step checkpoint.
# Bad input (exit status 2) and Ctrl-C end it at once.
#
#   METHOD          fuzzyroe or roe (default: fuzzyroe)
#   ATTEMPTS        launches at most (default: 3)
#
# Further variables: scripts/v1_5/finetune_METHOD.sh. Further arguments go to llava/train/train.py in every stage.
set -euo pipefail

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p;}' "$0"
  exit 0
fi
METHOD="${METHOD:-fuzzyroe}" ATTEMPTS="${ATTEMPTS:-3}"
say() { printf '[train_all] %s\n' "$*"; }
[[ "$METHOD" == fuzzyroe || "$METHOD" == roe ]] ||
  { say "error: METHOD is '$METHOD'; use fuzzyroe or roe." >&2; exit 2; }
[[ "$ATTEMPTS" =~ ^[1-9][0-9]*$ ]] || { say "error: ATTEMPTS is '$ATTEMPTS'; give a number, from 1." >&2; exit 2; }

for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
  status=0
  bash "$(dirname "${BASH_SOURCE[0]}")/finetune_$METHOD.sh" "$@" || status=$?
  ((status == 0)) && exit 0
  ((status == 2 || status == 130)) && exit "$status"
  unset FRESH # what the first launch has done anew is kept
  say "$METHOD ended with exit status $status in launch $attempt of $ATTEMPTS"
done
exit "$status"
