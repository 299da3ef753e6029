#!/usr/bin/env bash
# To launch: bash benchmarks/gpu/queue.sh OUT [SECONDS] [option ...]      (options: python -m benchmarks.gpu -h)
# Measures what has no result under OUT yet for this code, in order of value, for at most SECONDS (default: no limit).
# Run it again with the same OUT to continue.
set -uo pipefail
out=${1:?usage: queue.sh OUT [SECONDS] [option ...]}
shift
seconds=()
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  seconds=(--seconds "$1")
  shift
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
python=${QUEUE_PYTHON:-$python}
# a stop signal is sent to this shell: forward it to the queue, which has seconds to end its item and pack
"$python" -m benchmarks.gpu run "$out" "${seconds[@]}" "$@" &
queue=$!
trap 'kill -TERM $queue 2>/dev/null' TERM INT
wait $queue
code=$?
if kill -0 $queue 2>/dev/null; then # the signal ended the wait, not the queue
  wait $queue
  code=$?
fi
exit $code
