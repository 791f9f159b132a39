#!/usr/bin/env bash
# Set up, pack images, train RegionCL-M for a few minutes, compare with an untrained backbone, write a report.
# Usage: bash tools/quickstart.sh [IMAGE_FOLDER] [--minutes 5.5] [--run-dir runs/quickstart]; --help says more.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/tools/setup.sh"
unset PYTHONHOME PYTHONPATH
exec "$root/.venv/bin/python" "$root/tools/quickstart.py" "$@"
