#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: the tests on CUDA, the op benches, the chain; tables last.
#
#   bash benchmarks/gpu.sh [--dry-run] [folder of extra wheels] [folder for results]
#
# Wheels that the machine lacks (diffusers, ...) are installed from the first folder into a place of their own ("" for
# none). Each stage has a time limit and none stops another; CSV files and logs go to the second folder. --dry-run: toy
# sizes on the CPU, to see that every command runs. The exit code is that of the last stage that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
dry=()
chain=(--budgets 24GiB 48GiB)
options=()
models=(sd15 sdxl)
tests=(tests/kernels tests/ops tests/runtime tests/csrc)
if [ "${1:-}" = --dry-run ]; then
    shift
    dry=(--small --device cpu --dtype float32 --seconds 0.02)
    chain=(--device cpu --dtype float32 --budgets --repeats 1 --steps 2 --grad-steps 1)
    options=(--device cpu --dtype float32 --repeats 1)
    models=(small)
    tests=(tests/kernels/test_guided_step.py)
fi
wheels=${1:-}
results=${2:-benchmarks/results/gpu}
python=${PYTHON:-python3}
mkdir -p "$results"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -n "$wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --target "$site" "$wheels"/*.whl
fi
# Not the root itself, where the folder kernels/ would pass for the package of that name.
ln -s "$PWD/alignprop_fast" "$site/alignprop_fast"
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"

status=0
# stage SECONDS NAME COMMAND...: the command under its time limit, its output into a log.
stage() {
    local limit=$1 name=$2 code=0
    shift 2
    SECONDS=0
    timeout "$limit" "$@" >"$results/$name.log" 2>&1 || code=$?
    [ "$code" -eq 0 ] || status=$code
    echo "$name: exit code $code after $SECONDS s (124: out of time); last line: $(tail -n 1 "$results/$name.log" | cut -c -120)"
}
bench() { # SECONDS NAME OP ARGUMENTS...
    stage "$1" "$2" "$python" "benchmarks/$3.py" --output "$results/$2.csv" --seconds 0.15 "${@:4}" "${dry[@]}"
}

existing=()
for path in "${tests[@]}"; do [ -e "$path" ] && existing+=("$path"); done
stage 110 tests "$python" -m pytest -p no:cacheprovider "${existing[@]}"
bench 80 op_attention attention --no-compile
bench 40 op_lora_linear lora_linear --no-compile
for op in geglu layer_norm group_norm_silu frozen_conv2d guided_step; do bench 25 "op_$op" "$op" --no-compile; done
# Compiling takes seconds a shape: the memory-bound ops of one model.
compiled=(--batches 4 --compile)
[ ${#dry[@]} -gt 0 ] || compiled+=(--models SDXL)
for op in geglu layer_norm group_norm_silu; do bench 20 "op_${op}_compile" "$op" "${compiled[@]}"; done
for model in "${models[@]}"; do
    stage 25 "step_options_$model" "$python" benchmarks/step_options.py --model "$model" \
        --output "$results/step_options_$model.csv" "${options[@]}"
    stage 55 "chain_$model" "$python" benchmarks/chain.py --model "$model" --output "$results/chain_$model.csv" "${chain[@]}"
done

for log in "$results"/*.log; do grep -E "^(FAILED|ERROR)|WRONG|Error:" "$log" | head -n 5; done
for model in "${models[@]}"; do
    for table in step_options chain; do
        [ ! -s "$results/${table}_$model.csv" ] || column -s, -t "$results/${table}_$model.csv"
    done
done
"$python" benchmarks/summary.py "$results"
exit $status
