#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes, what matters most first; a short table last.
#
#   bash benchmarks/gpu.sh [--dry-run] [folder of extra wheels] [folder for results]
#
# Wheels that the machine lacks (diffusers, ...) are installed from the first folder into a place of their own ("" for
# none). Each stage has a time limit, all of them together TOTAL seconds, and none stops another; CSV files and logs go
# to the second folder. TRL_PYTHON names the python of an environment with trl 0.23.1, if there is one. --dry-run: toy
# sizes on the CPU, to see that every command runs. The exit code is that of the last stage that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
total=${TOTAL:-570}
patience=1
cpu=()
dry=()
train=(--seconds 140 --repeats 2)
planner=(--model sd15 --steps 20 --grad-steps 10 --points 5 --repeats 1)
offload=(--model sdxl)
graphs=(--model sd15)
decoder=()
options=(--model sdxl)
gpu_tests=(tests/test_gpu_memory.py tests/runtime/test_graphs.py)
op_tests=(tests/kernels tests/ops)
if [ "${1:-}" = --dry-run ]; then
    shift
    cpu=(--device cpu)
    dry=(--small --device cpu --dtype float32 --seconds 0.02)
    train=(--model small --repeats 1 --variants eager)
    planner=(--model demo --steps 2 --grad-steps 1 --points 2 --repeats 1)
    offload=(--model small --repeats 1 --options keep)
    graphs=(--model small --repeats 1 --steps 2 --batches 1)
    decoder=(--size 64 --dtype float32 --repeats 1 --ways stock keep)
    options=(--model small --dtype float32 --repeats 1)
    op_tests=(tests/kernels/test_guided_step.py)
    patience=10 # a stage at toy size is quick, but the machine may be busy
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
# Has to be said before CUDA starts: without it, budgets break on memory in pieces.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

status=0
SECONDS=0
# stage SECONDS NAME COMMAND...: the command under its time limit, or what is left of the total; its output into a log.
stage() {
    local limit=$(($1 * patience)) name=$2 code=0 start=$SECONDS
    shift 2
    [ $((start + limit)) -le $((total * patience)) ] || limit=$((total * patience - start))
    if [ "$limit" -le 3 ]; then
        echo "$name: left out, no time"
        return
    fi
    timeout "$limit" "$@" >"$results/$name.log" 2>&1 || code=$?
    [ "$code" -eq 0 ] || status=$code
    echo "$name: exit code $code after $((SECONDS - start)) s (124: out of time); last line: $(tail -n 1 "$results/$name.log" | cut -c -120)"
}
bench() { # SECONDS NAME ARGUMENTS...: the script benchmarks/NAME.py, its CSV under the same name
    stage "$1" "$2" "$python" "benchmarks/$2.py" --output "$results/$2.csv" "${@:3}"
}
op() { # SECONDS NAME ARGUMENTS...
    stage "$1" "op_$2" "$python" "benchmarks/$2.py" --output "$results/op_$2.csv" --seconds 0.1 --no-compile "${dry[@]}"
}

stage 80 build "$python" -m alignprop_fast.ops.extension
stage 100 tests_gpu "$python" -m pytest -q -p no:cacheprovider "${gpu_tests[@]}"
bench 170 train_step "${train[@]}" "${cpu[@]}" ${TRL_PYTHON:+--trl-python "$TRL_PYTHON"}
stage 60 planner "$python" benchmarks/planner.py --output "$results/planner.csv" "${planner[@]}"
bench 25 offload "${offload[@]}" "${cpu[@]}"
bench 25 graphs "${graphs[@]}" "${cpu[@]}"
bench 25 decoder_options "${decoder[@]}" "${cpu[@]}"
stage 90 tests_ops "$python" -m pytest -q -p no:cacheprovider "${op_tests[@]}"
for name in attention lora_linear group_norm_silu layer_norm; do op 40 "$name"; done
bench 25 step_options "${options[@]}" "${cpu[@]}"
# What is in less doubt, if there is time.
for name in geglu frozen_conv2d guided_step; do op 20 "$name"; done

for log in "$results"/*.log; do grep -E "^(FAILED|ERROR)|WRONG|Error:" "$log" | head -n 5; done
for table in planner offload graphs decoder_options step_options; do
    [ ! -s "$results/$table.csv" ] || column -s, -t "$results/$table.csv"
done
"$python" benchmarks/summary.py "$results"
[ ! -s "$results/train_step.csv" ] || "$python" benchmarks/train_step.py --table "$results/train_step.csv"
exit $status
