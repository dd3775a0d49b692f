#!/usr/bin/env bash
# WikiText-103, Recurrent Memory Transformer (reported valid / test: - / 23.99).
# Written by `python -m examples.tables examples/wikitext-103/table.yaml --write-recipes`.
#   bash examples/wikitext-103/memory_tokens.sh                            the 32 streams over all GPUs that there are
#   CUDA_VISIBLE_DEVICES=0 bash examples/wikitext-103/memory_tokens.sh     on one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
GPUS=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
if [ $((32 % GPUS)) -ne 0 ]; then
    echo "32 streams do not divide into $GPUS GPUs: choose some with CUDA_VISIBLE_DEVICES" >&2
    exit 1
fi
fairseq-train data-bin/wikitext-103 --user-dir lamemo_fairseq --task segment_language_modeling \
    --tokens-per-sample 300 --roll --criterion chunked_cross_entropy --optimizer adam --lr 0.00025 \
    --lr-scheduler cosine --max-update 250000 --clip-norm 0.5 --fp16 --batch-size-valid 16 \
    --validate-interval-updates 5000 --save-interval-updates 5000 --keep-interval-updates 2 --no-epoch-checkpoints \
    --num-workers 2 --log-format json --log-interval 100 --arch recurrent_memory_transformer_lm_wt103 \
    --bptt-segments 2 --batch-size $((32 / GPUS)) --seed 1 --save-dir checkpoints/wikitext-103/memory_tokens
# On one GPU: several would cut the split into more streams.
export CUDA_VISIBLE_DEVICES=$(echo "${CUDA_VISIBLE_DEVICES:-0}" | cut -d, -f1)
fairseq-eval-lm data-bin/wikitext-103 --user-dir lamemo_fairseq --task segment_language_modeling --num-workers 2 \
    --log-format json --path checkpoints/wikitext-103/memory_tokens/checkpoint_best.pt --gen-subset test \
    --batch-size 16
