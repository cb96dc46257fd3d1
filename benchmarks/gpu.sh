#!/usr/bin/env bash
# What a GPU must show, in at most 8 minutes, into benchmarks/gpu.json (see gpu.py); not needed: a network.
#   bash benchmarks/gpu.sh [--device cpu --small] [--out FILE]     all parts, each with its limit
#   bash benchmarks/gpu.sh smol --traces FILE [--text FILE]        the pair smol at a card's size, in 6 minutes
#   bash benchmarks/gpu.sh --wheels                                where there is a network: what a bare machine lacks, into data/wheels
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
wheels=data/wheels
if [ "${1:-}" = --wheels ]; then
  exec "$python" -m pip download --quiet --only-binary=:all: --python-version 3.12 --dest "$wheels" pydantic lazy-loader
fi
if ! "$python" -c 'import pydantic, lazy_loader' 2>/dev/null; then
  "$python" -m pip install --quiet --no-index --find-links "$wheels" --target "$wheels/site" pydantic lazy-loader || exit 2
  export PYTHONPATH="$PWD/$wheels/site${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ "${1:-}" = smol ]; then
  exec timeout 360 "$python" -m benchmarks.gpu "$@"
fi
failed=0
while read -r part seconds; do
  case " $* " in *" --small "*) seconds=600 ;; esac # of a CPU that others use too
  timeout "$seconds" "$python" -m benchmarks.gpu "$part" "$@" || { echo "$part: stopped or failed (limit $seconds s)" >&2; failed=1; }
done <<'PARTS'
right 100
step 110
harvest 80
whole 110
PARTS
exit $failed
