#!/usr/bin/env bash
# The tests with the newest releases of what changes most under us; everything else as pinned. An environment of its own: .venv-latest.
#   tests/latest.sh [arguments of pytest]
set -uo pipefail
cd "$(dirname "$0")/.."
newest=(nnsight transformers plotly)
home=.venv-latest
[ -x "$home/bin/python" ] || "${PYTHON:-python3}" -m venv "$home" || exit 2
pip() { "$home/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pattern=$(IFS='|'; echo "${newest[*]}")
echo "installing into $home: ${newest[*]} in their newest releases, the others as pinned where that is possible"
grep -viE "^($pattern|tokenizers|huggingface_hub|kaleido)==" constraints.txt > "$home/constraints.txt"
sed -E "s/^($pattern|tokenizers|huggingface_hub|kaleido)==.*/\1/" requirements.txt > "$home/requirements.txt"
pip install --upgrade -r "$home/requirements.txt" -c "$home/constraints.txt" || pip install --upgrade -r "$home/requirements.txt" || exit 2
# what is pinned is checked elsewhere: here it differs on purpose
"$home/bin/python" -m pytest --deselect tests/house/test_environment.py "$@" | tee "$home/log"
code=${PIPESTATUS[0]}
found=$("$home/bin/python" -c 'import sys; from importlib.metadata import version; print(", ".join(f"{n} {version(n)}" for n in sys.argv[1:]))' "${newest[@]}")
pinned=$(grep -E "^($pattern)==" constraints.txt | sed 's/==/ /' | paste -sd, | sed 's/,/, /g')
failed=$(grep -cE '^(FAILED|ERROR) ' "$home/log")
echo "newest: $found (pinned: $pinned): $([ "$code" = 0 ] && echo "all tests passed" || echo "$failed tests failed")"
exit "$code"
