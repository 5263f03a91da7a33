#!/usr/bin/env bash
# A GKE cluster with JobSet: one slice, or several (SLICES=2).
#
#   IMAGE=REGION-docker.pkg.dev/PROJECT/attnres/attnres:1 launch/gke.sh build
#   NAME=d12 IMAGE=... BUCKET=my-bucket ACCELERATOR=tpu-v6e-slice TOPOLOGY=8x8 \
#     launch/gke.sh apply --config=lm:d12,block8 --workdir=/mnt/attnres/d12
#
#   build    the image of the checkout, pushed to IMAGE
#   print    the manifest of apply
#   apply    start the run; again after delete, it goes on from its checkpoint
#   logs     of the first pod;   state: of the JobSet;   delete: it saves and ends
#
# CHIPS of a host (4), RESTARTS (20), ACCOUNT, the cluster's service account (attnres). DRY_RUN=1 prints what would run.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
NAME=${NAME:-attnres} SLICES=${SLICES:-1} CHIPS=${CHIPS:-4} RESTARTS=${RESTARTS:-20} ACCOUNT=${ACCOUNT:-attnres}

hosts() {
  [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+)+$ ]] || fail "TOPOLOGY=$TOPOLOGY is not like 4x4 or 4x4x8"
  local chips=$((${TOPOLOGY//x/*}))
  ((chips % CHIPS == 0)) || fail "TOPOLOGY=$TOPOLOGY has $chips chips, which CHIPS=$CHIPS of a host do not divide"
  echo $((chips / CHIPS))
}

# listed WORD...: a list in YAML's flow style
listed() {
  local word text=
  for word in "$@"; do
    word=${word//\\/\\\\}
    text+="${text:+, }\"${word//\"/\\\"}\""
  done
  echo "[$text]"
}

print() {
  need IMAGE "the image that launch/gke.sh build pushed"
  need BUCKET "the bucket of the runs, without gs://"
  need ACCELERATOR "the node pool's, such as ACCELERATOR=tpu-v6e-slice"
  need TOPOLOGY "the slice's, such as TOPOLOGY=8x8"
  workdir "$@" > /dev/null
  local line hosts words manifest=single-slice
  hosts=$(hosts)
  words=$(listed "$@")
  local -A values=([NAME]=$NAME [IMAGE]=$IMAGE [BUCKET]=$BUCKET [ACCELERATOR]=$ACCELERATOR [TOPOLOGY]=$TOPOLOGY
    [HOSTS]=$hosts [CHIPS]=$CHIPS [SLICES]=$SLICES [RESTARTS]=$RESTARTS [ACCOUNT]=$ACCOUNT [WORDS]=$words)
  if ((SLICES > 1)); then manifest=multislice; fi
  while IFS= read -r line; do
    if [[ $line =~ ^([^#]*[a-zA-Z]:)\ .*\ \#\ ([A-Z]+)$ ]] && [[ -n ${values[${BASH_REMATCH[2]}]:-} ]]; then
      line="${BASH_REMATCH[1]} ${values[${BASH_REMATCH[2]}]}"
    fi
    echo "$line"
  done < "launch/gke/$manifest.yaml"
}

apply() {
  local manifest
  manifest=$(print "$@")
  if dry; then
    echo "kubectl apply --filename=- <<'MANIFEST'"$'\n'"$manifest"$'\n'MANIFEST
  else
    kubectl apply --filename=- <<< "$manifest"
  fi
}

build() {
  need IMAGE "where the image goes, such as REGION-docker.pkg.dev/PROJECT/attnres/attnres:1"
  run docker build --file=launch/gke/Dockerfile --tag="$IMAGE" ${LOCK:+--build-arg=LOCK="$LOCK"} .
  run docker push "$IMAGE"
}

logs() {
  local first="jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
  run kubectl logs --follow --tail=-1 --container=attnres --selector="jobset.sigs.k8s.io/jobset-name=$NAME,$first"
}

case ${1:-} in
  build | print | apply) "$@" ;;
  logs) logs ;;
  state) run kubectl get jobset "$NAME" ;;
  delete) run kubectl delete jobset "$NAME" ;;
  *) fail "expected build, print, apply, logs, state or delete, got '${1:-}': the head of $0 says what they do" ;;
esac
