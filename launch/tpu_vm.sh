#!/usr/bin/env bash
# Cloud TPU VMs as a queued resource: one slice, or several that a network joins.
#
#   NAME=d12 ZONE=us-east5-b TYPE=v6e-64 MOUNT=gs://my-bucket \
#     launch/tpu_vm.sh up --config=lm:d12,block8 --workdir=/mnt/attnres/d12
#
#   up WORDS      create, wait, push, setup, start WORDS, logs: a train command's words
#   create        ask for the slice (SPOT=1: may be taken away; RESERVED=1: from a reservation; SLICES=2: two)
#   wait          until it is there
#   push          the committed code, onto every host
#   setup         on every host: Python, MOUNT, the packages of requirements/tpu.txt
#   start WORDS   the train command on every host, in the background; or, of a run: start eval --workdir=...
#   logs          the first host's output until the run ends (HOSTS=all: every host's)
#   code          the run's exit code: 0 at its end, 75 stopped before, "running"
#   stop          the run saves and ends; start goes on from there
#   profile WORDS the traces that profile.first and profile.last made, into runs/profiles/NAME (OUT)
#   state         of the queued resource;  ssh COMMAND: on every host;  delete: the slice, not what it wrote
#
# PROJECT and RUNTIME are gcloud's project and the chip's image if not set. DRY_RUN=1 prints what would run.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
NAME=${NAME:-attnres} SLICES=${SLICES:-1}
need ZONE "the zone that has the chips, such as ZONE=us-east5-b"
WHERE=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --quiet)
TPUS=(gcloud compute tpus queued-resources)

runtime() {
  case $TYPE in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    tpu7x-*) echo v2-alpha-tpu7-ubuntu2404 ;;
    *) fail "TYPE=$TYPE is none of v4-N, v5litepod-N, v5p-N, v6e-N, tpu7x-N: for another chip set RUNTIME too" ;;
  esac
}

create() {
  need TYPE "the accelerator type, such as TYPE=v6e-64"
  local image options=()
  image=${RUNTIME:-$(runtime)}
  if ((SLICES == 1)); then
    options+=(--node-id="$NAME")
  else
    options+=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  if [[ ${SPOT:-0} == 1 ]]; then options+=(--spot); fi
  if [[ ${RESERVED:-0} == 1 ]]; then options+=(--reserved); fi
  run "${TPUS[@]}" create "$NAME" "${options[@]}" --accelerator-type="$TYPE" --runtime-version="$image" \
    "${WHERE[@]}"
}

# Nothing where there is none: describe would fail, as it does where gcloud could not ask.
state() { ask ACTIVE "${TPUS[@]}" list --filter="name~/$NAME\$" --format='value(state.state)' "${WHERE[@]}"; }

wait_until_there() {
  local now
  while now=$(state); [[ $now != ACTIVE ]]; do
    case $now in
      FAILED | SUSPEND*) fail "$NAME is $now: delete it, then create it again" ;;
      '') fail "there is no queued resource $NAME in $ZONE: create it" ;;
    esac
    echo "$NAME is $now" >&2
    sleep "${POLL:-30}"
  done
}

on_all() { run "${TPUS[@]}" ssh "$NAME" --node=all --worker=all --command="$1" "${WHERE[@]}"; }
on_first() { ask "$1" "${TPUS[@]}" ssh "$NAME" --node=0 --worker=0 --command="$2" "${WHERE[@]}"; }

push() {
  local folder=.
  dry || folder=$(mktemp -d)
  run git archive --format=tar.gz --output="$folder/attnres.tar.gz" HEAD
  run "${TPUS[@]}" scp "$folder/attnres.tar.gz" "$NAME:" --node=all --worker=all "${WHERE[@]}"
  dry || rm -r "$folder"
  # What an older commit had is not left over; the environment stays.
  local clear="find attnres -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -r {} +"
  on_all "mkdir -p attnres && $clear && tar -xzf attnres.tar.gz -C attnres"
}

setup() { on_all "MOUNT=$(quoted "${MOUNT:-}") attnres/launch/host.sh setup"; }

start() {
  workdir "$@" > /dev/null
  on_all "attnres/launch/host.sh start $(quoted "$@")"
}

logs() {
  local command="attnres/launch/host.sh logs"
  if [[ ${HOSTS:-first} == all ]]; then on_all "$command"; else on_first "" "$command"; fi
}

code() { on_first 0 "attnres/launch/host.sh code"; }
stop() { on_all "attnres/launch/host.sh stop"; }

profile() {
  local folder out=${OUT:-runs/profiles/$NAME}
  folder=$(workdir "$@")
  run mkdir -p "$out"
  run "${TPUS[@]}" scp --recurse "$NAME:$folder/profile" "$out" --node=0 --worker=0 "${WHERE[@]}"
  echo "now: xprof --logdir=$out/profile"
}

up() {
  workdir "$@" > /dev/null
  create
  wait_until_there
  push
  setup
  start "$@"
  logs
}

case ${1:-} in
  create | push | setup | start | logs | code | stop | profile | state | up) "$@" ;;
  wait) wait_until_there ;;
  ssh) on_all "${*:2}" ;;
  delete) run "${TPUS[@]}" delete "$NAME" --force "${WHERE[@]}" ;;
  *) fail "expected a verb such as up, got '${1:-}': the head of $0 says which there are" ;;
esac
