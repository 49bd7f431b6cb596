#!/usr/bin/env bash
# Parity and speed of every device of a machine, from a prebuilt binary: no toolchain, no network, nothing installed.
#   gpu-check.sh OUT [QUAVER]     OUT: a folder for the results; QUAVER: the binary, else the one beside this or on the path
# OUT then holds report.md (to be attached to a bug report), parity-*.json, bench.csv and devices.json. GPUs are also timed
# with 1B-shaped models of random weights, in FP8 and in bf16, which lie in OUT meanwhile (4 GB). Ends within
# GPU_CHECK_SECONDS, 600 unless set; what did not fit is named in the report. Fails where parity does.
# Without NVRTC, CUDA kernels come from the folder that QUAVER_CACHE names (`quaver kernels build`).
set -euo pipefail

out=${1:?usage: gpu-check.sh OUT [QUAVER]}
here=$(cd "$(dirname "$0")" && pwd)
quaver=${2:-$([ -x "$here/quaver" ] && echo "$here/quaver" || command -v quaver || true)}
if [ ! -x "$quaver" ]; then
  echo "gpu-check.sh: there is no quaver beside this script or on the path; give the binary as the second argument" >&2
  exit 2
fi
mkdir -p "$out"
report=$out/report.md
end=$(($(date +%s) + ${GPU_CHECK_SECONDS:-600}))
# Mesa keeps compiled shaders there, and complains where it cannot.
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-${TMPDIR:-/tmp}} HF_HUB_OFFLINE=1
failed=0

# Runs a command for at most a share of the time that is left; 124 where that ran out.
within() {
  local share=$1 left
  shift
  left=$(((end - $(date +%s)) / share))
  [ "$left" -ge 5 ] || return 124
  timeout --kill-after=5 "$left" "$@"
}

# A line for the report about a command that failed.
explain() {
  local code=$1 what=$2 log=$3
  if [ "$code" = 124 ] || [ "$code" = 137 ]; then
    echo "- **$what**: not finished in the time there was"
  else
    echo "- **$what**: $(tail -n 1 "$log")"
  fi >>"$report"
}

"$quaver" devices --json >"$out/devices.json"
{
  echo "# $("$quaver" --version) on $(uname -srm)"
  echo
  echo '```'
  "$quaver" devices
  echo '```'
  echo
} >"$report"

# Backend and number of each device, the reference aside; a bare machine has no jq.
devices=$(tr -d ' ",' <"$out/devices.json" |
  awk -F: '$1 == "backend" { backend = $2 } $1 == "device" && backend != "reference" { print backend, $2 }')
# GPUs come before the processor, software adapters behind it.
gpus=$(awk '$1 == "cpu" { exit } { print }' <<<"$devices")
left=$(($(wc -l <<<"$devices") * 2 + $(grep -c . <<<"$gpus" || true) * 4))

# Speed of a device with a model, or with the demo where none is given.
bench() {
  local name=$1 title=$2 code=0
  shift 2
  echo "== $name: bench $title"
  within "$left" "$quaver" bench "$@" --csv "$out/bench.csv" >"$out/bench.txt" 2>"$out/bench-$name.log" || code=$?
  left=$((left - 1))
  {
    echo
    echo "## Speed of $name, $title"
    echo
    echo '```'
    cat "$out/bench.txt"
    echo '```'
    echo
  } >>"$report"
  rm "$out/bench.txt"
  # Speed is no claim: what cannot be measured is told, and fails nothing.
  [ "$code" = 0 ] || explain "$code" "bench on $name, $title" "$out/bench-$name.log"
}

while read -r backend device; do
  name=$backend-$device
  echo "== $name: parity"
  code=0
  within "$left" "$quaver" parity --backend "$backend" --device "$device" --json --markdown "$out/parity-$name.md" \
    >"$out/parity-$name.json" 2>"$out/parity-$name.log" || code=$?
  left=$((left - 1))
  if [ -s "$out/parity-$name.md" ]; then
    # The summary's own heading names the version once more.
    sed '1d' "$out/parity-$name.md" >>"$report"
  fi
  if [ "$code" != 0 ]; then
    failed=1
    explain "$code" "parity on $name" "$out/parity-$name.log"
  fi

  bench "$name" "the demo model" --backend "$backend" --device "$device" --batch 1,16 --prompt-tokens 128 --gen-tokens 32
done <<<"$devices"

if [ -n "$gpus" ]; then
  for scheme in fp8-channel bf16; do
    model=$out/1b-$scheme
    rm -rf "$model"
    code=0
    within "$left" "$quaver" synth "$model" --scheme "$scheme" >/dev/null 2>"$out/synth.log" || code=$?
    if [ "$code" != 0 ]; then
      explain "$code" "a 1B model in $scheme" "$out/synth.log"
      rm -rf "$model"
      continue
    fi
    while read -r backend device; do
      own=(--model "$model" --backend "$backend" --device "$device")
      bench "$backend-$device" "1B $scheme, decode" "${own[@]}" --batch 1,8,64,256 --prompt-tokens 128 --gen-tokens 64
      bench "$backend-$device" "1B $scheme, prefill" "${own[@]}" --batch 1 --prompt-tokens 128,2048,8192 --gen-tokens 8 \
        --max-num-batched-tokens 8192
    done <<<"$gpus"
    rm -r "$model"
  done
fi

echo "$report"
exit "$failed"
