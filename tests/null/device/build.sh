#!/usr/bin/env bash
# Creates DIR/python: an interpreter of PYTHON's environment with one GPU that accepts every call and computes nothing.
# usage: build.sh PYTHON DIR      PYTHON: of an environment with a CUDA build of torch. Needs gcc, g++, CUDA's headers.
set -euo pipefail
python=$(realpath -s "$1") here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "$2/lib"
dir=$(cd "$2" && pwd)
# the runtime's headers come with torch's packages, crt/ with Triton, nv/target with the CUDA toolkit
include=$("$python" -c "import nvidia.cu13, pathlib; print(pathlib.Path(list(nvidia.cu13.__path__)[0]) / 'include')")
triton=$("$python" -c "import triton, pathlib; print(pathlib.Path(triton.__file__).parent / 'backends/nvidia/include')")
g++ -std=c++17 -O1 -fPIC -shared -w -fvisibility=hidden -I"${CUDA_HOME:-/usr/local/cuda}/include" -I"$triton" \
  -I"$include" "$here/runtime.cpp" -o "$dir/libnull.so" -ldl
gcc -O1 -fPIC -shared -w "$here/nccl.c" -o "$dir/libnullnccl.so"
gcc -O1 -fPIC -shared -w -Wl,-soname,libcuda.so.1 "$here/driver.c" -o "$dir/lib/libcuda.so.1"
cat > "$dir/python" <<END
#!/usr/bin/env bash
export NULL_GPU_LIB='$dir/libnull.so' LD_PRELOAD='$dir/libnull.so $dir/libnullnccl.so' LD_LIBRARY_PATH='$dir/lib'
export CUDA_MODULE_LOADING=LAZY
exec '$python' "\$@"
END
chmod +x "$dir/python"
