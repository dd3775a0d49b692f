#!/usr/bin/env bash
# Novels, bytes, Associative Recurrent Memory Transformer.
# Written by `python -m examples.tables examples/novels/bytes/table.yaml --write-recipes`.
#   bash examples/novels/bytes/associative.sh                            the 20 streams over all GPUs that there are
#   CUDA_VISIBLE_DEVICES=0 bash examples/novels/bytes/associative.sh     on one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
GPUS=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
if [ $((20 % GPUS)) -ne 0 ]; then
    echo "20 streams do not divide into $GPUS GPUs: choose some with CUDA_VISIBLE_DEVICES" >&2
    exit 1
fi
fairseq-train data-bin/novels-bytes --user-dir lamemo_fairseq --task segment_language_modeling \
    --tokens-per-sample 1024 --roll --criterion chunked_cross_entropy --optimizer adam --lr 0.00025 \
    --lr-scheduler cosine --max-update 5000 --clip-norm 0.5 --fp16 --cuda-graphs --batch-size-valid 16 \
    --validate-interval-updates 1000 --save-interval-updates 1000 --keep-interval-updates 1 --no-epoch-checkpoints \
    --num-workers 2 --log-format json --log-interval 100 --arch associative_recurrent_memory_transformer_lm_enwik8 \
    --bptt-segments 2 --batch-size $((20 / GPUS)) --seed 1 --save-dir checkpoints/novels-bytes/associative
# On one GPU: several would cut the split into more streams.
export CUDA_VISIBLE_DEVICES=$(echo "${CUDA_VISIBLE_DEVICES:-0}" | cut -d, -f1)
fairseq-eval-lm data-bin/novels-bytes --user-dir lamemo_fairseq --task segment_language_modeling --num-workers 2 \
    --log-format json --path checkpoints/novels-bytes/associative/checkpoint_best.pt --gen-subset test \
    --batch-size 16
