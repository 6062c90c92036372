#!/usr/bin/env bash
# OPT-66B for a night (HOURS, 10 by default): converts it first, one downloaded shard at a time, if its store is not there.
# Needs 66 GB of disk and one shard more. How many units are ablated exactly is chosen by `plan`, from the hours and the
# machine, the first time; start it again the next evening to continue with the same.
set -euo pipefail
here=$(dirname "$0")
model=${MODEL:-facebook/opt-66b}
hours=${HOURS:-10}
# Beside the run folder: one with other files in it and no run is refused.
chosen=${RUNS:-runs}/$(basename "$model").exact
lowmem-icl convert "$model" --delete-shards
if [ ! -s "$chosen" ]; then
    mkdir -p "$(dirname "$chosen")"
    lowmem-icl plan --config "$here/overnight_opt66b.toml" --model "$model" --hours "$hours" --json "$@" > "$chosen.plan"
    # Nothing, where nothing is ablated or one night does not do: the preset's number stays.
    python3 -c 'import json, sys
fits = json.load(sys.stdin)["exact_that_fits"]
print(fits or "")' < "$chosen.plan" > "$chosen.partial"
    mv "$chosen.partial" "$chosen"
    rm "$chosen.plan"
fi
exact=$(cat "$chosen")
exec "$here/overnight.sh" "$here/overnight_opt66b.toml" "$model" "$hours" ${exact:+--exact "$exact"} "$@"
