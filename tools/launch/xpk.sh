#!/usr/bin/env bash
# Trains on GKE through xpk: tools/launch/xpk.sh NAME --cluster=C --zone=Z --image=IMAGE [options] -- arguments of jaxlm
#
#   tools/launch/xpk.sh mine --cluster=tpus --zone=us-west4-a --type=v5litepod-16 --slices=2 --image=REGION-docker.pkg.dev/PROJECT/jaxlm/jaxlm:tpu \
#     -- train --config=llama_1b --workdir=/share/runs/mine
#
# Before it, once (pip install xpk): xpk cluster create --cluster=C --zone=Z --tpu-type=v5litepod-16 --num-slices=2 --spot, the image by tools/deploy/Dockerfile
# with ACCELERATOR=tpu, and a Filestore share by `xpk storage attach`, where the workdir lies. A slice that is lost is made anew by the cluster, and the
# workload started again, at most --restarts times; it goes on from the last checkpoint. (75 is how a run that hangs ends itself.)
# Options: --type=v5litepod-8   --slices=1   --project=PROJECT   --restarts=100   --dry_run prints the command
set -euo pipefail
fail() { printf 'xpk.sh: %s\n' "$*" >&2; exit 2; }

[ $# -gt 0 ] || fail "give a name: tools/launch/xpk.sh NAME --cluster=C --zone=Z --image=IMAGE -- train --config=... --workdir=..."
name=$1
shift
cluster='' zone='' image='' type=v5litepod-8 slices=1 project='' restarts=100 dry=''
while [ $# -gt 0 ]; do
  case $1 in
    --cluster=*) cluster=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry_run) dry=1 ;;
    --) shift; break ;;
    *) fail "unknown option $1; arguments of jaxlm come after --" ;;
  esac
  shift
done
[ -n "$cluster" ] && [ -n "$zone" ] && [ -n "$image" ] || fail "--cluster, --zone and --image are needed"
[ $# -gt 0 ] || fail "give jaxlm's arguments after --, such as -- train --config=llama_1b --workdir=/share/runs/mine"
arguments=$(printf '%q ' "$@")
command=(xpk workload create "--workload=$name" "--cluster=$cluster" "--zone=$zone" ${project:+"--project=$project"} "--tpu-type=$type" "--num-slices=$slices"
  "--docker-image=$image" "--max-restarts=$restarts" --restart-on-exit-codes=75 "--command=jaxlm ${arguments% }")
if [ -n "$dry" ]; then printf '%q ' "${command[@]}"; echo; else "${command[@]}"; fi
