#!/usr/bin/env bash
# Makes the Python environment that the other scripts use, and leaves the caller in the repository root.
#
#   source scripts/env.sh     from a script: sets FUZZYROE_ROOT and PYTHON, puts the environment's programs first on PATH
#   bash scripts/env.sh       by hand: only makes or repairs .venv
#
# An active virtual or conda environment with FuzzyRoE and all it requires is used as it is. Otherwise .venv is created from
# requirements.lock (1 to 5 minutes, 1.5 GB; more with CUDA libraries) and reused until the lock, pyproject.toml or Python
# change. An interrupted install is repaired by the next run.
#
#   FUZZYROE_PYTHON=python    use this Python's environment as it is: check it, say what is missing, install nothing
#   FUZZYROE_EXTRAS="..."     extras of pyproject.toml that the caller needs (default: train eval playground)
#   FUZZYROE_TORCH_INDEX=URL  package index of the torch build, e.g. https://download.pytorch.org/whl/cu126
set -euo pipefail

FUZZYROE_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export FUZZYROE_ROOT
cd "$FUZZYROE_ROOT"

ENV_DIR="$FUZZYROE_ROOT/.venv"
ENV_STAMP="$ENV_DIR/fuzzyroe-complete"      # fingerprint of what was installed, written last
ENV_MARKER="$ENV_DIR/fuzzyroe-unfinished"   # there from the first step of an install to its end
ENV_LOG="$ENV_DIR/install.log"
ENV_ALL="train eval playground"             # extras that are needed if the caller names none
ENV_CPU_INDEX="https://download.pytorch.org/whl/cpu"

env_say() { printf '[env] %s\n' "$*"; }
env_fail() { printf '[env] error: %s\n' "$*" >&2; exit 1; }

env_step() { # label, command...: run it into the log; print the label, then how long it took
  local label="$1" start=$SECONDS
  shift
  printf '[env] %s ... ' "$label"
  if ! "$@" >>"$ENV_LOG" 2>&1; then
    printf 'failed after %d s\n' "$((SECONDS - start))"
    tail -n 15 "$ENV_LOG" >&2
    env_fail "'$label' failed. The whole log is $ENV_LOG; once the cause is gone, run the same command again."
  fi
  printf '%d s\n' "$((SECONDS - start))"
}

env_pip() { "$PYTHON" -m pip --disable-pip-version-check --no-input "$@"; }

env_is_supported() { # python: is it 3.10 or newer, able to make virtual environments?
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

env_find_python() { # print the first usable Python
  local candidate
  for candidate in python3 python3.12 python3.11 python3.13 python3.10 python; do
    if env_is_supported "$candidate"; then command -v "$candidate"; return; fi
  done
  env_fail "found no Python >= 3.10 that can make a virtual environment; install one (on Debian and Ubuntu also" \
    "python3-venv), or name an environment that has the requirements: FUZZYROE_PYTHON=/path/to/python"
}

env_fingerprint() { # what .venv has to match
  "$PYTHON" - <<'PY'
import hashlib, pathlib, sys
parts = [pathlib.Path(name).read_bytes() for name in ("requirements.txt", "requirements.lock", "pyproject.toml")]
print(hashlib.sha256(b"\0".join([*parts, sys.version.encode()])).hexdigest())
PY
}

env_installed_fingerprint() { cat "$ENV_STAMP" 2>/dev/null || true; }

env_create() { # an empty .venv; the marker is older than anything else in it
  local base
  base="$(env_find_python)"
  env_say "building .venv with $("$base" --version) ($base)"
  mkdir -p "$ENV_DIR"
  touch "$ENV_MARKER"
  env_step "creating the virtual environment" "$base" -m venv "$ENV_DIR"
}

env_torch_index() { # print the extra package index for torch, if any is wanted
  if [[ -n "${FUZZYROE_TORCH_INDEX:-}" ]]; then
    echo "$FUZZYROE_TORCH_INDEX"
  elif [[ "$(uname -s)" == Linux ]] && ! nvidia-smi >/dev/null 2>&1 && "$PYTHON" - "$ENV_CPU_INDEX/torch/" <<'PY'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=5).close()
except OSError:
    sys.exit(1)
PY
  then
    echo "$ENV_CPU_INDEX"
  fi
}

env_install_torch() { # first and alone: everything after it then keeps this build
  local pin index
  pin="$(grep '^torch==' requirements.txt)"
  index="$(env_torch_index)"
  if nvidia-smi >/dev/null 2>&1; then
    env_say "NVIDIA driver found: a CUDA build of torch"
  else
    env_say "no NVIDIA driver: torch will compute on the CPU${index:+ (CPU build from $index)}"
  fi
  env_step "installing $pin" env_pip install --no-compile ${index:+--extra-index-url "$index"} "$pin"
}

