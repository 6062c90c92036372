#!/usr/bin/env bash
# One model overnight: says what it will cost, then runs until it is done or the hours are over. Start it again to continue.
#
#   scripts/overnight.sh CONFIG MODEL HOURS [more options of `lowmem-icl run`]
#
# Everything lands in runs/<model> (RUNS= names another folder); what is printed also in runs/<model>/overnight.log.
set -uo pipefail

config=${1:?config file}
model=${2:?model}
hours=${3:?hours}
shift 3
out=${RUNS:-runs}/$(basename "$model")
mkdir -p "$out"
exec > >(tee -a "$out/overnight.log") 2>&1

printf '\n%s  %s, %s hours\n' "$(date -u +%FT%TZ)" "$model" "$hours"
lowmem-icl plan --config "$config" --model "$model" --hours "$hours" --out "$out" "$@" || exit $?
lowmem-icl run --config "$config" --model "$model" --hours "$hours" --out "$out" "$@"
status=$?
case $status in
0) printf '%s  over: %s/report.html; the same command continues with what is left, if anything\n' "$(date -u +%FT%TZ)" "$out" ;;
75) printf '%s  is running already; nothing was started\n' "$(date -u +%FT%TZ)" ;;
*) printf '%s  stopped with exit code %s; finished parts are kept, the same command continues\n' "$(date -u +%FT%TZ)" "$status" ;;
esac
exit $status
