#!/usr/bin/env bash
# Everything that a GPU is asked, in order, in some fifteen minutes: bench/gpu.sh FOLDER
#
# For a source tree on a machine with Python, torch, triton and a C++ compiler, without a network. Each part has a time
# limit, prints a table and writes FOLDER/PART.txt and, line by line, FOLDER/PART.jsonl; one that fails or takes too long
# costs only itself. EAPCORE_PYTHON chooses the interpreter. --quick: small models, on a machine without a GPU to see
# which parts begin. No part begins after EAPCORE_SECONDS;
# EAPCORE_PARTS='check llama' asks for these alone. 'check check-kernels graphs small-1024 llama float32 sanitizer' take
# some six minutes.
#
# The tests of the kernels run on the GPU too, in EAPCORE_WORKERS processes of pytest-xdist.
set -u
out=${1:?usage: bench/gpu.sh FOLDER [--quick]}
quick=${2:-}
top=$(cd "$(dirname "$0")/.." && pwd)
rm -f "$out/parts.jsonl" && mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
export PYTHONPATH="$top" TRITON_CACHE_DIR="$out/triton-cache" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python=${EAPCORE_PYTHON:-python3}
PATH=$PATH:/usr/local/cuda/bin
began=$SECONDS

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 since=$SECONDS status
  shift 2
  [[ -z ${EAPCORE_PARTS:-} || " $EAPCORE_PARTS " == *" $name "* ]] || return 0
  if ((since - began > ${EAPCORE_SECONDS:-900})); then
    printf '{"part": "%s", "status": 124, "seconds": 0}\n' "$name" >>"$out/parts.jsonl"
    return
  fi
  timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1
  status=$?
  printf '\n===== %s (at %s s, %s of at most %s s, status %s)\n%s\n' "$name" $((since - began)) $((SECONDS - since)) \
    "$limit" $status "$(tail -n "${EAPCORE_LINES:-40}" "$out/$name.txt" | cut -c 1-260)"
  printf '{"part": "%s", "status": %s, "seconds": %s}\n' "$name" $status $((SECONDS - since)) >>"$out/parts.jsonl"
}
pipeline() { # NAME SECONDS PART-OF-THE-PIPELINE
  part "$1" "$2" "$python" "$top/bench/bench_pipeline.py" --device cuda $quick --part "$3" --json "$out/$1.jsonl"
}
kernels() { # NAME SECONDS OPTIONS...
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" "$top/bench/bench_kernels.py" --device cuda $quick --json "$out/$name.jsonl" "$@"
}

part machine 20 bash -c 'nvidia-smi; '"$python"' -c "import torch, triton; print(torch.__version__, triton.__version__)"'
# What is checked takes turns on the device; nothing is timed meanwhile.
kernels check-kernels 150 --check-only &
pipeline check 150 check &
part tests 150 "$python" -m pytest -q -p no:cacheprovider -n "${EAPCORE_WORKERS:-6}" --benchmark-disable \
  "$top/tests/kernels" --ignore "$top/tests/kernels/test_triton_compile.py" &
part graphs 60 "$python" -m pytest -q -p no:cacheprovider "$top/tests/execution/test_batches.py" \
  "$top/tests/models/test_load.py" -k "cuda_graphs_give_the_scores or weights_go_to_the_device" &
part compile-tilings 150 "$python" "$top/bench/ops/tilings.py" --once &
pipeline compile 150 warm &
wait
pipeline small-256 60 "GPT-2 small, B=256"
pipeline xl 75 "GPT-2 XL"
part tilings 90 "$python" "$top/bench/ops/tilings.py" --json "$out/tilings.jsonl"
if command -v ncu >/dev/null; then
  part counters 60 ncu --clock-control none --kernel-name partial_scores --section SpeedOfLight \
    --section MemoryWorkloadAnalysis --section WarpStateStats --section Occupancy \
    "$python" "$top/bench/ops/tilings.py" --profile --only XL
fi
pipeline 13b 90 13B
pipeline small-32 45 "GPT-2 small, B=32"
pipeline small-1024 90 "GPT-2 small, B=1024"
pipeline llama 90 Llama-3.1-8B
pipeline float32 45 "GPT-2 small, float32"
pipeline profile 40 "kernels, GPT-2 small"
kernels ops 150 --no-torch-compile --rounds 7 --minutes 2
if command -v compute-sanitizer >/dev/null; then
  # Every tensor in memory of its own, whose ends the sanitizer sees.
  part sanitizer 180 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \
    "$python" "$top/bench/bench_kernels.py" --device cuda --check-only --only bfloat16
else
  printf '\n===== sanitizer: there is no compute-sanitizer here\n'
fi
failed=$(sed -n '/"status": 0,/!s/.*"part": "\([^"]*\)", "status": \([0-9]*\).*/\1 (\2)/p' "$out/parts.jsonl" | paste -sd ' ')
printf '\n===== %s s; %s\n' $((SECONDS - began)) "$([ -z "$failed" ] && echo 'every part ran' || echo "FAILED: $failed")"
[ -z "$failed" ]
