#!/usr/bin/env bash
# WikiText-103, LaMemo (reported perplexity, valid / test: 22.98 / 23.77).
# Printed by `python -m examples.tables examples/wikitext-103/table.yaml --print lamemo --as shell`.
set -euo pipefail
[ -d lamemo_fairseq ] || { echo "there is no folder lamemo_fairseq: start from the root of the checkout" >&2; exit 1; }
# 64 streams over all GPUs that there are; CUDA_VISIBLE_DEVICES=0 takes one.
GPUS=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
if [ $((64 % GPUS)) -ne 0 ]; then
    echo "64 streams do not divide into $GPUS GPUs: choose some with CUDA_VISIBLE_DEVICES" >&2
    exit 1
fi
fairseq-train data-bin/wikitext-103 --user-dir lamemo_fairseq --task segment_language_modeling \
    --tokens-per-sample 150 --roll --criterion chunked_cross_entropy --optimizer adam --lr 0.00025 \
    --lr-scheduler cosine --max-update 250000 --clip-norm 0.5 --fp16 --batch-size-valid 16 \
    --validate-interval-updates 5000 --save-interval-updates 5000 --keep-interval-updates 2 --no-epoch-checkpoints \
    --num-workers 2 --log-format json --log-interval 100 --arch lamemo_lm_wt103 --batch-size $((64 / GPUS)) --seed 1 \
    --save-dir checkpoints/wikitext-103/lamemo
# On one GPU: several would cut the split into more streams.
export CUDA_VISIBLE_DEVICES=$(echo "${CUDA_VISIBLE_DEVICES:-0}" | cut -d, -f1)
fairseq-eval-lm data-bin/wikitext-103 --user-dir lamemo_fairseq --task segment_language_modeling --num-workers 2 \
    --log-format json --path checkpoints/wikitext-103/lamemo/checkpoint_best.pt --gen-subset test --batch-size 16
