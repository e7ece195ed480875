#!/bin/sh
# Everything that is measured on a GPU, in one command and one table: correctness, decoding, other projects' loops beside
# it, training. From the project's root, with its packages installed; checkouts of other projects are optional.
#
#   sh benchmarks/gpu.sh [OUT] [--llada PATH --fast-dllm PATH --llada-v PATH]
#   SMALL=1 sh benchmarks/gpu.sh     (tries it all out on a CPU, in a minute)
set -u
out=${1:-runs/bench/gpu}
[ $# -gt 0 ] && shift
mkdir -p "$out"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
part() { name=$1; shift; echo "== $name: $*"; "$@" > "$out/$name.txt" 2>&1; echo "   exit $?" | tee -a "$out/$name.txt"; }

if [ "${SMALL:-}" ]; then
    shape="--device cpu --layers 2 --width 64 --heads 4 --inner 128 --vocabulary 1000"
    part decoding python3 -m benchmarks.gpu $shape --prompts 40 --batches 1 2 --blocks 8 32 --out "$out/decoding.json"
    part peers python3 -m benchmarks.gpu_peers $shape --prompts 40 --out "$out/peers.json" "$@"
    part training python3 -m benchmarks.training --device cpu --shapes tiny --lengths 64 --tokens 128 --vocabulary 512 \
        --attention dense --every-position --out "$out/training.json"
else
    part tests timeout 200 python3 -m pytest -q -p no:cacheprovider --device cuda \
        tests/test_pipeline.py tests/samplers tests/nn tests/families/test_llada.py tests/families/test_sdar.py
    part decoding timeout 200 python3 -m benchmarks.gpu --prompts 64 793 3709 --batches 1 4 8 --blocks 8 32 \
        --out "$out/decoding.json"
    part peers timeout 150 python3 -m benchmarks.gpu_peers --out "$out/peers.json" "$@"
    part training timeout 250 python3 -m benchmarks.training --every-position --out "$out/training.json"
fi
for name in tests decoding peers training; do
    [ -f "$out/$name.txt" ] && echo && echo "== $name" && tail -n 40 "$out/$name.txt"
done
