#!/usr/bin/env bash
# On a machine with nvcc and no GPU: puts what a short time on a GPU needs into a folder, so that nothing is compiled or fetched there.
#
#     bench/gpu/prepare.sh FOLDER [DATA [MODEL]]
#
# FOLDER gets a wheel with machine code for $ARCHITECTURE (90) for the Python $PYTHON (python3.12); DATA, a data set to train on; MODEL, the
# folder of a transformer, in float16. Take FOLDER and the repository to the machine, and call run.sh there.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=$1 data=${2:-} model=${3:-}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
# Elsewhere than the other builds of the checkout, whose caches are for other settings; git ignores it.
build=$root/build/gpu
"${PYTHON:-python3.12}" -m venv "$build/env"
"$build/env/bin/pip" install --quiet --constraint "$root/constraints.txt" scikit-build-core pybind11 cmake ninja
rm -f "$folder"/*.whl
"$build/env/bin/pip" wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" "-Cbuild-dir=$build/cmake" \
  -Ccmake.define.NGAME_CUDA=ON "-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=${ARCHITECTURE:-90}" "$root"
if [ -n "$data" ]; then
  rm -rf "$folder/data"
  cp -r "$data" "$folder/data"
fi
if [ -n "$model" ]; then
  "$root/.venv/bin/python" - "$model" "$folder/model" <<'END'
import pathlib, shutil, sys

from safetensors.torch import load_file, save_file

source, target = map(pathlib.Path, sys.argv[1:])
target.mkdir(exist_ok=True)
for pattern in ("*.json", "vocab.txt", "merges.txt"):
    for file in source.glob(pattern):
        shutil.copy(file, target)
weights = load_file(source / "model.safetensors")
halves = {name: w.half() if w.is_floating_point() else w for name, w in weights.items()}
save_file(halves, target / "model.safetensors", {"format": "pt"})
END
fi
du -sh "$folder"
