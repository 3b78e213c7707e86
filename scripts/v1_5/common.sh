#!/usr/bin/env bash
# Sourced by the other scripts of this folder: answers --help, checks that the variables in REQUIRED are set, goes to the
# repository root, makes the environment (scripts/env.sh), finds the GPUs and defines how a command is run.
#
#   NUM_GPUS=N   processes, one per GPU (default: the GPUs that CUDA_VISIBLE_DEVICES leaves; 1 on a machine without any)
#   DRY_RUN=1    print the commands instead of running them; no environment is made
set -euo pipefail

say() { printf '[%s] %s\n' "$(basename "$0" .sh)" "$*"; }
fail() { say "error: $*" >&2; exit 2; }

# before anything is installed: the help that was asked for, and what only the user knows
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p;}' "$0"
  exit 0
fi
for variable in ${REQUIRED:-}; do
  [[ -n "${!variable:-}" ]] || fail "$variable is not set; bash $0 --help says what it is."
done

if [[ -n "${DRY_RUN:-}" ]]; then
  cd "$(dirname "${BASH_SOURCE[0]}")/../.."
  PYTHON=python
else
  # shellcheck source=scripts/env.sh
  source "$(dirname "${BASH_SOURCE[0]}")/../env.sh"
fi

run() { # command...: run it, or with DRY_RUN print it so that it can be pasted into a shell
  if [[ -n "${DRY_RUN:-}" ]]; then
    local word line=""
    for word in "$@"; do
      if [[ "$word" =~ ^[A-Za-z0-9_./:=,@+-]+$ ]]; then line+="$word "; else line+="${word@Q} "; fi
    done
    printf '%s\n' "${line% }"
  else
    "$@"
  fi
}

count_gpus() { # GPUs that a program started here would see
  local listed=0 visible
  listed="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ')" || listed=0
  if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
    ((${#visible[@]} < listed)) && listed=${#visible[@]}
  fi
  echo "$listed"
}

VISIBLE_GPUS="$(count_gpus)"
NUM_GPUS="${NUM_GPUS:-$((VISIBLE_GPUS > 0 ? VISIBLE_GPUS : 1))}"
[[ "$NUM_GPUS" =~ ^[1-9][0-9]*$ ]] || fail "NUM_GPUS is '$NUM_GPUS'; give the number of GPUs to use, from 1."
