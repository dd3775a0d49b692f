#!/usr/bin/env bash
# From a fresh clone to two trained models: LaMemo and a Transformer-XL of the same size, on bytes.
#   bash examples/quickstart.sh                         about five minutes on two CPU cores, after the installation
#   QUICKSTART_UPDATES=20 bash examples/quickstart.sh   a short one, to see that everything works
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
updates=${QUICKSTART_UPDATES:-700}
work=work/quickstart
step="the installation"
trap 'echo "quickstart: $step failed; the lines above say why. Run it again to start over." >&2' ERR

bash examples/install.sh .venv
export PATH=$PWD/.venv/bin:$PATH
export OMP_WAIT_POLICY=passive # torch's threads otherwise spin, ten times slower if another program wants a core
# A terminal gets fairseq's progress bars, a log file plain lines.
if [ -t 1 ]; then bars=(--log-format tqdm); else bars=(--log-format simple); fi

step="preparing the data"
echo "== $step"
rm -rf "$work"
python examples/quickstart/corpus.py "$work/text"
python -m preprocess own --destdir "$work/data-bin" --source "$work/text" --bpe bytes --workers 2 \
    >"$work/preprocess.log" 2>&1 || { tail -n 20 "$work/preprocess.log"; false; }
grep -E "tokens in" "$work/preprocess.log"

task=(--user-dir lamemo_fairseq --task segment_language_modeling --cpu)
for arch in lamemo_lm transformer_xl_lm; do
    folder=$work/$arch
    mkdir -p "$folder"
    step="training $arch"
    echo "== $step"
    fairseq-train "$work/data-bin" "${task[@]}" --arch "$arch" \
        --tokens-per-sample 64 --mem-len 64 --batch-size 16 --roll \
        --decoder-layers 4 --decoder-embed-dim 128 --decoder-attention-heads 4 --decoder-ffn-embed-dim 512 --dropout 0 \
        --optimizer adam --lr 2e-3 --lr-scheduler cosine --warmup-updates $((updates / 10)) --clip-norm 0.25 \
        --max-update "$updates" --seed 1 --save-dir "$folder" --no-epoch-checkpoints --batch-size-valid 4 \
        "${bars[@]}" --log-interval 50 2>&1 | tee "$folder/train.log"
    step="evaluating $arch"
    echo "== $step"
    fairseq-eval-lm "$work/data-bin" "${task[@]}" --path "$folder/checkpoint_best.pt" --gen-subset test --batch-size 4 \
        "${bars[@]}" 2>&1 | tee "$folder/eval.log" | grep -E "Evaluated|Loss"
done

step="continuing a prompt"
echo "== $step"
prompt="The statement"
echo "$prompt" |
    fairseq-interactive "$work/data-bin" "${task[@]}" --path "$work/lamemo_lm/checkpoint_best.pt" \
        --sampling --sampling-topp 0.9 --beam 1 --max-len-b 150 --min-len 100 --seed 1 \
        >"$work/continuation.log" 2>&1 || { tail -n 20 "$work/continuation.log"; false; }
echo "LaMemo goes on from \"$prompt\":"
grep -P "^D-\d+\t" "$work/continuation.log" | cut -f3

echo
python examples/quickstart/summary.py "LaMemo=$work/lamemo_lm" "Transformer-XL=$work/transformer_xl_lm"
