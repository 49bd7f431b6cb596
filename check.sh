#!/usr/bin/env bash
# Everything that has to hold before a change is taken: format, lints, documentation, every test.
# Installs what the tests need and the machine lacks.
set -euo pipefail
cd "$(dirname "$0")"

if ! command -v cargo >/dev/null; then
  echo "check.sh: cargo is missing; install Rust (the version is in Cargo.toml: rust-version)" >&2
  exit 1
fi
# Installs packages by apt where there is apt; says what is missing where there is none.
install() {
  local what=$1 packages=("${@:2}") sudo=()
  if ! command -v apt-get >/dev/null; then
    echo "check.sh: $what is missing; install it (Debian and Ubuntu call it ${packages[*]})" >&2
    exit 1
  fi
  echo "installing $what"
  [ "$(id -u)" = 0 ] || sudo=(sudo)
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${packages[@]}"
}

# The tokenizer's dependencies are linked with the one, and CUDA kernels run on the CPU by the other.
for compiler in cc c++; do
  command -v $compiler >/dev/null || install "a C and C++ compiler" g++ libc6-dev
done
command -v shellcheck >/dev/null || install "shellcheck" shellcheck

# The wgpu backend is tested on whatever adapters there are, at least on a software one: tests fail where there is none.
# macOS has Metal.
has_library() { PATH=$PATH:/sbin ldconfig -p | grep -F "$1"; }
has_vulkan() {
  compgen -G '/usr/share/vulkan/icd.d/*.json' || compgen -G '/etc/vulkan/icd.d/*.json' || return 1
  has_library libvulkan.so.1
}
has_opengl() {
  compgen -G '/usr/share/glvnd/egl_vendor.d/*.json' || compgen -G '/etc/glvnd/egl_vendor.d/*.json' || return 1
  has_library libEGL.so.1
}
if [ "$(uname)" = Linux ]; then
  has_vulkan >/dev/null || install "a Vulkan driver (Mesa's software driver, lavapipe)" mesa-vulkan-drivers libvulkan1
  has_opengl >/dev/null || install "an OpenGL driver (Mesa's)" libegl1 libegl-mesa0 libgl1-mesa-dri
fi

# What is installed from PyPI: clients that others wrote, NVRTC and a disassembler, which the CUDA kernels are compiled and
# looked at with.
venv=$PWD/target/venv
if [ ! -x "$venv/bin/python" ] && ! python3 -m venv "$venv" 2>/dev/null; then
  install "Python's venv" python3-venv
  python3 -m venv "$venv"
fi
"$venv/bin/pip" install --quiet --disable-pip-version-check -r tests/requirements.txt
nvidia=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13
# A browser for the chat page.
command -v chromium >/dev/null || install "Chromium" chromium

run() { echo "== $*"; "$@"; }
run shellcheck check.sh .ci/run tools/*.sh
run cargo fmt --all --check
run cargo clippy --workspace --all-targets --locked -- -D warnings
RUSTDOCFLAGS="-D warnings" run cargo doc --workspace --no-deps --locked
run cargo test --workspace --locked
QUAVER_NVRTC=$nvidia/lib PATH=$nvidia/bin:$PATH \
  run cargo test --test kernels --locked -- --ignored --nocapture
HF_HUB_OFFLINE=1 run "$venv/bin/python" tests/clients/check.py target/debug/quaver
