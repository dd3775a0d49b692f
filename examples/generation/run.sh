#!/usr/bin/env bash
# The paper's generation setting with models of your own text, on one GPU. This script trains LaMemo and Transformer-XL on bytes side by side, continues the same prompts with both, and prints measures of repetition.
#   bash examples/generation/run.sh FOLDER      a folder with train.txt, valid.txt and test.txt
#   UPDATES=4000 bash examples/generation/run.sh FOLDER
# DATA names a folder that fairseq-preprocess has written already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
text=$1
updates=${UPDATES:-4000}
work=${WORK:-work/generation}
data=${DATA:-$work/data-bin}
mkdir -p "$work"
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
done
wait
for arch in lamemo_lm transformer_xl_lm; do
    python3 -m fairseq_cli.eval_lm "$data" --user-dir lamemo_fairseq --task segment_language_modeling \
        --path "$work/$arch/checkpoint_last.pt" --gen-subset test --batch-size 8 2>&1 | grep "Loss (base 2)" | sed "s/^/$arch: /"
done
python3 examples/generation/continue_prompts.py "$data" "lamemo_lm=$work/lamemo_lm" \
    "transformer_xl_lm=$work/transformer_xl_lm" --text "$text/test.txt"
