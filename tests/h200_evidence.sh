#!/usr/bin/env bash
# Plain, Block, Full and mHC of about 30 M parameters (configs/gpu.py) on one H200 or H100: the pages of
# docs/results/evidence, from as many seeds as LIMIT seconds allow (default 540), one seed of all four after the other.
#
#   bash tests/h200_evidence.sh
#
# To bring along, 37 MiB, made on any machine with Debian 12's packages and PyPI:
#   launch/technical_corpus.sh texts/technical
#   python -m attnres_jax data prepare --text=texts/technical --glob='**/*.txt' --glob='**/*.rst' \
#       --tokenizer=bpe --out=corpora/technical
#   python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#       --platform manylinux_2_27_x86_64 --platform manylinux2014_x86_64 -d .whl grain array-record ml-collections \
#       tensorboardX portpicker     (what the GPU's machine lacks; the versions of requirements/gpu.txt)
#
# $OUT (default runs/gpu-out) gets evidence.tgz: pages, figures, and of each run all but its checkpoints, so that
# the pages can be made again, and drawn otherwise, where it is unpacked, by the same sweep; log.txt; environment.txt.
# Stopped by time a run saves: the same command goes on. The exit code is that of the last sweep: 0 where all seeds that
# were begun are finished, 124 where time stopped one or left none to begin with (137: it did not end then), else its error's;
# 2 also for what is missing here. KEYS are more overrides of the config, RUNS the runs' folder,
# FIRST the seeds to begin with (default 1: then one more at a time), SEEDS the most, JOBS the runs at once: they share
# the GPU, so speeds on the pages are of that many that share it.
set -u
cd "$(dirname "$0")/.." || exit
LIMIT=${LIMIT:-540} FIRST=${FIRST:-1} SEEDS=${SEEDS:-8} JOBS=${JOBS:-4} RUNS=${RUNS:-runs/gpu}
PYTHON=${PYTHON:-python3}
read -ra KEYS <<< "${KEYS:-}"
[ -n "${CORPUS:=corpora/technical}" ] && [ -f "$CORPUS/meta.json" ] ||
  { echo "error: there is no $CORPUS; the head of tests/h200_evidence.sh says how it is made" >&2; exit 2; }
OUT=$(mkdir -p "${OUT:-runs/gpu-out}" && realpath "${OUT:-runs/gpu-out}")
mkdir -p "$RUNS"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(realpath "$RUNS")/compiled}
export PATH=$PATH:/usr/local/cuda/bin  # ptxas, where no wheel brings it

if [ -d .whl ]; then
  SITE=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" .whl/*.whl || exit 2
  export PYTHONPATH=$PYTHONPATH:$SITE
fi
{ nvidia-smi; "$PYTHON" -m pip list; git rev-parse HEAD; } > "$OUT/environment.txt" 2>&1

pack() {  # whole or not at all: the machine may be taken away at any time
  (cd "$RUNS" && find . \( -name checkpoints -o -name tensorboard -o -name compiled \) -prune -o -type f -print0) |
    tar -czf "$OUT/.evidence.tgz" -C "$RUNS" --null -T - && mv "$OUT/.evidence.tgz" "$OUT/evidence.tgz"
}

took=0 code=124
for ((seeds = FIRST; seeds <= SEEDS; seeds++)); do
  begun=$SECONDS left=$((LIMIT - SECONDS))
  # Half again as long as the one before, a guess: seed 0 also compiled the runs' programs, but from seed 1 on there
  # are pages, for which more is compiled, and all runs so far are looked at again.
  [ "$left" -gt $((took * 3 / 2)) ] || { echo "no time for seed $((seeds - 1))"; break; }
  echo "== $seeds seeds, $left s left" | tee -a "$OUT/log.txt"
  timeout -k 25 "$left" "$PYTHON" -m attnres_jax sweep table4 --config=gpu --rows=baseline,block-s4,full,mhc \
    --seeds="$seeds" --jobs="$JOBS" --out="$RUNS" "--config.data.corpus=$CORPUS" "${KEYS[@]}" 2>&1 |
    tee -a "$OUT/log.txt" | tail -n 40
  code=${PIPESTATUS[0]} took=$((SECONDS - begun))
  pack
  echo "== $seeds seeds: exit $code, $took s" | tee -a "$OUT/log.txt"
  [ "$code" = 0 ] && [ "$SECONDS" -lt "$LIMIT" ] || break
done
[ "$seeds" -gt "$FIRST" ] || tail -n 5 "$RUNS"/*/log.txt  # why not even one seed came to its end
exit "$code"
