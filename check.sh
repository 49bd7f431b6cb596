#!/usr/bin/env bash
# Everything that has to hold before a change is taken: format, lints, documentation, every test.
# Installs what the tests need and the machine lacks.
set -euo pipefail
cd "$(dirname "$0")"

if ! command -v cargo >/dev/null; then
  echo "check.sh: cargo is missing; install Rust (the version is in Cargo.toml: rust-version)" >&2
  exit 1
fi
if ! command -v cc >/dev/null; then
  echo "installing a C compiler, which the tokenizer's dependencies are linked with"
  sudo=$([ "$(id -u)" = 0 ] || echo sudo)
  $sudo apt-get update -qq && $sudo apt-get install -y -qq --no-install-recommends gcc libc6-dev
fi

if ! ls /usr/share/vulkan/icd.d/*.json /etc/vulkan/icd.d/*.json >/dev/null 2>&1; then
  if ! command -v apt-get >/dev/null; then
    echo "check.sh: there is no Vulkan driver; install one, or Mesa's software driver (lavapipe)" >&2
    exit 1
  fi
  echo "installing the software Vulkan driver, which the wgpu backend is tested on"
  sudo=$([ "$(id -u)" = 0 ] || echo sudo)
  $sudo apt-get update -qq && $sudo apt-get install -y -qq --no-install-recommends mesa-vulkan-drivers libvulkan1
fi

run() { echo "== $*"; "$@"; }
run cargo fmt --all --check
run cargo clippy --workspace --all-targets --locked -- -D warnings
RUSTDOCFLAGS="-D warnings" run cargo doc --workspace --no-deps --locked
run cargo test --workspace --locked
