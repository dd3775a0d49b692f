#!/usr/bin/env bash
# Novels, words, two epochs, Memorizing Transformer, dense.
# Written by `python -m examples.tables examples/novels/words-2-epochs/table.yaml --write-recipes`.
#   bash examples/novels/words-2-epochs/memorizing_dense.sh                            the 64 streams over all GPUs that there are
#   CUDA_VISIBLE_DEVICES=0 bash examples/novels/words-2-epochs/memorizing_dense.sh     on one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
GPUS=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
if [ $((64 % GPUS)) -ne 0 ]; then
    echo "64 streams do not divide into $GPUS GPUs: choose some with CUDA_VISIBLE_DEVICES" >&2
    exit 1
fi
fairseq-train data-bin/novels-words --user-dir lamemo_fairseq --task segment_language_modeling \
    --tokens-per-sample 150 --roll --mem-len 150 --decoder-layers 8 --decoder-embed-dim 410 \
    --decoder-attention-heads 10 --decoder-head-dim 41 --decoder-ffn-embed-dim 2100 \
    --criterion chunked_cross_entropy --optimizer adam --lr 0.00025 --lr-scheduler cosine --max-update 3208 \
    --clip-norm 0.5 --fp16 --cuda-graphs --batch-size-valid 32 --validate-interval-updates 802 \
    --save-interval-updates 802 --keep-interval-updates 1 --no-epoch-checkpoints --num-workers 2 --log-format json \
    --log-interval 100 --arch memorizing_transformer_lm --store-len 8192 --retrieval dense \
    --batch-size $((64 / GPUS)) --seed 1 --save-dir checkpoints/novels-words-2-epochs/memorizing_dense
# On one GPU: several would cut the split into more streams.
export CUDA_VISIBLE_DEVICES=$(echo "${CUDA_VISIBLE_DEVICES:-0}" | cut -d, -f1)
fairseq-eval-lm data-bin/novels-words --user-dir lamemo_fairseq --task segment_language_modeling --num-workers 2 \
    --log-format json --path checkpoints/novels-words-2-epochs/memorizing_dense/checkpoint_best.pt --gen-subset test \
    --batch-size 32
