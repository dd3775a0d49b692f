#!/usr/bin/env bash
# Novels, bytes, Memorizing Transformer.
# Written by `python -m examples.tables examples/novels/bytes/table.yaml --write-recipes`.
#   bash examples/novels/bytes/memorizing.sh                            the 40 streams over all GPUs that there are
#   CUDA_VISIBLE_DEVICES=0 bash examples/novels/bytes/memorizing.sh     on one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
GPUS=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
if [ $((40 % GPUS)) -ne 0 ]; then
    echo "40 streams do not divide into $GPUS GPUs: choose some with CUDA_VISIBLE_DEVICES" >&2
    exit 1
fi
fairseq-train data-bin/novels-bytes --user-dir lamemo_fairseq --task segment_language_modeling \
    --tokens-per-sample 512 --roll --criterion chunked_cross_entropy --optimizer adam --lr 0.00025 \
    --lr-scheduler cosine --max-update 5000 --clip-norm 0.5 --fp16 --cuda-graphs --batch-size-valid 16 \
    --validate-interval-updates 1000 --save-interval-updates 1000 --keep-interval-updates 1 --no-epoch-checkpoints \
    --num-workers 2 --log-format json --log-interval 100 --arch memorizing_transformer_lm_enwik8 --store-len 8192 \
    --batch-size $((40 / GPUS)) --seed 1 --save-dir checkpoints/novels-bytes/memorizing
# On one GPU: several would cut the split into more streams.
export CUDA_VISIBLE_DEVICES=$(echo "${CUDA_VISIBLE_DEVICES:-0}" | cut -d, -f1)
fairseq-eval-lm data-bin/novels-bytes --user-dir lamemo_fairseq --task segment_language_modeling --num-workers 2 \
    --log-format json --path checkpoints/novels-bytes/memorizing/checkpoint_best.pt --gen-subset test \
    --batch-size 16
