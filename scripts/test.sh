#!/usr/bin/env bash
# Runs the tests on the CPU, offline. Makes or repairs the environment first (scripts/env.sh).
#
#   bash scripts/test.sh                    ruff, mypy, doctests, every test not marked slow
#   bash scripts/test.sh --all              then the slow tests, then what touches transformers
#                                           once more with the oldest supported version
#   bash scripts/test.sh [--all] -- ARGS    ARGS go to pytest, e.g. -- -k attach -x
#
# It ends with the seconds that each part took. A skipped test fails the run unless it is marked gpu.
# FUZZYROE_PYTHON=python tests in an environment of your own.
# FUZZYROE_TEST_WORKERS=N sets the number of processes that share the tests (default 2; 0 for none).
set -euo pipefail

# The oldest supported transformers, with the packages it needs in versions older than those of requirements.txt.
OLDEST_TRANSFORMERS=5.17
OLDEST_PACKAGES=(transformers==5.17.0 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9)

all=false
while [[ $# -gt 0 ]]; do
  case "$1" in
    --all) all=true ;;
    -h | --help) sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p;}' "$0"; exit 0 ;;
    --) shift; break ;;
    *) echo "test.sh: unknown argument '$1'; known are --all, --help and -- followed by pytest's own arguments" >&2; exit 2 ;;
  esac
  shift
done

FUZZYROE_EXTRAS="train eval playground dev"
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

given=$# # arguments for pytest that the caller gave

# tests that launch two ranks share the cores: more threads than one make them slower
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# the tests start some hundred programs; each would compile the two packages anew
unset PYTHONDONTWRITEBYTECODE
export PYTHONPATH="$PYTHONPATH:$FUZZYROE_ROOT/tests/support"

# a file's tests stay in one process: they share what its fixtures have made
parallel=(-n "${FUZZYROE_TEST_WORKERS:-2}" --dist loadfile)
# what calls transformers; the rest would only be run twice
touches_transformers=(tests/fuzzyroe tests/llava/model tests/llava/eval tests/llava/serve tests/llava/train)

timings=()
tier() { # label, command...: run it, remember how long it took, stop at the first failure
  local label="$1" start=$SECONDS status=0
  shift
  printf '\n== %s ==\n' "$label"
  "$@" || status=$?
  timings+=("$(printf '%5d s  %s' "$((SECONDS - start))" "$label")")
  if [[ $status -ne 0 ]]; then
    print_timings
    echo "FAILED: $label (exit status $status)" >&2
    exit "$status"
  fi
}

print_timings() {
  printf '\n'
  printf '%s\n' "${timings[@]}"
}

pytest_tier() { # marker expression, pytest arguments...
  local expression="$1" status=0
  shift
  "$PYTHON" -m pytest -p no_skips --durations=5 -m "$expression" "$@" || status=$?
  # arguments such as -k may leave a tier without tests; without arguments an empty tier is a mistake
  [[ $status -eq 0 || ($status -eq 5 && $given -gt 0) ]] || return "$status"
}

install_oldest() { # directory: goes onto PYTHONPATH for one tier; no environment is changed
  local wanted
  wanted="$("$PYTHON" --version) ${OLDEST_PACKAGES[*]}"
  if [[ "$(cat "$1/complete" 2>/dev/null)" != "$wanted" ]]; then
    rm -rf "$1"
    mkdir -p "$1" || return
    "$PYTHON" -m pip --quiet --disable-pip-version-check install --no-deps --no-compile \
      --target "$1" "${OLDEST_PACKAGES[@]}" || return
    "$PYTHON" -m compileall -qq -j 0 "$1" || true # see env_compile in env.sh
    echo "$wanted" >"$1/complete"
  fi
  PYTHONPATH="$1:$PYTHONPATH" "$PYTHON" -c "
import transformers
assert transformers.__version__.startswith('$OLDEST_TRANSFORMERS.'), transformers.__file__
print('transformers', transformers.__version__, 'from', transformers.__file__)"
}

tier "ruff check" "$PYTHON" -m ruff check .
tier "ruff format" "$PYTHON" -m ruff format --check .
tier "mypy" "$PYTHON" -m mypy
if [[ $# -eq 0 ]]; then tier "doctests" "$PYTHON" -m pytest -q --doctest-modules fuzzyroe llava; fi
tier "unit tests" pytest_tier "not slow" "${parallel[@]}" "$@"
if $all; then
  tier "slow tests" pytest_tier slow "${parallel[@]}" "$@"
  if [[ -n "${FUZZYROE_PYTHON:-}" ]]; then overlay=.cache; else overlay=.venv; fi
  overlay="$FUZZYROE_ROOT/$overlay/overlay-transformers-$OLDEST_TRANSFORMERS"
  tier "installing transformers $OLDEST_TRANSFORMERS beside the environment" install_oldest "$overlay"
  export PYTHONPATH="$overlay:$PYTHONPATH"
  tier "unit tests with transformers $OLDEST_TRANSFORMERS" \
    pytest_tier "not slow" "${parallel[@]}" "${touches_transformers[@]}" "$@"
fi
print_timings
echo "all passed in $SECONDS s"
