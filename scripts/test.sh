#!/usr/bin/env bash
# The whole test suite, in the environment that demo.sh uses, on all cores; arguments go to pytest (`-n 0`: one process).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh test
echo "== running the tests"
.venv/bin/python -m pytest -n auto --dist worksteal "$@"
