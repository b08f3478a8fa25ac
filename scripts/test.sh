#!/usr/bin/env bash
# The whole test suite, in the environment that demo.sh uses; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh test
echo "== running the tests"
.venv/bin/python -m pytest "$@"
