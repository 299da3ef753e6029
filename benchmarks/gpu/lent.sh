#!/usr/bin/env bash
# To launch: bash benchmarks/gpu/lent.sh PART OUT [option ...]
#
# One part of the queue on a GPU machine that is had for ten minutes: bare, without a network, and of which only a few
# files come back. Parts 1, 2, 3 are three commands (benchmarks/gpu/items.py says what is in them):
#
#   QLORA_DIST_COMMIT=COMMIT bash benchmarks/gpu/lent.sh 1 "$OUT"     smoke of every path, 65B on 48 GB, pytest -m gpu
#   QLORA_DIST_COMMIT=COMMIT bash benchmarks/gpu/lent.sh 2 "$OUT"     ceilings, 8B at 8 layers beside its peers
#   QLORA_DIST_COMMIT=COMMIT bash benchmarks/gpu/lent.sh 3 "$OUT"     8B at full depth with a profile, planned peaks
#
# Give each a limit of 600 seconds. Wheels in .whl/ are installed first, beside what the machine has. The queue works in
# build/gpu, which stays while the machine does, and leaves OUT/gpu-partN.tgz, written anew after each item and at the
# end, also when the command is cut. To go on where a part ended, here or on another machine of the same code:
#
#   tar xzf gpu-part1.tgz -C build        and take build/gpu along
set -uo pipefail
part=${1:?usage: lent.sh PART OUT [option ...]}
mkdir -p "${2:?usage: lent.sh PART OUT [option ...]}"
out=$(cd "$2" && pwd)
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
limit=${LENT_SECONDS:-580} # of this command; then its last seconds are for packing
wheels=${LENT_WHEELS:-.whl}
python=${QUEUE_PYTHON:-python3}
site=${LENT_SITE:-$HOME/site}

# A .pth file in the interpreter's own folder is read by every child, also where PYTHONPATH is set anew. Compiled: with
# 40 processes to start, a second each would be lost otherwise
if compgen -G "$wheels/*.whl" >/dev/null; then
  if [ ! -e "$site/.whole" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-cache-dir --disable-pip-version-check --upgrade \
      --target "$site" "$wheels"/*.whl || exit
    touch "$site/.whole"
  fi
  echo "$site" >"$("$python" -c 'import site; print(site.getsitepackages()[0])')/qlora-dist-wheels.pth" || exit
fi
export QUEUE_PYTHON=$python
exec bash benchmarks/gpu/queue.sh build/gpu $((limit - SECONDS)) --part "$part" --pack "$out/gpu-part$part.tgz" "$@"
