#!/usr/bin/env bash
# Novels, words, two epochs, Associative Recurrent Memory Transformer.
# Written by `python -m examples.tables examples/novels/words-2-epochs/table.yaml --write-recipes`.
#   bash examples/novels/words-2-epochs/associative.sh                            the 32 streams over all GPUs that there are
#   CUDA_VISIBLE_DEVICES=0 bash examples/novels/words-2-epochs/associative.sh     on one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
GPUS=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
if [ $((32 % GPUS)) -ne 0 ]; then
    echo "32 streams do not divide into $GPUS GPUs: choose some with CUDA_VISIBLE_DEVICES" >&2
    exit 1
fi
fairseq-train data-bin/novels-words --user-dir lamemo_fairseq --task segment_language_modeling \
    --tokens-per-sample 300 --roll --mem-len 150 --decoder-layers 8 --decoder-embed-dim 410 \
    --decoder-attention-heads 10 --decoder-head-dim 41 --decoder-ffn-embed-dim 2100 \
    --criterion chunked_cross_entropy --optimizer adam --lr 0.00025 --lr-scheduler cosine --max-update 3208 \
    --clip-norm 0.5 --fp16 --cuda-graphs --batch-size-valid 32 --validate-interval-updates 802 \
    --save-interval-updates 802 --keep-interval-updates 1 --no-epoch-checkpoints --num-workers 2 --log-format json \
    --log-interval 100 --arch associative_recurrent_memory_transformer_lm --bptt-segments 2 \
    --batch-size $((32 / GPUS)) --seed 1 --save-dir checkpoints/novels-words-2-epochs/associative
# On one GPU: several would cut the split into more streams.
export CUDA_VISIBLE_DEVICES=$(echo "${CUDA_VISIBLE_DEVICES:-0}" | cut -d, -f1)
fairseq-eval-lm data-bin/novels-words --user-dir lamemo_fairseq --task segment_language_modeling --num-workers 2 \
    --log-format json --path checkpoints/novels-words-2-epochs/associative/checkpoint_best.pt --gen-subset test \
    --batch-size 32
