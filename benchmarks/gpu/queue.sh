#!/usr/bin/env bash
# To launch: bash benchmarks/gpu/queue.sh OUT [SECONDS]
# Measures what has no result under OUT yet for this code, in order of value, for at most SECONDS (default: no limit).
# Start it again with the same OUT to go on.
set -euo pipefail
out=${1:?usage: queue.sh OUT [SECONDS]}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
"$python" -m benchmarks.gpu run "$out" ${2:+--seconds "$2"}
"$python" -m benchmarks.gpu status "$out"
