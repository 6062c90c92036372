#!/bin/sh
# Which heads carry learning in context, in small real models: four word-pair tasks at ten demonstrations, and a
# page of docs/ as plain text. About half an hour a model on two cores.
#
#     MODELS="gemma3-270m smollm2" OUT=runs/icl-heads sh scripts/icl_heads.sh
#
# The tables in docs/real-models.md come from the run folders, by scripts/icl_heads_tables.py.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-runs/icl-heads}
for model in ${MODELS:-gemma3-270m smollm2}; do
    lowmem-icl run --model "$model" ${STORE_DIR:+--store-dir "$STORE_DIR"} --experiments icl-heads \
        --tasks antonym,country_capital,present_past,singular_plural \
        --shots 10 --train-limit 8 --limit 16 --text "$here/docs/numbers.md" \
        --out "$out/$(basename "$model" .gguf)"
done
python "$here/scripts/icl_heads_tables.py" "$out"/* --write "$here/docs/real-models.md"
