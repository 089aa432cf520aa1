#!/usr/bin/env bash
# Start a training script in N processes through Accelerate, on GPUs or, with gloo, on the CPU:
#   ./dnd_repo/scripts/launch_multi.sh workspace/main/tasks/math/train_qwen1.5lora_Math.py 4 [options of the script]
# The script's path is relative to the folder you are in, to dnd_repo/ or to dnd_repo/workspace/main/; other paths are
# relative to the folder you are in.
set -euo pipefail
if [ $# -lt 2 ] || ! [[ "$2" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: usage: launch_multi.sh SCRIPT N [options], N a number of processes of at least 1" >&2
    exit 2
fi
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
script="$1" processes="$2"
shift 2
for place in "" "$root/" "$root/workspace/main/"; do
    [ -f "$place$script" ] && script="$place$script" && break
done
[ -f "$script" ] || { echo "error: there is no script $script here or below $root" >&2; exit 2; }
python="${PYTHON:-$([ -x "$root/../.venv/bin/python" ] && echo "$root/../.venv/bin/python" || echo python)}"
export PYTHONPATH="$root/workspace${PYTHONPATH:+:$PYTHONPATH}"
# One process checks bank and settings first: a mistake costs one sentence, not one from each process.
"$python" "$script" --dry-run "$@"
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export ACCELERATE_MIXED_PRECISION=bf16
else
    # As Accelerate does: the processes share the cores.
    export ACCELERATE_USE_CPU=true OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(nproc) + processes - 1) / processes ))}"
fi
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" "$script" "$@"
