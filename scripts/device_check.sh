#!/usr/bin/env bash
# Checks the pack on a machine with a graphics card, in less than twelve minutes and without a network: runs the tests
# for the card, then the device benchmark.
#
#   scripts/device_check.sh --comfyui DIR_OR_ARCHIVE --out DIR [--wheels DIR] [--minutes N] [--tiny]
#
# --comfyui  a ComfyUI folder, or a .tar, .tar.gz or .tar.xz of one
# --out      folder for the logs, the table (gpu.md) and the numbers (gpu.json)
# --wheels   folder with the wheels of scripts/requirements-device.txt, for a machine that lacks them
# --minutes  time for the benchmark (default 7.5); a shorter time reduces the rounds, not the rows
# --tiny     run everything on the CPU, with tiny networks
#
# $PYTHON is the Python that has PyTorch (default python3). The wheels are installed into a separate folder, without
# their dependencies: a new environment would not see the packages of a Python that is itself in an environment, and
# the machine's PyTorch must not be replaced. Exit code 0: all stages passed; 1: a stage failed, the others still ran.
set -u

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
comfyui='' out='' wheels='' minutes=7.5 tiny=''

usage() {
    sed -n '2,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
        --comfyui) comfyui=${2:?}; shift 2 ;;
        --out) out=${2:?}; shift 2 ;;
        --wheels) wheels=${2:?}; shift 2 ;;
        --minutes) minutes=${2:?}; shift 2 ;;
        --tiny) tiny=--tiny; shift ;;
        *) usage ;;
    esac
done
[ -n "$comfyui" ] && [ -n "$out" ] || usage

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/site"
out=$(cd "$out" && pwd)
failed=0

# stage NAME SECONDS COMMAND...: runs the command with a time limit; its output goes to the screen and to NAME.log.
stage() {
    local name=$1 seconds=$2 began=$SECONDS code
    shift 2
    timeout -k 10 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    code=${PIPESTATUS[0]}
    echo "$name: exit code $code after $((SECONDS - began)) s" | tee -a "$out/summary.txt"
    [ "$code" -eq 0 ] || failed=1
    return "$code"
}

unpack() {
    mkdir "$work/comfyui" && tar -xf "$comfyui" -C "$work/comfyui" || return 1
    [ -f "$work/comfyui/main.py" ] || mv "$work"/comfyui/*/* "$work/comfyui/"
}

: > "$out/summary.txt"
if [ -f "$comfyui" ]; then
    unpack || { echo "$comfyui is not an archive of a ComfyUI" | tee -a "$out/summary.txt"; exit 1; }
    comfyui=$work/comfyui
fi
comfyui=$(cd "$comfyui" 2>/dev/null && pwd) || { echo "--comfyui is not an existing folder" | tee -a "$out/summary.txt"; exit 1; }

ln -s "$root" "$work/site/storyloom"
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export COMFYUI_PATH="$comfyui"
[ -n "$tiny" ] || export STORYLOOM_DEVICE=cuda

if [ -n "$wheels" ]; then
    stage wheels 60 "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile \
        --no-cache-dir --target "$work/site" "$wheels"/*.whl
fi
if command -v nvidia-smi > /dev/null; then
    stage card 20 nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv
fi
stage machine 60 "$python" -c '
import sys
sys.path.insert(0, sys.argv[1])
import torch
print("Python", sys.version.split()[0], "PyTorch", torch.__version__, "card", torch.cuda.is_available())
from comfy.cli_args import args
args.cpu = bool(sys.argv[2])
import comfy.sample, comfy.supported_models, comfy_api.latest, pytest
print("ComfyUI imports")
' "$comfyui" "$tiny"
cd "$root" || exit 1
stage tests 120 "$python" -m pytest -m gpu tests/host/test_on_a_card.py -q -rs -p no:cacheprovider
seconds=$(awk -v minutes="$minutes" 'BEGIN { print int(60 * minutes + 45) }')
stage benchmark "$seconds" "$python" benchmarks/gpu.py --comfyui "$comfyui" --json "$out/gpu.json" --minutes "$minutes" $tiny
cat "$out/summary.txt"
exit "$failed"
