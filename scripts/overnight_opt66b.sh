#!/usr/bin/env bash
# OPT-66B for a night (HOURS, 10 by default): converts it first, one downloaded shard at a time, if its store is not there.
# Needs 66 GB of disk and one shard more; start it again the next evening to continue.
set -euo pipefail
here=$(dirname "$0")
lowmem-icl convert facebook/opt-66b --delete-shards
exec "$here/overnight.sh" "$here/overnight_opt66b.toml" facebook/opt-66b "${HOURS:-10}" "$@"
