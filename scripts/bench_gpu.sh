#!/usr/bin/env bash
# Tokens per second of the sweep on a card, beside bitsandbytes' Linear8bitLt in Hugging Face; options: --help.
# Needs no network and no data: bash scripts/bench_gpu.sh [--json FILE]
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "$0")/bench_gpu.py" "$@"
