#!/usr/bin/env bash
# What only a CUDA GPU can show, in about fifteen minutes and without a network, the most important first.
#
#   bash benchmarks/on_a_gpu.sh OUT               on a machine with a GPU
#   bash benchmarks/on_a_gpu.sh OUT --rehearse    small, on a CPU, in some 8 minutes: shows beforehand that every part
#                                                 runs (but the tests, which are skipped); its figures mean nothing
#
# OUT is a folder, made if need be. Each part has a time limit, and leaves what it prints in a file there; summary.txt
# says how each ended. The exit code is 1 if one failed. Variables of the environment:
#
# PYTHON     the interpreter that has PyTorch (default: python3)
# WHEELS     a folder of wheels to install beside its packages, for what such a machine lacks, as in
#            pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels datasets dill multiprocess
# TOKENIZER  as for gpt2_tinystories.py (default: bpe:4096); a folder with GPT-2's makes the vocabulary real
set -uo pipefail

if [ $# = 0 ] || ! mkdir -p "$1"; then
    echo "usage: bash benchmarks/on_a_gpu.sh OUT [--rehearse]" >&2
    exit 2
fi
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
tokenizer=${TOKENIZER:-bpe:4096}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ "${2:-}" = --rehearse ]; then
    n_stories=300
    patience=4 # times as long
    device=cpu
    sizes=(--n-embd 32 --n-head 2 --n-inner 64 --n-positions 64 --epochs 2)
    few=(--rounds 1 --steps 1)
    large=(--batch-size 4 --accum-steps 1)
else
    n_stories=42394 # a fifth of the default job, which is a tenth of TinyStories
    patience=1
    device=cuda
    sizes=()
    few=(--steps 100)
    large=(--batch-size 64 --accum-steps 1)
fi

# part NAME SECONDS COMMAND...: a command that may take so long.
part() {
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    timeout --signal=TERM --kill-after=20 $((limit * patience)) "$@" >"$out/$name.txt" 2>&1
    local code=$?
    [ "$code" = 0 ] || failed=1
    echo "$name: exit code $code after $((SECONDS - began)) s" | tee -a "$out/summary.txt"
}
failed=0

: >"$out/summary.txt"
if [ -n "${WHEELS:-}" ]; then
    part wheels 60 "$python" -m pip install --quiet --no-index --no-deps --target "$work/site" "$WHEELS"/*.whl
    export PYTHONPATH=$PWD:$work/site
fi
part machine 60 "$python" -c "import torch, transformers; print(torch.__version__, transformers.__version__)
print(torch.zeros(1, device='$device') + 1, torch.cuda.is_available() and torch.cuda.get_device_name())"
"$python" sample_stories.py "$n_stories" >"$work/stories.txt"
"$python" sample_stories.py $((n_stories / 10)) >"$work/some.txt" # for speed
speed=("$python" benchmarks/train_speed.py --data "$work/some.txt" --tokenizer "$tokenizer" --device "$device")
speed+=("${few[@]}")

part tests 150 "$python" -m pytest -n 0 -m gpu -rs tests/test_gpu.py
part speed_8x2 180 "${speed[@]}" --only hf-tuned not-folded ours
part run 300 "$python" gpt2_tinystories.py --data "$work/stories.txt" --fraction 1 --tokenizer "$tokenizer" \
    --device "$device" "${sizes[@]}" --checkpoints "$work/run" --plots "$out"
part profile 60 "${speed[@]}" --only ours --rounds 1 --profile
part speed_64x1 180 "${speed[@]}" "${large[@]}" --only hf-tuned not-folded ours
exit $failed
