#!/usr/bin/env bash
# Set up, lint, and run the tests. Extra arguments go to pytest: `bash tools/test.sh -m smoke`, `... tests/test_layout.py`.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
bash tools/setup.sh
python=$root/.venv/bin/python
unset PYTHONHOME PYTHONPATH

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy pipeline models train tools

# Two processes with one thread each beat one with two; more than eight only unpack the same photos more often.
cores=$(nproc)
workers=$((cores < 8 ? cores : 8))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# In the order of the files: by the number of tests, the longest file, which has few, would come last and alone.
# A later -m or -n among the extra arguments replaces these.
exec "$python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder -m "not slow" "$@"
