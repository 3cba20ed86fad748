#!/bin/sh
# What models get wrong, of two LSTMs of words beside n-grams: suites, mixtures, first guesses, the page of errors.
#
#     sh bench/errors.sh PTB_RUN WIKITEXT2_RUN SUITES OUT PTB WIKITEXT2
#
# PTB and WIKITEXT2 are the texts: each page measures the other's text as another style. The parts run side by side, so
# their seconds say little. Each has its own file in OUT; one that fails or takes more than LIMIT (170) seconds costs
# the others nothing.
set -u
ptb=$1 wikitext=$2 suites=$3 out=$4 ptb_text=$5 wikitext_text=$6
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

mkdir "$work/ptb" "$work/wikitext-2"
named "$ptb" ptb/AWD-LSTM
named "$wikitext" wikitext-2/AWD-LSTM
for suite in blimp gulordava lambada; do
    part "$suite" "$python" -m recurlm eval "$work/wikitext-2/AWD-LSTM" --suite $suite --from "$suites"
done
for text in ptb wikitext-2; do
    "$python" -m recurlm ngram train "$work/$text/AWD-LSTM/store" -o "$work/$text/KN5" || exit
done
for text in ptb wikitext-2; do
    other=$([ $text = ptb ] && echo "$wikitext_text" || echo "$ptb_text")
    part "report-$text" "$python" -m recurlm eval "$work/$text/AWD-LSTM" --report "$out/errors-report-$text.html" \
        --against "$work/$text/KN5" --other "$other" --force
    part "mixture-$text" "$python" -m recurlm eval "$work/$text/AWD-LSTM" --with "$work/$text/KN5" --no-ranks
done
part predictions "$python" bench/ngram.py predictions "$work/ptb/AWD-LSTM/store" \
    "$work/ptb/AWD-LSTM" "$work/ptb/KN5"
for model in AWD-LSTM KN5; do
    part "contexts-$model" "$python" -m recurlm ngram query "$work/ptb/$model" --next 5 \
        'amazing because' 'awesome because' 'the problem is serious because' 'the company said'
done
part alone-wikitext-2 "$python" -m recurlm eval "$work/wikitext-2/AWD-LSTM" --no-ranks
part mixture-cache-ptb "$python" -m recurlm eval "$work/ptb/AWD-LSTM" --with "$work/ptb/KN5" \
    --cache 100 --cache 200 --cache 500
wait
for file in "$out"/errors-*.txt; do
    echo "== $file"
    cut -c1-170 "$file"
done
