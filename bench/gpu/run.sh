#!/usr/bin/env bash
# On a machine with a GPU and torch, in the repository's root: tests, times, profiles, sanitizes and trains, in one call of limited time.
#
#     OUT=RESULTS bash bench/gpu/run.sh [FOLDER]
#
# FOLDER is what prepare.sh made; without one, or if its wheel does not load, the core is built here. RESULTS gets all.log and rows.jsonl. What matters
# most comes first: a step that fails or hangs does not end the run, one that has no time left is skipped. $LIMIT is the time for all, in seconds (560).
# The exit status is the number of steps that failed, or 1 if there is no core to test.
set -uo pipefail
root=$PWD folder=$(cd "${1:-/nonexistent}" 2>/dev/null && pwd)
limit=${LIMIT:-560}
mkdir -p "$OUT"
out=$(cd "$OUT" && pwd)
log=$out/all.log
: >"$log"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0

step() {  # step SECONDS LINES NAME COMMAND...: at most so long, so many last lines shown
  local most=$1 lines=$2 name=$3 start=$SECONDS
  shift 3
  if [ $((limit - SECONDS)) -lt "$most" ]; then most=$((limit - SECONDS)); fi
  if [ "$most" -lt 15 ]; then echo "== $name: no time left"; return 1; fi
  echo "== $name" >>"$log"
  timeout --kill-after=5 "$most" "$@" >"$work/step.log" 2>&1
  local status=$?
  cat "$work/step.log" >>"$log"
  echo "== $name: status $status, $((SECONDS - start)) s, at $SECONDS s"
  tail --lines="$lines" "$work/step.log"
  [ $status -eq 0 ] || failed=$((failed + 1))
  return $status
}

# Warnings of other versions than the tests know are shown, not errors. Nothing is downloaded.
export PYTHONUNBUFFERED=1 PYTEST_ADDOPTS="-W default" HF_HUB_OFFLINE=1
site=$work/site
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
for tool in nvcc ncu compute-sanitizer; do command -v $tool || echo "no $tool"; done
# In the root `ngame` would be the source tree, which has no compiled part: it is never on the path.
cd "$work"
ours=(env "PYTHONPATH=$site:$root/bench${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 python3)
loads='import ngame._cuda as m; print(m.devices(), m.architectures); assert m.devices()[0]'
carried() {
  python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$folder"/ngame-*.whl && "${ours[@]}" -c "$loads"
}
built() {
  rm -rf "$site"
  python3 -m pip install --quiet --no-deps --no-build-isolation --target "$site" "-Cbuild-dir=$work/build" \
    -Ccmake.define.NGAME_CUDA=ON "-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=${ARCHITECTURE:-90}" "$root" && "${ours[@]}" -c "$loads"
}
# In processes of their own, as every step: they can be ended.
export -f carried built
export site folder work root loads
declare -p ours >"$work/ours"
if [ -z "$folder" ] || ! step 60 3 "the carried wheel" bash -c "source '$work/ours'; carried"; then
  step 240 3 "a build of its own" bash -c "source '$work/ours'; built" || exit 1
fi

tests=("${ours[@]}" -m pytest -q -p no:cacheprovider -m gpu --rootdir "$root" -c "$root/pyproject.toml")
cores=("${tests[@]}" "$root/tests/test_cuda.py")
step 150 12 tests "${tests[@]}" "$root/tests/test_cuda.py" "$root"/tests/encoders/test_{encode,graphs}.py "$root/tests/training/test_waits.py" --durations=5
if [ -d "$folder/data" ] && [ -d "$folder/model" ]; then
  step 120 250 profile "${ours[@]}" -m gpu.training "$folder/data" "$folder/model"
fi
step 130 14 timings "${ours[@]}" -m gpu -o "$out/rows.jsonl"
step 60 60 kernels "${ours[@]}" -m gpu.kernels
if [ -d "$folder/data" ] && [ -d "$folder/model" ]; then
  step 90 12 training "${ours[@]}" -m ngame.cli train "$folder/data" -o "$work/run" --set device=cuda \
    --set encoder.kind=transformer --set "encoder.model=$folder/model" --set encoder.graphs=true \
    --set encoder_stage.batch_size=1024 --set encoder_stage.epochs=2 --set classifier_stage.epochs=1
  [ -f "$work/run/log.jsonl" ] && tee --append "$log" <"$work/run/log.jsonl"
fi
# Without PyTorch's cache each tensor is its own allocation, so its bounds are checked.
sanitized=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1)
small="not many and not equal_rows"
if command -v compute-sanitizer >/dev/null; then
  step 100 4 memcheck "${sanitized[@]}" compute-sanitizer --error-exitcode 9 --tool memcheck --report-api-errors no "${cores[@]}" -x -k "$small"
fi
if command -v ncu >/dev/null; then
  for kernel in collect learn; do
    step 35 0 "ncu $kernel" ncu --clock-control none --set detailed -k "regex:$kernel" --launch-skip "$([ $kernel = collect ] && echo 12 || echo 0)" \
      -c 1 "${ours[@]}" -m gpu.kernels --small
    grep -E "Duration|Throughput|Hit Rate|Achieved Occ|Registers Per" "$work/step.log"
  done
fi
if command -v compute-sanitizer >/dev/null; then
  # A test takes over a second there: a few that reach each kernel. No word of -k may be a part of
  # `filterwarnings`, a mark of every test.
  step 60 4 racecheck "${sanitized[@]}" compute-sanitizer --error-exitcode 9 --tool racecheck "${cores[@]}" -x \
    -k "$small and (filter_loses or share_a_block or from_samples or extreme)"
  step 60 4 synccheck "${sanitized[@]}" compute-sanitizer --error-exitcode 9 --tool synccheck "${cores[@]}" -x \
    -k "$small and (filter_loses or share_a_block or as_tight or metrics)"
fi
exit $failed
