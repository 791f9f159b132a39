#!/usr/bin/env bash
# Set up everything that this checkout needs, in .venv beside it; safe to repeat, immediate when nothing is to do.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: bash tools/setup.sh [--retry] [--no-system]

Installs, in this order: system packages that FFCV and our decoder compile against (through apt, as root or with
password-less sudo; otherwise the line to run is printed), a virtual environment in .venv, the pinned packages of
tools/requirements.txt, and our native decoder. Only the [core] group is needed: any other piece that cannot be
installed is named with its remedy, and what does not need it works.

  --retry      try the pieces again that could not be installed before
  --no-system  leave system packages alone

The Python is the first of $REGATTA_PYTHON, python3, python3.13, python3.12 and python3.11 that is 3.11 or newer.
TEXT
}

retry=no system=yes
for argument in "$@"; do
  case $argument in
    --retry) retry=yes ;;
    --no-system) system=no ;;
    -h | --help) usage; exit 0 ;;
    *) echo "setup.sh: unknown argument '$argument'; known are --retry, --no-system and --help" >&2; exit 2 ;;
  esac
done

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$root"
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/regatta-setup
requirements=$root/tools/requirements.txt

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }

missing=()
lack() { missing+=("$1: $2"); }

# What the last set-up depended on. The compiler and libraries are part of it, so that installing one of them by hand is
# enough for the pieces that had to be left out to be tried again.
fingerprint() {
  {
    cat -- tools/setup.sh "$requirements"
    if [ -d pipeline/native ]; then find pipeline/native pipeline/native_build.py -type f -name '*.*' \
      ! -path '*/build/*' ! -name '*.pyc' -print0 2>/dev/null | LC_ALL=C sort -z | xargs -0 -r cat --; fi
    cat -- "$venv/pyvenv.cfg" 2>/dev/null || true
    uname -m
    command -v g++ || true
    pkg-config --modversion opencv4 libturbojpeg 2>/dev/null || true
  } | sha256sum | cut -d ' ' -f 1
}

# The stamp: the fingerprint, then one line for each piece that is missing.
up_to_date() {
  [ -f "$stamp" ] && [ -x "$python" ] || return 1
  [ "$(head -n 1 -- "$stamp")" = "$(fingerprint)" ] || return 1
  [ "$retry" = no ] || [ "$(wc -l <"$stamp")" -eq 1 ] || return 1
}

tell_missing() {
  [ -f "$stamp" ] || return 0
  tail -n +2 -- "$stamp" | while IFS= read -r line; do say "missing: $line"; done
}

if up_to_date; then tell_missing; exit 0; fi

# Two set-ups at once would write the same files: the second waits, and then finds nothing to do.
exec 9<"$root/tools"
if command -v flock >/dev/null && ! flock --nonblock 9; then
  say "another set-up is at work in this checkout; waiting for it"
  flock 9
fi
if up_to_date; then tell_missing; exit 0; fi
rm -f -- "$stamp"

# --- system packages ---------------------------------------------------------------------------------------------------

as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo -n "$@"; else return 1; fi
}

apt_install() {
  [ "$system" = yes ] && command -v apt-get >/dev/null && as_root true || return 1
  say "apt-get install $*"
  local options=(-y -q -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 --no-install-recommends)
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install "${options[@]}" "$@" >/dev/null 2>&1 9<&- && return 0
  # On a fresh machine the lists of packages are empty, and everything is unknown until they are fetched.
  as_root apt-get update -q >/dev/null 2>&1 9<&- || true
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install "${options[@]}" "$@" >/dev/null 9<&-
}

usable() { "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  if [ -n "${REGATTA_PYTHON:-}" ]; then
    usable "$REGATTA_PYTHON" || fail "REGATTA_PYTHON is '$REGATTA_PYTHON', which is no Python 3.11 or newer; point it at one"
    echo "$REGATTA_PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && usable "$candidate"; then echo "$candidate"; return; fi
  done
  fail "no Python 3.11 or newer was found; install one (apt-get install python3 python3-venv), or name it in REGATTA_PYTHON"
}

base=$(find_python)
version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
headers=$("$base" -c 'import os, sysconfig; print(os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))')

