#!/usr/bin/env bash
# As DnD's README calls it: cd dnd_repo/workspace/main; bash launch_multi.sh tasks/math/train_qwen1.5lora_Math.py 4
exec "$(dirname "${BASH_SOURCE[0]}")/../../scripts/launch_multi.sh" "$@"
