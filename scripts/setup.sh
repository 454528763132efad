#!/usr/bin/env bash
# Create .venv in this clone: SGLang on CPU, this package (editable), and the tools of its tests.
# Idempotent: returns at once when nothing that it depends on has changed. Writes to .venv only, and to the cache
# of uv. What lies beside .venv is installed by what needs it (scripts/environment).
#
#   PYTHON=/path/to/python3.x scripts/setup.sh    uses that interpreter (3.11 or newer)
set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT
cd "$ROOT"
readonly VENV=.venv
readonly VENV_PYTHON=$VENV/bin/python
readonly STAMP=$VENV/setup.stamp
readonly LOG=$VENV/setup.log
# What this script needs of the clone, and what makes it run again.
readonly INPUTS=(pyproject.toml requirements/lock/{venv,installer}.txt scripts/setup.sh
  scripts/environment/{install,installer,parts,lock,check}.py scripts/cpu_compat/{sglang_cpu_compat,sgl_kernel}.py)

main() {
  take_turn
  check_inputs
  if ! [[ -f $STAMP && $(cat "$STAMP") == "$(fingerprint)" ]] || ! runs "$VENV_PYTHON" || ! is_editable; then
    set_up
  fi
}

set_up() {
  local python started=$SECONDS
  python=$(find_python)
  note_missing_compiler
  mkdir -p "$VENV"
  : >"$LOG"
  echo "Setting up $ROOT/$VENV with $python; details in $LOG"
  step "virtual environment" make_venv "$python"
  step "SGLang on CPU, tools of tests and checks" "$VENV_PYTHON" -m scripts.environment.install venv
  step "this package, editable" install_this_package
  step "CPU compatibility layer" activate_cpu_compat
  step "check" "$VENV_PYTHON" -m scripts.environment.check
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

check_inputs() {
  local file
  for file in "${INPUTS[@]}" README.md; do
    [[ -e $file ]] || fail "$ROOT/$file is missing, this clone is not complete"
  done
}

# The path is part of it: a venv does not survive being moved.
fingerprint() {
  {
    echo "$ROOT"
    cat "${INPUTS[@]}"
  } | sha256sum
}

runs() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# `pip install .` into .venv puts a copy in the place of the link to this clone.
is_editable() {
  compgen -G "$VENV/lib/python3*/site-packages/__editable__*sglang_npu_pp*" >/dev/null
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

# The steps below run as a condition of step(), where bash ignores `set -e`: each one chains its
# commands with && or returns early.

# A venv that works is kept: the next step makes it what the lock says. Any other is made anew.
make_venv() {
  rm -f -- "$STAMP"
  if runs "$VENV_PYTHON" && "$VENV_PYTHON" -m pip --version; then
    return
  fi
  rm -rf -- "${VENV:?}"/{bin,lib,lib64,include,uv,beside}
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

# With the setuptools of the lock: a build in isolation would fetch another.
install_this_package() {
  "$VENV_PYTHON" -m pip install --no-input --disable-pip-version-check --progress-bar off --quiet \
    --no-deps --no-build-isolation --no-index --editable .
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

main "$@"
