#!/usr/bin/env bash
# To launch: bash benchmarks/gpu/lent.sh PART OUT [option ...]
#
# One part of the queue on a GPU machine that is available for ten minutes: bare, without a network, and able to return
# only a few files. Parts 1, 2 and 3 are three commands (benchmarks/gpu/items.py lists their items):
#
#   QLORA_DIST_COMMIT=COMMIT bash benchmarks/gpu/lent.sh 1 "$OUT"     smoke test, 65B on 48 GB, pytest -m gpu
#   QLORA_DIST_COMMIT=COMMIT bash benchmarks/gpu/lent.sh 2 "$OUT"     ceilings, 8B at 8 layers against its peers
#   QLORA_DIST_COMMIT=COMMIT bash benchmarks/gpu/lent.sh 3 "$OUT"     8B at full depth with a profile, planned peaks
#
# Give each a limit of 600 seconds. Wheels in .whl/ are installed first, in addition to the machine's packages. The
# queue works in build/gpu, which lasts as long as the machine, and writes OUT/gpu-partN.tgz after each item and at the
# end, even if the command is cut short. To continue where a part stopped, here or on another machine of the same code:
#
#   tar xzf gpu-part1.tgz -C build        and keep build/gpu
set -uo pipefail
part=${1:?usage: lent.sh PART OUT [option ...]}
mkdir -p "${2:?usage: lent.sh PART OUT [option ...]}"
out=$(cd "$2" && pwd)
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
limit=${LENT_SECONDS:-580} # for this command; the seconds that remain are for packing
wheels=${LENT_WHEELS:-.whl}
python=${QUEUE_PYTHON:-python3}
site=${LENT_SITE:-$HOME/site}

# A .pth file in the interpreter's site-packages reaches every child, even if PYTHONPATH is replaced. pip also compiles
# the wheels: without that, each of 40 processes would lose a second at startup
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
