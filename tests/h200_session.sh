#!/usr/bin/env bash
# All that there is to run on an H200 (or H100), the most telling first: bash tests/h200_session.sh
# Wants what docs/results/kernels/README.md names; PYTHON is the interpreter that has it (default: python3).
# Ends within LIMIT seconds (default 570), after STAGES (default "check kernels step"). What it finds out lies in
# $OUT (default: runs/h200), five files. A stage that hangs is stopped, and what hung is left out of the next ones.
set -u
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${OUT:-runs/h200}" && realpath "${OUT:-runs/h200}")
export OUT PYTHON=${PYTHON:-python3}
LIMIT=${LIMIT:-570}
STAGES=${STAGES:-check kernels step}
export PYTHONPATH=.:tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
export PATH=$PATH:/usr/local/cuda/bin  # ptxas, where no wheel brings it

stage() {  # name, seconds, command: all it says to log.txt, its end to the terminal
  local name=$1 limit=$2 begun=$SECONDS left=$((LIMIT - SECONDS)) code
  shift 2
  [ "$left" -lt 20 ] && { echo "== $name: no time left"; return 2; }
  [ "$limit" -gt "$left" ] && limit=$left
  echo "== $name" >> "$OUT/log.txt"
  timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$OUT/log.txt" | tail -n 60 | cut -c1-200
  code=${PIPESTATUS[0]}
  echo "== $name: exit $code, $((SECONDS - begun)) s" | tee -a "$OUT/log.txt"
  return "$code"
}

check() {  # fails where a kernel hung or broke the process: it would take others with it below
  local part running=() broken=0
  [[ $STAGES == *check* ]] || return 0
  for part in 1/4 2/4 3/4 4/4; do
    stage "check $1 $part" 150 "$PYTHON" tests/on_gpu.py "$1" 100 "$part" & running+=($!)
  done
  for part in "${running[@]}"; do
    wait "$part" || [ $? -le 1 ] || broken=1  # 1: something is wrong, which gets no speed and a reason
  done
  return $broken
}

{ nvidia-smi; "$PYTHON" -m pip list; git rev-parse HEAD; } > "$OUT/environment.txt" 2>&1
runs=(xla)
for backend in triton gpu; do
  check $backend && runs=("$backend" "${runs[@]}")
done
[[ $STAGES == *kernels* ]] && stage kernels 250 "$PYTHON" -m attnres_jax bench kernels \
  --minutes 3 --rounds 6 --reads 12 --out="$OUT/kernels.jsonl" \
  --arms "${runs[@]}" fla-core fla-core-gluon fast-attnres flash-attn-res liger-kernel
[[ $STAGES == *step* ]] && for width in 2304 4096; do
  keys=(--config.model.width=$width --config.model.blocks=6 --config.model.heads=$((width / 128))
    --config.model.kv_heads=$((width / 128)) --config.model.mlp_width=$((width * 8 / 3 / 256 * 256)) --config.block_size=6
    --config.model.dtype=bfloat16 --config.model.attention=flash --config.data.length=2048 --config.data.batch=8)
  for implementation in "${runs[@]}"; do
    file=$(mktemp)
    stage "step $width $implementation" 90 "$PYTHON" -m attnres_jax bench step --config=quick:block --rounds=4 \
      --arms block --implementation="$implementation" --out="$file" "${keys[@]}"
    tr -d '\n' < "$file" >> "$OUT/step.jsonl" && echo >> "$OUT/step.jsonl"
    rm "$file"
  done
done

exit 0
