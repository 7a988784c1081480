#!/bin/bash
# The gate on notebooks: exporting and cleaning must change nothing, and every library notebook must run. Counts what ran itself: `nbdev_test` says "Success." to nothing, too.
set -euo pipefail
cd "$(dirname "$0")/.."
state() { find nbs uad_study -type f \( -name '*.ipynb' -o -name '*.py' \) -not -path '*/.ipynb_checkpoints/*' -print0 | sort -z | xargs -0 sha256sum; }
before=$(state)
nbdev_export && nbdev_clean
after=$(state)
if [ "$before" != "$after" ]; then
  echo "error: notebooks and package disagree: run 'nbdev_export && nbdev_clean', look at 'git diff', and commit" >&2; git status --short nbs uad_study >&2; exit 1
fi
expected=$(ls nbs/[0-9]*.ipynb | wc -l)
log=$(mktemp)
OMP_NUM_THREADS=1 nbdev_test --do_print --timing --n_workers 2 --skip_folder_re experiments --file_re '^[0-9].*' 2>&1 | tee "$log" | grep -v -E '^Starting|^- Complet' || { cat "$log"; exit 1; }
ran=$(grep -c -- '- Complet' "$log" || true)
echo "notebooks run: $ran of $expected"
[ "$ran" -eq "$expected" ] && [ "$expected" -gt 10 ] || { cat "$log"; echo "error: $ran of $expected notebooks ran" >&2; exit 1; }
