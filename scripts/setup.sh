#!/usr/bin/env bash
# Create .venv in this clone: SGLang on CPU, this package (editable), and the tools of its tests.
# Idempotent: returns at once when nothing that it depends on has changed. Writes to .venv only.
#
#   PYTHON=/path/to/python3.x scripts/setup.sh    uses that interpreter (3.11 or newer)
#   scripts/setup.sh 0.5.18 0.5.20                and these SGLang releases (requirements/releases) beside it
set -euo pipefail

readonly TORCH_VERSION=2.13.0
readonly RELEASES_OF_THE_SUITE=(0.5.15 0.5.23)   # beside .venv's SGLang: PYTHONPATH=.venv/releases/RELEASE
readonly CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT
cd "$ROOT"
readonly VENV=.venv
readonly VENV_PYTHON=$VENV/bin/python
readonly STAMP=$VENV/setup.stamp
readonly CONSTRAINTS=$VENV/torch-constraint.txt
LOG=/dev/null

main() {
  local release
  take_turn
  check_inputs "$@"
  if ! [[ -f $STAMP && $(cat "$STAMP") == "$(fingerprint)" ]] || ! runs "$VENV_PYTHON"; then
    set_up
  fi
  LOG=$VENV/setup.log
  for release in "${RELEASES_OF_THE_SUITE[@]}" "$@"; do
    has_release "$release" || step "SGLang $release, beside it" install_release "$release"
  done
}

set_up() {
  local python started=$SECONDS
  python=$(find_python)
  note_missing_compiler
  mkdir -p "$VENV"
  LOG=$VENV/setup.log
  : >"$LOG"
  echo "Setting up $ROOT/$VENV with $python; details in $VENV/setup.log"
  step "virtual environment" make_venv "$python"
  step "torch $TORCH_VERSION, CPU build" install_torch
  step "what SGLang needs on CPU" pip_install -r requirements/cpu.txt
  step "test and development tools" pip_install -r requirements/dev.txt
  step "SGLang, torchvision, compressed-tensors" pip_install --no-deps -r requirements/nodeps.txt
  optional_step "torch_npu, beside it" install_torch_npu \
    "The tests on the simulated Ascend will be skipped (rm $STAMP to try again)."
  optional_step "Mooncake's transfer engine, beside it" install_mooncake \
    "The tests that move a KV cache between servers will be skipped (rm $STAMP to try again)."
  step "this package, editable" pip_install --no-deps --no-build-isolation -e .
  step "CPU compatibility layer" activate_cpu_compat
  step "check" check_result
  fingerprint >"$STAMP"
  echo "Ready after $((SECONDS - started)) s."
}

fail() {
  echo "setup: $*" >&2
  exit 1
}

# Two set-ups of one clone at once (make test beside make serve): the second waits for the first.
take_turn() {
  exec 9<"$ROOT/scripts/setup.sh"
  if ! flock --nonblock 9; then
    echo "setup: waiting for another set-up of this clone to finish"
    flock --timeout 1800 9 || fail "another set-up of $ROOT has not finished in 30 minutes"
  fi
}

# check_inputs RELEASE...
check_inputs() {
  local file
  for file in "${@/#/requirements/releases/}"; do
    [[ -e $file.txt ]] || fail "$ROOT/$file.txt is missing: it says what to install for that release"
  done
  for file in pyproject.toml README.md requirements/{cpu,nodeps,dev,ascend_sim,mooncake}.txt scripts/cpu_compat; do
    [[ -e $file ]] || fail "$ROOT/$file is missing, this clone is not complete"
  done
}

