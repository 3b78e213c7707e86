#!/usr/bin/env bash
# Writes requirements.lock: every package of requirements.txt with all it needs, one version and its hashes each.
#
#   bash scripts/lock.sh          needs uv (pip install uv) and a package index; 1 minute
#
# scripts/env.sh installs from the lock and does not need uv. torch is left out with its CUDA libraries: which build of
# it a machine needs, env.sh decides. lmms-eval is locked without its own forty requirements, see requirements.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

command -v uv >/dev/null || { echo "lock.sh: uv is not installed; pip install uv, then run this again." >&2; exit 2; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
compile=(uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate)

grep '^torch==' requirements.txt >"$work/torch.in"
grep '^lmms-eval==' requirements.txt >"$work/lmms.in"
grep -v '^lmms-eval==' requirements.txt >"$work/all.in"
# what only torch's CUDA build brings comes with torch and is left out here
"${compile[@]}" "$work/torch.in" -o "$work/torch.txt"
left_out=(--no-emit-package torch)
for name in $(grep -oE '^(nvidia|cuda|triton)[a-z0-9-]*' "$work/torch.txt" | sort -u); do
  left_out+=(--no-emit-package "$name")
done
"${compile[@]}" --generate-hashes "${left_out[@]}" "$work/all.in" -o "$work/all.txt"
"${compile[@]}" --generate-hashes --no-deps "$work/lmms.in" -o "$work/lmms.txt"
{
  echo "# Written by scripts/lock.sh from requirements.txt; change that file, then run the script."
  cat "$work/all.txt" "$work/lmms.txt"
} >"$work/requirements.lock"
mv "$work/requirements.lock" requirements.lock
echo "requirements.lock: $(grep -c '==' requirements.lock) pins"
