# shellcheck shell=bash
# Sourced by the scripts here: mistakes in one line, and commands that DRY_RUN=1 prints instead of running.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Commands are printed here, also where a function's or a script's output is taken.
if [[ ${LAUNCH_PRINTS:-} != 3 ]]; then exec 3>&1; export LAUNCH_PRINTS=3; fi

fail() { echo "error: $*" >&2; exit 2; }

# need NAME WHAT: the variable NAME is set
need() { [[ -n ${!1:-} ]] || fail "$1 is not set: $2"; }

dry() { [[ ${DRY_RUN:-0} == 1 ]]; }

# quoted WORD...: on one line, as a shell reads them again
quoted() {
  local word words=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@,+%-]+$ ]]; then words+=("$word"); else words+=("${word@Q}"); fi
  done
  echo "${words[*]}"
}

run() { if dry; then quoted "$@" >&3; else "$@"; fi; }

# ask ANSWER COMMAND...: what the command prints; a dry run prints the command and takes ANSWER for it
ask() { if dry; then quoted "${@:2}" >&3; printf '%s' "${1:+$1$'\n'}"; else "${@:2}"; fi; }

# workdir WORD...: the --workdir of a train command, which every host must see
workdir() {
  local word
  for word in "$@"; do
    case $word in
      --workdir=*://*) fail "$word is no path: mount the bucket or the share (MOUNT) and name a folder there" ;;
      --workdir=/*) echo "${word#*=}"; return ;;
      --workdir=*) fail "$word: the hosts see the run in one folder, so it must be absolute, such as /mnt/attnres/d12" ;;
    esac
  done
  fail "--workdir is missing: the train command's, on a disk that all hosts see, such as --workdir=/mnt/attnres/d12"
}
