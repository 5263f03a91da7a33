#!/usr/bin/env bash
# Run a command in N processes on this machine, joined over gloo as the hosts of a cluster are:
#   launch/local_cluster.sh 2 -- python -m attnres_jax train --config=quick:block --workdir=runs/two
# Each process is one CPU device (DEVICES=4 gives it four). Output of process 1 and up starts with "[1] ".
# SIGTERM and SIGINT go to all; exits with the first code that is not 0, after all have ended.
set -euo pipefail
if [[ $# -lt 3 || ! $1 =~ ^[1-9][0-9]*$ || $2 != -- ]]; then
  echo "usage: $0 N -- command ...   (N processes, such as 2)" >&2
  exit 2
fi
count=$1
shift 2
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=${DEVICES:-1}
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$count
pids=()
for ((id = 0; id < count; id++)); do
  if ((id == 0)); then
    JAX_PROCESS_ID=0 "$@" &
  else
    JAX_PROCESS_ID=$id "$@" > >(sed -u "s/^/[$id] /") 2> >(sed -u "s/^/[$id] /" >&2) &
  fi
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
code=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done  # a trapped signal ends a wait early
  wait "$pid" && ended=0 || ended=$?
  ((code == 0)) && code=$ended
done
exit "$code"
