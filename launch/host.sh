#!/usr/bin/env bash
# One host of a slice, as tpu_vm.sh drives it over ssh:
#   launch/host.sh setup          Python 3.12, huge pages, MOUNT at /mnt/attnres, the lock's packages
#   launch/host.sh start WORDS    worker.sh WORDS in the background, its output in ~/attnres.log
#   launch/host.sh logs           that output, until the run ends
#   launch/host.sh code           its exit code; "running" before the end, "lost" where it is gone without one
#   launch/host.sh stop           SIGTERM: the run saves; returns when it has ended
# MOUNT is a bucket (gs://NAME, by gcsfuse) or an NFS share (HOST:/PATH); LOCK the lock (requirements/tpu.txt).
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
export PID_FILE=$HOME/attnres.pid
LOG=$HOME/attnres.log CODE=$HOME/attnres.code
LOCK=${LOCK:-requirements/tpu.txt}

running() { [[ -s $PID_FILE ]] && kill -0 "$(< "$PID_FILE")" 2>/dev/null; }

# apt waits for another apt, as the one that runs when a VM starts
apt() { run sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qq "$@"; }

setup() {
  if dry || ! command -v python3.12 > /dev/null; then
    run sudo add-apt-repository -y ppa:deadsnakes/ppa  # Ubuntu 22.04 has 3.10
  fi
  apt update
  apt install make python3.12-venv
  # Without, libtpu starts and ends slowly; JAX warns of it.
  run sudo sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled'
  if [[ -n ${MOUNT:-} ]] && { dry || ! mountpoint -q /mnt/attnres; }; then attach; fi
  run make ".venv/.ready-$(basename "$LOCK" .txt)" LOCK="$LOCK" PYTHON=python3.12
}

attach() {
  # shellcheck disable=SC2016
  run sudo sh -c 'install -d -o "$SUDO_USER" /mnt/attnres'
  if [[ $MOUNT == gs://* ]]; then
    command -v gcsfuse > /dev/null || dry || fail "gcsfuse is not installed on this host: launch/README.md, Buckets"
    # No caching of names: a host must see at once what another has written.
    run gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=100000 \
      "${MOUNT#gs://}" /mnt/attnres
  else
    apt install nfs-common
    run sudo mount -t nfs -o hard "$MOUNT" /mnt/attnres
  fi
}

start() {
  if running; then fail "a run is going on here (process $(< "$PID_FILE")): stop it first"; fi
  run rm -f "$CODE" "$PID_FILE"
  if dry; then quoted launch/worker.sh "$@"; return; fi
  # The trap: a host that shuts down signals this shell too, which is to write the code down all the same.
  # No file of ssh's stays open, or ssh would wait for the run.
  # shellcheck disable=SC2016
  LAUNCH_PRINTS="" setsid nohup bash -c 'trap : TERM; "$@"; echo $? > "$0"' "$CODE" launch/worker.sh "$@" \
    > "$LOG" 2>&1 3>&- < /dev/null &
  until [[ -s $PID_FILE || -s $CODE ]]; do sleep 0.1; done
}

logs() { run tail -n +1 -F --pid="$(cat "$PID_FILE" 2>/dev/null || echo 0)" "$LOG"; }

code() {
  if [[ -s $CODE ]]; then cat "$CODE"; elif running; then echo running; else echo lost; fi
}

stop() {
  if ! running; then echo "nothing runs here"; return; fi
  run kill -TERM "$(< "$PID_FILE")"
  while ! dry && running; do sleep 1; done
}

case ${1:-} in
  setup | start | logs | code | stop) "$@" ;;
  *) fail "expected setup, start, logs, code or stop, got '${1:-}': the head of $0 says what they do" ;;
esac
