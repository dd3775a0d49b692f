#!/usr/bin/env bash
# The paper's generation setting with models of your own text, on one GPU. This script trains LaMemo and Transformer-XL on bytes side by side, continues the same prompts with both, and prints measures of repetition.
#   bash examples/generation/run.sh FOLDER      a folder with train.txt, valid.txt and test.txt
#   UPDATES=4000 bash examples/generation/run.sh FOLDER
# DATA names a folder that fairseq-preprocess has written already.
set -euo pipefail
if [ $# -ne 1 ] || [ "${1:0:1}" = - ]; then
    echo "usage: bash examples/generation/run.sh FOLDER, with train.txt, valid.txt and test.txt; it needs a GPU" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if ! python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "examples/generation/run.sh trains two models in fp16, so it needs a GPU and PyTorch: PyTorch sees no GPU here" >&2
    exit 1
fi
text=$1
updates=${UPDATES:-4000}
work=${WORK:-work/generation}
data=${DATA:-$work/data-bin}
mkdir -p "$work"
pids=()
trap '[ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true' EXIT
fail() { # what failed; its log
    tail -n 5 "$2" >&2
    echo "$1 failed: $2 has the whole log" >&2
    exit 1
}
if [ ! -e "$data/dict.txt" ]; then
    python3 -m preprocess own --destdir "$data" --source "$text" --bpe bytes
fi
for arch in lamemo_lm transformer_xl_lm; do
    mkdir -p "$work/$arch"
    python3 -m fairseq_cli.train "$data" --user-dir lamemo_fairseq --task segment_language_modeling --arch "$arch" \
        --tokens-per-sample 256 --mem-len 256 --batch-size 32 --roll --fp16 \
        --decoder-layers 6 --decoder-embed-dim 384 --decoder-attention-heads 6 --decoder-ffn-embed-dim 1536 --dropout 0.1 \
        --optimizer adam --lr 1e-3 --lr-scheduler cosine --warmup-updates 100 --clip-norm 0.25 \
        --max-update "$updates" --seed 1 --save-dir "$work/$arch" --no-epoch-checkpoints --save-interval-updates 250 --keep-interval-updates 1 --disable-validation \
        --log-format simple --log-interval 100 >"$work/$arch/train.log" 2>&1 &
    pids+=($!)
done
for arch in lamemo_lm transformer_xl_lm; do
    wait "${pids[0]}" || fail "training $arch" "$work/$arch/train.log"
    pids=("${pids[@]:1}")
done
for arch in lamemo_lm transformer_xl_lm; do
    python3 -m fairseq_cli.eval_lm "$data" --user-dir lamemo_fairseq --task segment_language_modeling \
        --path "$work/$arch/checkpoint_last.pt" --gen-subset test --batch-size 8 >"$work/$arch/eval.log" 2>&1 ||
        fail "evaluating $arch" "$work/$arch/eval.log"
    grep "Loss (base 2)" "$work/$arch/eval.log" | sed "s/^/$arch: /" || fail "evaluating $arch" "$work/$arch/eval.log"
done
python3 examples/generation/continue_prompts.py "$data" "lamemo_lm=$work/lamemo_lm" \
    "transformer_xl_lm=$work/transformer_xl_lm" --text "$text/test.txt"
