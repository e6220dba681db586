#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: the tests on CUDA, then the benches; a table last.
#
#   bash benchmarks/gpu.sh [folder of extra wheels] [folder for results]
#
# Wheels that the machine lacks (diffusers, ...) are installed from the first folder into a place of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
wheels=${1:-}
results=${2:-benchmarks/results/gpu}
mkdir -p "$results"
site=$(mktemp -d)
if [ -n "$wheels" ]; then
    python3 -m pip install -q --no-index --no-deps --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
status=0
python3 -m pytest -p no:cacheprovider tests/kernels tests/ops tests/runtime || status=$?
python3 benchmarks/chain.py --model sd15 --output "$results/chain_sd15.csv" || status=$?
python3 benchmarks/chain.py --model sdxl --output "$results/chain_sdxl.csv" || status=$?
column -s, -t "$results"/chain_*.csv
exit $status
