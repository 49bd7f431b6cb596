#!/usr/bin/env bash
# Parity and speed of a machine's GPUs, from a prebuilt binary: no toolchain, no network, nothing installed.
#   gpu-check.sh OUT [QUAVER]     OUT: a folder for the results; QUAVER: the binary, else the one beside this or on the path
# OUT then holds report.md (to be attached to a bug report), bench.csv with every figure and its share of the floor,
# parity-*.json, devices.json, and a log of each part. What matters most comes first: whether all GPUs compute what they
# should, then for each, NVIDIA cards before others, 1B-shaped models of random weights in FP8 and in bf16 (4 GB in OUT
# meanwhile) and its matrix products, beside cuBLASLt's where Python has torch; the processor last. Ends within
# GPU_CHECK_SECONDS, 600 unless set; each part has its own limit too, and is written down when it ends, so that one that
# does not end costs no other. Fails where parity does.
# Without NVRTC, CUDA kernels come from the folder that QUAVER_CACHE names (`quaver kernels build`).
# GPU_CHECK_DEVICES="cpu 0" takes these for GPUs, a line each, in place of those that are there; GPU_CHECK_SHAPE names
# another shape than llama-3.2-1b for `quaver synth`.
set -euo pipefail

out=${1:?usage: gpu-check.sh OUT [QUAVER]}
here=$(cd "$(dirname "$0")" && pwd)
quaver=${2:-$([ -x "$here/quaver" ] && echo "$here/quaver" || command -v quaver || true)}
if [ ! -x "$quaver" ]; then
  echo "gpu-check.sh: there is no quaver beside this script or on the path; give the binary as the second argument" >&2
  exit 2
