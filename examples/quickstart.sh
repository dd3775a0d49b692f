#!/usr/bin/env bash
# From a fresh clone to two trained models: LaMemo and a Transformer-XL of the same size, on the bytes of invented tales.
#   bash examples/quickstart.sh                         under four minutes on two CPU cores, after the installation
#   QUICKSTART_UPDATES=20 bash examples/quickstart.sh   a short one, to see that everything works
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
updates=${QUICKSTART_UPDATES:-1000} # 1000 are one pass over the text
work=work/quickstart
step="the installation" log=""
failed() {
    if [ -n "$log" ]; then tail -n 15 "$log" >&2; fi
    echo "quickstart: $step failed; the lines above say why. Once that is mended, run it again: it starts over." >&2
}
trap failed ERR
begin() { # a step, whose log is the second argument
    step=$1 log=${2:-}
    echo "== $step${log:+ (log: $log)}"
}

bash examples/install.sh .venv
export PATH=$PWD/.venv/bin:$PATH
export OMP_WAIT_POLICY=passive # torch's threads otherwise spin, ten times slower if another program wants a core
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} # one GPU, if there is one
SECONDS=0
rm -rf "$work"
mkdir -p "$work/lamemo_lm" "$work/transformer_xl_lm"

begin "writing the tales, and encoding them as bytes" "$work/preprocess.log"
python examples/quickstart/corpus.py "$work/text"
python -m preprocess own --destdir "$work/data-bin" --source "$work/text" --bpe bytes >"$log" 2>&1

task=(--user-dir lamemo_fairseq --task segment_language_modeling)
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || task+=(--cpu)
train() { # fairseq writes its log to stdout and its progress bar to stderr, where a terminal shows it
    fairseq-train "$work/data-bin" "${task[@]}" --arch "$1" \
        --tokens-per-sample 64 --mem-len 64 --batch-size 16 --roll \
        --decoder-layers 2 --decoder-embed-dim 128 --decoder-attention-heads 4 --decoder-ffn-embed-dim 512 --dropout 0 \
        --optimizer adam --lr 2e-3 --lr-scheduler cosine --warmup-updates $((updates / 10)) --clip-norm 0.25 \
        --max-update "$updates" --seed 1 --save-dir "$work/$1" --no-epoch-checkpoints --batch-size-valid 4 \
        --log-interval 10 >>"$log"
}
for arch in lamemo_lm transformer_xl_lm; do
    begin "training $arch, $updates updates" "$work/$arch/train.log"
    if [ -t 2 ]; then train "$arch"; else train "$arch" 2>>"$log"; fi
done

evaluate() { # the model in a folder; its log; options
    fairseq-eval-lm "$work/data-bin" "${task[@]}" --path "$work/$1/checkpoint_best.pt" --gen-subset test --batch-size 4 \
        "${@:3}" >"$work/$1/$2" 2>&1
}
for arch in lamemo_lm transformer_xl_lm; do
    begin "evaluating $arch, with its memory and without" "$work/$arch/eval.log"
    evaluate "$arch" without.log --model-overrides "{'memory': 'none', 'position_encoding': 'transformer-xl'}" &
    evaluate "$arch" eval.log
    wait $! || { log=$work/$arch/without.log; false; }
done

begin "continuing a tale" "$work/continuation.log"
echo "Long ago Greta was the best potter in Dover. One day Greta met Hugo, a sailor of Camden." |
    fairseq-interactive "$work/data-bin" "${task[@]}" --path "$work/lamemo_lm/checkpoint_best.pt" \
        --sampling --sampling-topp 0.8 --beam 1 --max-len-b 400 --min-len 250 --seed 1 >"$log" 2>&1
awk -F '\t' '/^D-/ {gsub("</s>", "\n", $3); print $3}' "$log" | fold -s -w 100

echo
python examples/quickstart/summary.py "LaMemo=$work/lamemo_lm" "Transformer-XL=$work/transformer_xl_lm"
if [ "$updates" -ge 1000 ]; then
    echo "Lower is better. Both models live on their memory: without it they need more than twice the bits. Neither model is"
    echo "better by this table: in other tries either was ahead by a few hundredths of a bit. Longer runs:"
    echo "examples/novels/README.md"
else
    echo "In $updates updates the models learn next to nothing: this run shows only that everything works."
fi
echo "$((SECONDS / 60)) minutes $((SECONDS % 60)) seconds after the installation"
