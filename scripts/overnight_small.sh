#!/usr/bin/env bash
# OPT from 125m to 6.7b, HOURS each (2 by default); a model that fails does not keep the next from running.
set -uo pipefail
here=$(dirname "$0")
failed=()
for size in ${SIZES:-125m 350m 1.3b 2.7b 6.7b}; do
    "$here/overnight.sh" "$here/overnight_small.toml" "facebook/opt-$size" "${HOURS:-2}" "$@"
    status=$?
    # Ctrl-C and SIGTERM end the night, not one model.
    ((status == 130 || status == 143)) && exit $status
    ((status == 0)) || failed+=("$size ($status)")
done
if ((${#failed[@]})); then
    printf 'not finished, with exit codes: %s\n' "${failed[*]}"
    exit 4
fi