wanted=()
command -v g++ >/dev/null || wanted+=(g++)
command -v pkg-config >/dev/null || wanted+=(pkg-config)
pkg-config --exists opencv4 2>/dev/null || wanted+=(libopencv-dev)
pkg-config --exists libturbojpeg 2>/dev/null || wanted+=(libturbojpeg0-dev)
pkg-config --exists libjpeg 2>/dev/null || wanted+=(libjpeg-dev)
[ "$headers" = True ] || wanted+=("python$version-dev")
if [ ${#wanted[@]} -gt 0 ] && ! apt_install "${wanted[@]}"; then
  lack "system packages (FFCV and our decoder compile against them)" "run 'sudo apt-get install ${wanted[*]}', then 'bash tools/setup.sh --retry'"
fi

# --- virtual environment ------------------------------------------------------------------------------------------------

# `python -m venv` needs ensurepip, which Debian keeps in a package of its own; each later way does without it.
make_venv() {
  "$base" -m venv "$venv" >/dev/null 2>&1 && return 0
  rm -rf -- "$venv"
  if apt_install "python$version-venv" 2>/dev/null && "$base" -m venv "$venv" >/dev/null 2>&1; then return 0; fi
  rm -rf -- "$venv"
  if command -v uv >/dev/null && uv venv --quiet --seed --python "$base" "$venv" 2>/dev/null; then return 0; fi
  local folder made=1
  folder=$(mktemp -d)
  if "$base" -m pip install --quiet --target "$folder" virtualenv >/dev/null 2>&1; then
    PYTHONPATH=$folder "$base" -m virtualenv --quiet "$venv" >/dev/null 2>&1 && made=0
  fi
  rm -rf -- "$folder"
  return "$made"
}

if [ -e "$venv" ] && ! { [ -x "$python" ] && usable "$python" && { "$python" -m pip --version || "$python" -m uv --version; } >/dev/null 2>&1; }; then
  [ -f "$venv/pyvenv.cfg" ] || fail "$venv is in the way and is no virtual environment; move it away and run this again"
  say "the virtual environment in .venv does not work; making it anew"
  rm -rf -- "$venv"
fi
if [ ! -e "$venv" ]; then
  say "virtual environment in .venv (Python $version)"
  make_venv || fail "no virtual environment could be made; run 'sudo apt-get install python$version-venv', then this again"
fi

# --- packages ----------------------------------------------------------------------------------------------------------

scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT
log=$scratch/log

group() {
  awk -v want="[$1]" '/^# \[/ { on = ($2 == want); next } on && NF && !/^#/' "$requirements" >"$scratch/$1.txt"
  printf '%s' "$scratch/$1.txt"
}

# uv takes a package and its partners from one index. pip also looks into folders that a machine may have configured, where
# a torch of another build can hide; so pip is only the way out where uv cannot reach an index.
"$python" -m uv --version >/dev/null 2>&1 || "$python" -m pip install --quiet uv >"$log" 2>&1 || true
install() {
  if "$python" -m uv --version >/dev/null 2>&1; then
    "$python" -m uv pip install --quiet --python "$python" -c "$requirements" "$@" >"$log" 2>&1 9<&- && return 0
  fi
  "$python" -m pip --version >/dev/null 2>&1 && "$python" -m pip install --quiet -c "$requirements" "$@" >>"$log" 2>&1 9<&-
}
reason() { grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr -s ' ' | cut -c 1-200; }

# Every group of the file but [core], which is needed, and FFCV's source, which is built last.
read -r -d '' -a optional < <(awk '/^# \[/ && !/\[(core|ffcv-source)\]/ { gsub(/[][]/, "", $2); print $2 }' "$requirements") || true
all=(-r "$(group core)")
for name in "${optional[@]}"; do all+=(-r "$(group "$name")"); done
say "Python packages (the first time takes minutes)"
if ! install "${all[@]}"; then
  say "not everything could be installed in one go; installing group by group"
  install -r "$(group core)" || fail "the [core] packages of tools/requirements.txt could not be installed: $(reason)"
  for name in "${optional[@]}"; do
    install -r "$(group "$name")" || lack "packages of group [$name]" "$(reason); see tools/requirements.txt, then 'bash tools/setup.sh --retry'"
  done
fi

"$python" - >"$log" 2>&1 <<'CHECK' || fail "torch and torchvision do not fit together ($(reason)); remove .venv, unset PIP_FIND_LINKS and PIP_EXTRA_INDEX_URL, and run this again"
import torch
import torchvision.ops
torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
CHECK

say "FFCV"
if ! "$python" -c 'import ffcv.loader' >/dev/null 2>&1; then
  # Its list of dependencies asks for OpenCV's desktop build, which needs a display's libraries; ours are in group [ffcv].
  if ! { install --no-deps -r "$(group ffcv-source)" && "$python" -c 'import ffcv.loader' >"$log" 2>&1; }; then
    lack "FFCV (--loader ffcv)" "$(reason); it needs g++, pkg-config, OpenCV and libturbojpeg to compile, then 'bash tools/setup.sh --retry'"
  fi
fi

# A card that this PyTorch has no code for would be found by the first kernel only.
if command -v nvidia-smi >/dev/null; then
  cards=$(nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader 2>/dev/null || true)
  "$python" -c 'import sys; from train.cards import problems_of; print(*problems_of(sys.stdin), sep="\n")' <<<"$cards" 2>/dev/null |
    while IFS= read -r line; do [ -z "$line" ] || say "GPU: $line"; done || true
fi

# --- our decoder ---------------------------------------------------------------------------------------------------------

if [ -f pipeline/native_build.py ]; then
  say "native decoder"
  "$python" -m pipeline.native_build >"$log" 2>&1 || lack "native decoder" "$(reason); it needs g++ and libjpeg's headers, then 'bash tools/setup.sh --retry'"
fi

# --- host side of the GPU kernels ----------------------------------------------------------------------------------------

# Half a minute of the compiler. Without it the first run on a GPU compiles in the background, and Python launches.
if command -v nvidia-smi >/dev/null && [ -f models/ops/host_library.py ]; then
  say "host side of the GPU kernels"
  "$python" -c 'from models.ops.host_library import main; main()' >"$log" 2>&1 || lack "host side of the GPU kernels" "$(reason); it needs g++, then 'bash tools/setup.sh --retry'"
fi

# Compiled once here, instead of by the first command that packs or reads photos.
if [ -f pipeline/jpeg.py ]; then
  say "check of JPEG files"
  "$python" - >"$log" 2>&1 <<'WARM' || true
import io
from PIL import Image
from pipeline.jpeg import check_jpeg
photo = io.BytesIO()
Image.new("RGB", (16, 16)).save(photo, "JPEG")
check_jpeg(photo.getvalue())
WARM
fi

{
  fingerprint
  [ ${#missing[@]} -eq 0 ] || printf '%s\n' "${missing[@]}"
} >"$stamp.new"
mv -- "$stamp.new" "$stamp"
tell_missing
say "ready: $python"
