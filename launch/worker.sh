#!/usr/bin/env bash
# What every host runs, whatever started it: env.sh, then the train command; or eval or sample, if it is the
# first word.
#   launch/worker.sh --config=lm:d12,block8 --workdir=/mnt/attnres/d12
#   launch/worker.sh eval --workdir=/mnt/attnres/d12
# Exits 0 when the run is at its end, 75 when it was stopped before: then start it again.
# exec: signals reach Python, once. PID_FILE gets its process id; PYTHON is another interpreter.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
WORKDIR=$(workdir "$@")
source launch/env.sh
if [[ -n ${PID_FILE:-} ]]; then echo $$ > "$PID_FILE"; fi
case ${1:-} in eval | sample) ;; *) set -- train --requeue "$@" ;; esac
run exec "${PYTHON:-.venv/bin/python}" -m attnres_jax "$@"
