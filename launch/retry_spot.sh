#!/usr/bin/env bash
# A run on a spot slice, to its end: when the slice is taken away it is made again, and the run goes on from its
# checkpoint. Variables and words are those of tpu_vm.sh; POLL seconds between looks, at most RETRIES slices.
#
#   NAME=d12 ZONE=us-east5-b TYPE=v6e-64 MOUNT=gs://my-bucket \
#     launch/retry_spot.sh --config=lm:d12,block8 --workdir=/mnt/attnres/d12
#
# Exits with the run's code: 0 at its end. A run that fails or is stopped while its slice is there is not started
# again: that is not the slice's fault. The slice stays; launch/tpu_vm.sh delete ends it.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
export SPOT=1
POLL=${POLL:-60} RETRIES=${RETRIES:-100}
workdir "$@" > /dev/null
tpu() { launch/tpu_vm.sh "$@"; }

state() { tpu state || echo UNKNOWN; }

# there: the slice is active, made (again) if it must be
there() {
  local now
  while now=$(state); [[ $now != ACTIVE ]]; do
    case $now in
      FAILED | SUSPENDED) tpu delete ;;
      '') tpu create ;;
      *) sleep "$POLL" ;;
    esac
  done
}

begin() { tpu push && tpu setup && tpu start "$@"; }

# ended: the run's exit code, or "gone" where the slice was taken away or its hosts were started anew
ended() {
  local now
  while now=$(tpu code | tail -n 1 || true); [[ ! $now =~ ^[0-9]+$ ]]; do
    if [[ $now == lost || $(state) != @(ACTIVE|UNKNOWN) ]]; then echo gone; return; fi
    sleep "$POLL"
  done
  if ((now != 0)) && taken; then echo gone; else echo "$now"; fi
}

# taken: whether it was the slice. A host that goes ends the run on the others before the slice says so.
taken() {
  dry || sleep "$POLL"
  [[ $(state) != ACTIVE ]]
}

for ((slice = 1; slice <= RETRIES; slice++)); do
  there
  if begin "$@"; then
    now=$(ended)
  elif taken; then
    now=gone
  else
    fail "the run could not be started: see above"
  fi
  if [[ $now != gone ]]; then
    echo "the run ended with code $now on slice $slice"
    exit "$now"
  fi
  echo "slice $slice was taken away: making another" >&2
done
fail "$RETRIES slices were taken away (RETRIES): the same command goes on"
