#!/bin/sh
# What models get wrong, of two LSTMs of words beside n-grams: suites, mixtures, first guesses, the page of errors.
#
#     sh bench/errors.sh PTB_RUN WIKITEXT2_RUN SUITES OUT
#
# The parts run side by side, so their seconds say little. Each has its own file in OUT; one that fails or takes more than
# LIMIT (170) seconds costs the others nothing.
set -u
ptb=$1 wikitext=$2 suites=$3 out=$4
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
mkdir -p "$out"

named() { # RUN NAME: the run's model under a name that pages and tables show
    mkdir "$work/$2" || exit
    for file in manifest.json config.json tokenizer.json config.toml; do
        cp "$1/$file" "$work/$2" || exit
    done
    cp "$1"/model*.safetensors* "$work/$2" && ln -s "$(realpath "$1/store")" "$work/$2/store" || exit
}

part() { # NAME COMMAND...: what it prints, and its seconds
    name=$1
    shift
    (
        start=$(date +%s)
        timeout "${LIMIT:-170}" "$@" >"$out/errors-$name.txt" 2>"$work/$name.log"
        code=$?
        [ $code = 0 ] || tail -n 20 "$work/$name.log" >>"$out/errors-$name.txt"
        echo "[exit code $code, $(($(date +%s) - start)) s]" >>"$out/errors-$name.txt"
        echo "$name: exit code $code, $(($(date +%s) - start)) s"
    ) &
}

lstm=$work/AWD-LSTM kn5=$work/KN5
named "$ptb" AWD-LSTM
named "$wikitext" AWD-LSTM-wikitext-2
for suite in blimp gulordava lambada; do
    part "$suite" "$python" -m recurlm eval "$work/AWD-LSTM-wikitext-2" --suite $suite --from "$suites"
done
"$python" -m recurlm ngram train "$lstm/store" -o "$kn5" || exit
part report "$python" -m recurlm eval "$lstm" --report "$out/errors-report.html" --against "$kn5" --force
part predictions "$python" bench/ngram.py predictions "$lstm/store" "$lstm" "$kn5"
part wikitext-2 "$python" -m recurlm eval "$work/AWD-LSTM-wikitext-2" --no-ranks
part mixture "$python" -m recurlm eval "$lstm" --with "$kn5" --no-ranks
part mixture-cache "$python" -m recurlm eval "$lstm" --with "$kn5" --cache 100 --cache 200 --cache 500
wait
for file in "$out"/errors-*.txt; do
    echo "== $file"
    cut -c1-170 "$file"
done
