#!/usr/bin/env bash
# Novels, words, LaMemo (reported perplexity, valid / test: 84.16 / 102.55).
# Printed by `python -m examples.tables examples/novels/words/table.yaml --print lamemo --as shell`.
set -euo pipefail
[ -d lamemo_fairseq ] || { echo "there is no folder lamemo_fairseq: start from the root of the checkout" >&2; exit 1; }
# 64 streams over all GPUs that there are; CUDA_VISIBLE_DEVICES=0 takes one.
GPUS=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
if [ $((64 % GPUS)) -ne 0 ]; then
    echo "64 streams do not divide into $GPUS GPUs: choose some with CUDA_VISIBLE_DEVICES" >&2
    exit 1
fi
fairseq-train data-bin/novels-words --user-dir lamemo_fairseq --task segment_language_modeling \
    --tokens-per-sample 150 --roll --mem-len 150 --decoder-layers 8 --decoder-embed-dim 410 \
    --decoder-attention-heads 10 --decoder-head-dim 41 --decoder-ffn-embed-dim 2100 \
    --criterion chunked_cross_entropy --optimizer adam --lr 0.00025 --lr-scheduler cosine --max-update 1606 \
    --clip-norm 0.5 --fp16 --batch-size-valid 16 --validate-interval-updates 200 --save-interval-updates 200 \
    --keep-interval-updates 2 --no-epoch-checkpoints --num-workers 2 --log-format json --log-interval 100 \
    --arch lamemo_lm --batch-size $((64 / GPUS)) --seed 1 --save-dir checkpoints/novels-words/lamemo
# On one GPU: several would cut the split into more streams.
export CUDA_VISIBLE_DEVICES=$(echo "${CUDA_VISIBLE_DEVICES:-0}" | cut -d, -f1)
fairseq-eval-lm data-bin/novels-words --user-dir lamemo_fairseq --task segment_language_modeling --num-workers 2 \
    --log-format json --path checkpoints/novels-words/lamemo/checkpoint_best.pt --gen-subset test --batch-size 16
