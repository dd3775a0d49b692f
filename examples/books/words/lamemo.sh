#!/usr/bin/env bash
# Books, words, LaMemo.
# Printed by `python -m examples.tables examples/books/words/table.yaml --print lamemo --as shell`.
set -euo pipefail
[ -d lamemo_fairseq ] || { echo "there is no folder lamemo_fairseq: start from the root of the checkout" >&2; exit 1; }
# 64 streams over all GPUs that there are; CUDA_VISIBLE_DEVICES=0 takes one.
GPUS=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
if [ $((64 % GPUS)) -ne 0 ]; then
    echo "64 streams do not divide into $GPUS GPUs: choose some with CUDA_VISIBLE_DEVICES" >&2
    exit 1
fi
fairseq-train data-bin/books-words --user-dir lamemo_fairseq --task segment_language_modeling \
    --tokens-per-sample 150 --roll --adaptive-softmax-cutoff 5000,10000,50000 --criterion chunked_cross_entropy \
    --optimizer adam --lr 0.00025 --lr-scheduler cosine --max-update 20833 --clip-norm 0.5 --fp16 --cuda-graphs \
    --batch-size-valid 32 --validate-interval 100 --validate-interval-updates 5250 --save-interval 100 \
    --save-interval-updates 10500 --keep-interval-updates 1 --no-epoch-checkpoints --num-workers 2 --log-format json \
    --log-interval 100 --arch lamemo_lm_wt103 --batch-size $((64 / GPUS)) --seed 1 \
    --save-dir checkpoints/books-words/lamemo
# On one GPU: several would cut the split into more streams.
export CUDA_VISIBLE_DEVICES=$(echo "${CUDA_VISIBLE_DEVICES:-0}" | cut -d, -f1)
fairseq-eval-lm data-bin/books-words --user-dir lamemo_fairseq --task segment_language_modeling --num-workers 2 \
    --log-format json --path checkpoints/books-words/lamemo/checkpoint_best.pt --gen-subset test --batch-size 32