# The path is part of it: a venv does not survive being moved.
fingerprint() {
  {
    echo "$ROOT"
    cat requirements/*.txt scripts/setup.sh scripts/cpu_compat/*.py pyproject.toml
  } | sha256sum
}

runs() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  if [[ -n ${PYTHON:-} ]]; then
    runs "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.11 or newer"
    echo "$PYTHON"
    return
  fi
  local name
  for name in python3.11 python3.12 python3.13 python3; do
    if runs "$name"; then
      command -v "$name"
      return
    fi
  done
  fail "no Python 3.11 or newer found, install one (Debian, Ubuntu: apt-get install python3 python3-venv) or name it with PYTHON="
}

# scripts/serve.py and the tests switch torch.compile off. An SGLang started by hand on CPU does not,
# and its warm-up then compiles C++ that includes Python.h.
note_missing_compiler() {
  local header
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  if ! command -v "${CXX:-g++}" >/dev/null || [[ ! -e $header ]]; then
    echo "Note: no C++ compiler or no $header; make does not need them, but an SGLang that you" \
      "start yourself then wants TORCH_COMPILE_DISABLE=1."
  fi
}

# step TITLE COMMAND...: run COMMAND with its output in the log, print TITLE and its duration.
step() {
  local title=$1 started=$SECONDS logged
  shift
  logged=$(wc -l <"$LOG")
  printf '  %-42s' "$title"
  if ! "$@" >>"$LOG" 2>&1; then
    printf 'failed after %s s\n' $((SECONDS - started))
    tail -n +$((logged + 1)) "$LOG" | tail -n 20 >&2
    fail "the step \"$title\" failed, the end of $ROOT/$LOG is above"
  fi
  printf '%4s s\n' $((SECONDS - started))
}

# optional_step TITLE COMMAND CONSEQUENCE: as step, but a failure only prints what follows from it.
optional_step() {
  local title=$1 command=$2 consequence=$3 started=$SECONDS
  printf '  %-42s' "$title"
  if "$command" >>"$LOG" 2>&1; then
    printf '%4s s\n' $((SECONDS - started))
  else
    printf 'failed after %s s (see %s). %s\n' $((SECONDS - started)) "$LOG" "$consequence"
  fi
}

# The steps below run as a condition of step(), where bash ignores `set -e`: each one chains its
# commands with && or returns early.

pip_install() {
  "$VENV_PYTHON" -m pip install --no-input --disable-pip-version-check --progress-bar off \
    --constraint "$CONSTRAINTS" "$@"
}

# A venv that works is kept (pip then only adds what is missing); any other is made anew.
make_venv() {
  rm -f -- "$STAMP"
  echo "torch==$TORCH_VERSION+cpu" >"$CONSTRAINTS"
  if runs "$VENV_PYTHON" && "$VENV_PYTHON" -m pip --version; then
    return
  fi
  rm -rf -- "${VENV:?}"/{bin,lib,lib64,include,releases,ascend_sim}
  if "$1" -c 'import ensurepip'; then
    "$1" -m venv "$VENV"
    return
  fi
  "$1" -m venv --without-pip "$VENV" && bootstrap_pip
}

# Debian and Ubuntu keep ensurepip in a package of its own (python3-venv). Without it, and without
# the right to install it, pip can still be run from the wheel in another of their packages.
bootstrap_pip() {
  local folder=$VENV/pip-bootstrap
  mkdir -p "$folder" &&
    (cd "$folder" && apt-get download python3-pip-whl && dpkg-deb --extract ./*.deb .) &&
    PYTHONPATH=$(echo "$folder"/usr/share/python-wheels/pip-*.whl) \
      "$VENV_PYTHON" -m pip install --disable-pip-version-check pip &&
    rm -rf -- "$folder" && return
  echo "This Python has no ensurepip, install it (Debian, Ubuntu: apt-get install python3-venv)."
  return 1
}

# The local version +cpu keeps pip from choosing the CUDA build that the package index serves.
install_torch() {
  pip_install "torch==$TORCH_VERSION+cpu" && return
  echo "The configured package indexes have no CPU build of torch: trying PyTorch's own."
  pip_install --extra-index-url "$CPU_TORCH_INDEX" "torch==$TORCH_VERSION+cpu"
}

has_release() {
  cmp --quiet "requirements/releases/$1.txt" "$VENV/releases/$1/requirements.txt"
}

# Into a folder of its own; renamed last, so that a half-finished download is not taken for one.
install_release() {
  local target=$VENV/releases/$1
  rm -rf -- "$target" "$target.part"
  pip_install --no-deps --target "$target.part" -r "requirements/releases/$1.txt" &&
    check_release "$1" "$target.part" &&
    cp "requirements/releases/$1.txt" "$target.part/requirements.txt" &&
    mv -- "$target.part" "$target"
}

check_release() {
  [[ $(PYTHONPATH=$2 "$VENV_PYTHON" -c 'import sglang; print(sglang.__version__)') == "$1" ]] ||
    { echo "SGLang $1 cannot be imported from $2"; return 1; }
}

# The wheel that Ascend machines use, for the simulated Ascend (tests/ascend_sim). Not in site-packages:
# torch loads it by itself where it finds it, and then wants an Ascend machine.
install_torch_npu() {
  local target=$VENV/ascend_sim/site
  cmp --quiet requirements/ascend_sim.txt "$target/requirements.txt" && return
  rm -rf -- "$target" "$target.part"
  mkdir -p "$VENV/ascend_sim" &&
    pip_install --no-deps --target "$target.part" -r requirements/ascend_sim.txt &&
    cp requirements/ascend_sim.txt "$target.part/requirements.txt" &&
    mv -- "$target.part" "$target"
}

# Not in site-packages: SGLang looks for it there for features that no other test uses.
install_mooncake() {
  local target=$VENV/mooncake
  cmp --quiet requirements/mooncake.txt "$target/requirements.txt" && return
  rm -rf -- "$target" "$target.part"
  pip_install --no-deps --target "$target.part/site" -r requirements/mooncake.txt &&
    fetch_missing_libraries "$target.part" &&
    cp requirements/mooncake.txt "$target.part/requirements.txt" &&
    mv -- "$target.part" "$target"
}

# Mooncake's library needs these even where it uses TCP. Unpacked from Debian's packages, so that root is not needed.
fetch_missing_libraries() {
  local folder=$1/debian
  mkdir -p "$1/lib" "$folder"
  if ! ldconfig -p | grep -q libibverbs.so.1; then
    (cd "$folder" && apt-get download libibverbs1 libnl-3-200 libnl-route-3-200 &&
      for package in ./*.deb; do dpkg-deb --extract "$package" . || exit; done) || return
    find "$folder" -name '*.so.*' -exec cp --no-dereference {} "$1/lib/" \;
  fi
  rm -rf -- "$folder"
}

site_packages() {
  "$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

# Compiled ahead: the layer is imported by every Python process of the environment.
activate_cpu_compat() {
  "$VENV_PYTHON" -m compileall -q scripts/cpu_compat &&
    printf '%s\nimport sglang_cpu_compat\n' "$ROOT/scripts/cpu_compat" \
      >"$(site_packages)/sglang_cpu_compat.pth"
}

check_result() {
  local cuda_packages
  cuda_packages=$(find "$(site_packages)" -maxdepth 1 -iname '*.dist-info' -printf '%f\n' |
    grep -iE '^(nvidia|cuda|cupy|flashinfer|sgl.kernel|sglang.kernel)[-_]' || true)
  if [[ -n $cuda_packages ]]; then
    echo "CUDA packages came with the requirements, which this environment must not have:" \
      "${cuda_packages//$'\n'/ }"
    return 1
  fi
  "$VENV_PYTHON" - "$TORCH_VERSION+cpu" <<'PYTHON' || return 1
import sys
import torch, torchvision, sgl_kernel, sglang, sglang_npu_pp
if torch.__version__ != sys.argv[1]:
    sys.exit(f"torch is {torch.__version__}, not {sys.argv[1]}: a requirement replaced it")
print(f"sglang {sglang.__version__}, torch {torch.__version__}")
PYTHON
}

main "$@"
