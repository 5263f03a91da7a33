#!/usr/bin/env bash
# A cluster made by xpk, which queues the run there as a JobSet: one slice, or several (SLICES=2).
#
#   NAME=d12 CLUSTER=my-cluster ZONE=us-east5-b TYPE=v6e-64 IMAGE=REGION-docker.pkg.dev/PROJECT/attnres/attnres \
#     STORAGE=runs launch/xpk.sh --config=lm:d12,block8 --workdir=/mnt/attnres/d12
#
# STORAGE is what `xpk storage attach` or `create` made with --mount-point=/mnt/attnres. DRY_RUN=1 prints the command.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
need CLUSTER "the cluster that xpk made"
need ZONE "the cluster's zone, such as ZONE=us-east5-b"
need TYPE "the accelerator type, such as TYPE=v6e-64"
need IMAGE "the image that launch/gke.sh build pushed"
need STORAGE "the name that xpk storage knows the shared disk by"
workdir "$@" > /dev/null
# 75: the run was stopped before its end. 1: a host died, and the others with it.
run xpk workload create --workload="${NAME:-attnres}" --cluster="$CLUSTER" --zone="$ZONE" \
  ${PROJECT:+--project="$PROJECT"} --tpu-type="$TYPE" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
  --storage="$STORAGE" --max-restarts="${RESTARTS:-20}" --restart-on-exit-codes=1,75 \
  --termination-grace-period-seconds=300 --command="launch/worker.sh $(quoted "$@")"