fi
mkdir -p "$out/parts"
rm -f "$out"/parts/*.md "$out"/bench.csv "$out"/report.md
csv=$out/bench.csv report=$out/report.md
end=$(($(date +%s) + ${GPU_CHECK_SECONDS:-600}))
shape=${GPU_CHECK_SHAPE:-llama-3.2-1b}
# Mesa keeps compiled shaders there, and complains where it cannot.
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-${TMPDIR:-/tmp}} HF_HUB_OFFLINE=1
failed=0

# Puts the report together from what the parts have left so far.
compose() {
  {
    cat "$out/parts/head.md"
    if [ -s "$out/parts/figures.md" ]; then
      printf '\n## Figures\n\n| device | case | figure | value | unit | of floor |\n|---|---|---|---:|---|---:|\n'
      cat "$out/parts/figures.md"
    fi
    for part in parity details; do
      [ ! -s "$out/parts/$part.md" ] || { echo && cat "$out/parts/$part.md"; }
    done
  } >"$report"
}

# Lines of bench.csv.
lines() { if [ -f "$csv" ]; then wc -l <"$csv"; else echo 0; fi; }

# The lines of bench.csv behind the first N as rows of the table. Its last five columns hold no commas.
rows_behind() {
  tail -n "+$(($1 + 1))" "$csv" 2>/dev/null | grep -v '^time,commit' | awk -F, -v device="$2" '{
    share = $NF == "" ? "" : sprintf("%.1f%%", 100 * $NF)
    printf "| %s | %s | %s | %.6g | %s | %s |\n", device, $(NF - 4), $(NF - 3), $(NF - 1), $(NF - 2), share
  }' >>"$out/parts/figures.md" || true
}

# Runs a part for at most so many seconds of those that are left: part SECONDS NAME COMMAND... Its stdout is OUT/NAME.txt, its
# stderr OUT/NAME.log; a failure is told in the report, and is the status.
part() {
  local seconds=$1 name=$2 left code=0
  shift 2
  left=$((end - $(date +%s)))
  [ "$left" -ge "$seconds" ] || seconds=$left
  echo "== $name"
  if [ "$seconds" -lt 1 ]; then
    echo "- **$name**: not begun, the time was over" >>"$out/parts/details.md"
    compose
    return 124
  fi
  timeout --kill-after=5 "$seconds" "$@" >"$out/$name.txt" 2>"$out/$name.log" || code=$?
  if [ "$code" = 124 ] || [ "$code" = 137 ]; then
    echo "- **$name**: not finished within $seconds seconds" >>"$out/parts/details.md"
  elif [ "$code" != 0 ]; then
    echo "- **$name**: $(tail -n 1 "$out/$name.log")" >>"$out/parts/details.md"
  fi
  compose
  return "$code"
}

# A part that adds figures: bench SECONDS NAME DEVICE ARGUMENTS... Speed is no claim: what cannot be measured fails nothing.
bench() {
  local seconds=$1 name=$2 device=$3 before
  shift 3
  before=$(lines)
  part "$seconds" "$name" "$quaver" bench "$@" --csv "$csv" || true
  rows_behind "$before" "$device"
  compose
}

# Parity of a device with one variant of its kernels.
parity() {
  local seconds=$1 backend=$2 device=$3 variant=$4 name code=0
  name=parity-$backend-$device${variant:+-$variant}
  part "$seconds" "$name" "$quaver" parity --backend "$backend" --device "$device" ${variant:+--variant "$variant"} \
    --json --markdown "$out/$name.md" || code=$?
  mv "$out/$name.txt" "$out/$name.json" 2>/dev/null || true
  # The summary's own heading names the version once more.
  [ ! -s "$out/$name.md" ] || sed 1d "$out/$name.md" >>"$out/parts/parity.md"
  [ "$code" = 0 ] || failed=1
  compose
}

"$quaver" devices --json >"$out/devices.json"
{
  echo "# $("$quaver" --version) on $(uname -srm)"
  printf '\n```\n'
  "$quaver" devices
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv 2>/dev/null || true
  echo '```'
} >"$out/parts/head.md"
compose

# Backend and number of each device, the reference aside; a bare machine has no jq.
devices=$(tr -d ' ",' <"$out/devices.json" |
  awk -F: '$1 == "backend" { backend = $2 } $1 == "device" && backend != "reference" { print backend, $2 }')
# GPUs come before the processor, software adapters behind it.
gpus=${GPU_CHECK_DEVICES:-$(awk '$1 == "cpu" { exit } { print }' <<<"$devices")}

# The compute capability of a card, 90 for 9.0.
capability() {
  "$quaver" devices | grep -o '^cuda .*compute capability [0-9.]*' | sed -n "$(($1 + 1))s/.* //p" | tr -d .
}

# The variants of a card's kernels, the best first; an empty line for other devices, whose own are all run at once.
variants() {
  [ "$1" = cuda ] || { echo && return; }
  case $(capability "$2") in
    90) printf 'sm90\nsm89\nsm80\n' ;;
    8[0-8]) echo sm80 ;;
    *) printf 'sm89\nsm80\n' ;;
  esac
}

# The architecture that a card's kernels are compiled for.
architecture() {
  local number
  number=$(capability "$1")
  [ "$number" != 90 ] || number=90a
  echo "sm_$number"
}

while read -r backend device; do
  [ -n "$backend" ] || continue
  if [ "$backend" = cuda ]; then
    # So that no measurement waits for the compiler. Without NVRTC the cache has to have them.
    part 60 "kernels-$device" "$quaver" kernels build --arch "$(architecture "$device")" || true
  fi
  while read -r variant; do
    parity 150 "$backend" "$device" "$variant"
  done < <(variants "$backend" "$device")
done <<<"$gpus"

while read -r backend device; do
  [ -n "$backend" ] || continue
  name=$backend-$device
  for scheme in fp8-channel bf16; do
    model=$out/1b-$scheme
    [ -d "$model" ] || part 60 "synth-$scheme" "$quaver" synth "$model" --shape "$shape" --scheme "$scheme" || continue
    own=(--model "$model" --backend "$backend" --device "$device" --repeat 3)
    for batch in 1 8 64 256; do
      bench 40 "$name-$scheme-decode-$batch" "$name $scheme" "${own[@]}" --batch "$batch" --prompt-tokens 128 --gen-tokens 64
    done
    for tokens in 128 2048 8192; do
      bench 40 "$name-$scheme-prefill-$tokens" "$name $scheme" "${own[@]}" --batch 1 --prompt-tokens "$tokens" --gen-tokens 8 \
        --max-num-batched-tokens 8192
    done
  done
  for dtype in fp8 bf16; do
    before=$(lines)
    bench 40 "$name-gemm-$dtype" "$name" gemm --backend "$backend" --device "$device" --dtype "$dtype"
    if [ "$backend" = cuda ] && python3 -c 'import torch' 2>/dev/null; then
      measured=$(lines)
      part 40 "$name-torch-$dtype" env CUDA_VISIBLE_DEVICES="$device" python3 "$here/gpu-check-torch.py" "$csv" "$before" || true
      rows_behind "$measured" "$name, torch"
      compose
    fi
  done
done <<<"$gpus"

while read -r backend device; do
  [ -n "$backend" ] || continue
  name=$backend-$device
  if [ "$backend" = cuda ] && command -v compute-sanitizer >/dev/null; then
    small=(quantize::fp8_per_token_m17 rms_norm::fp8_per_token_m17 linear::fp8_static_m17_n48_k2048 attend::decode_m3 sample::)
    for tool in memcheck racecheck; do
      part 45 "$name-$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$quaver" parity --backend cuda \
        --device "$device" "${small[@]}" || failed=1
    done
  fi
done <<<"$gpus"
rm -rf "$out"/1b-*

# What is no GPU: the demo model, then parity with the time that is left.
rest=$(grep -vxF "$gpus" <<<"$devices" || true)
while read -r backend device; do
  [ -n "$backend" ] || continue
  bench 30 "$backend-$device-demo" "$backend-$device demo" --backend "$backend" --device "$device" --batch 1,16 \
    --prompt-tokens 128 --gen-tokens 32
done <<<"$rest"
while read -r backend device; do
  [ -n "$backend" ] || continue
  parity 600 "$backend" "$device" ""
done <<<"$rest"

echo "$report"
exit "$failed"