env_install() { # everything of the lock, then this repository
  touch "$ENV_MARKER"
  rm -f "$ENV_STAMP"
  env_install_torch
  # the lock is complete, so pip need not resolve anything; a file with another hash is refused
  env_step "installing requirements.lock" env_pip install --no-compile --no-deps --require-hashes -r requirements.lock
  env_step "installing this repository" env_pip install --no-deps -e .
  env_remove_broken_companions
  env_step "compiling bytecode" env_compile
  env_step "checking the result" "$PYTHON" scripts/check_environment.py train eval playground dev
  env_fingerprint >"$ENV_STAMP"
  rm -f "$ENV_MARKER"
}

env_compile() { # by all cores, where pip uses one; without bytecode an import of the trainer takes 28 s instead of 12
  # what packages hold for a newer Python does not compile, and is not imported by this one either
  "$PYTHON" -m compileall -qq -j 0 "$ENV_DIR/lib" || true
}

env_remove_broken_companions() { # only ever in .venv
  local name
  for name in $("$PYTHON" scripts/check_environment.py --broken-companions); do
    env_say "$name in .venv cannot be imported beside this build of torch, and transformers breaks on that;" \
      "FuzzyRoE does not use it, so it is removed from .venv"
    env_step "removing $name" env_pip uninstall --yes "$name"
  done
}

env_use_own() {
  local start=$SECONDS
  PYTHON="$ENV_DIR/bin/python"
  # operators that DeepSpeed compiles belong to this environment; in a shared folder two would undo each other's
  export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$ENV_DIR/torch_extensions}"
  if [[ -e "$ENV_MARKER" ]]; then
    env_say "the last install did not finish: building .venv from the start"
    rm -rf "$ENV_DIR"
  elif [[ -e "$ENV_STAMP" ]] && ! env_is_supported "$PYTHON"; then
    env_say "the Python of .venv is gone: building .venv from the start"
    rm -rf "$ENV_DIR"
  elif [[ -e "$ENV_DIR" ]] && ! env_is_supported "$PYTHON"; then
    env_fail "$ENV_DIR exists but holds no Python >= 3.10, and this script did not make it; move it away and run again"
  fi
  [[ -e "$ENV_DIR" ]] || env_create
  if [[ "$(env_installed_fingerprint)" == "$(env_fingerprint)" ]]; then
    env_remove_broken_companions
    env_say "using .venv, which is up to date"
  else
    env_install
    env_say ".venv is complete ($((SECONDS - start)) s)"
  fi
}

env_find_active() { # print the Python of the active environment, if nothing is to be said of it
  local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" report
  [[ -n "$active" && -x "$active/bin/python" && ! "$active" -ef "$ENV_DIR" ]] || return 0
  # who names an environment is warned and obeyed; one that is merely active must be whole, versions and all
  # shellcheck disable=SC2086  # one word per extra
  if report="$("$active/bin/python" scripts/check_environment.py ${FUZZYROE_EXTRAS:-$ENV_ALL} 2>&1)" &&
    [[ -z "$report" ]]; then
    echo "$active/bin/python"
  else
    env_say "the active environment lacks what is needed; FUZZYROE_PYTHON=$active/bin/python would say what" >&2
  fi
}

env_use_given() { # FUZZYROE_PYTHON
  PYTHON="$(command -v "$FUZZYROE_PYTHON")" ||
    env_fail "FUZZYROE_PYTHON=$FUZZYROE_PYTHON is no program; give the path of a Python, or unset it to use .venv"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    env_fail "FUZZYROE_PYTHON=$FUZZYROE_PYTHON is $("$PYTHON" --version 2>&1); Python >= 3.10 is needed"
  export FUZZYROE_PYTHON="$PYTHON"
  env_say "using $PYTHON as it is; nothing is installed there"
  # shellcheck disable=SC2086  # one word per extra
  "$PYTHON" scripts/check_environment.py ${FUZZYROE_EXTRAS:-$ENV_ALL} || exit 1
}

# this checkout first, so that another LLaVA on the path is never imported in its place
export PYTHONPATH="$FUZZYROE_ROOT${PYTHONPATH:+:$PYTHONPATH}"
FUZZYROE_PYTHON="${FUZZYROE_PYTHON:-$(env_find_active)}"
if [[ -n "$FUZZYROE_PYTHON" ]]; then env_use_given; else env_use_own; fi
export PYTHON
PATH="$(dirname "$PYTHON"):$PATH"
export PATH

if [[ "${BASH_SOURCE[0]}" == "$0" && -z "${FUZZYROE_PYTHON:-}" ]]; then
  env_say "to use it in a shell: source .venv/bin/activate"
fi
