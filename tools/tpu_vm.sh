#!/usr/bin/env bash
# Trains on Cloud TPU VMs, one slice or several, through queued resources: tools/tpu_vm.sh VERB NAME --zone=ZONE [options] [-- arguments of jaxlm]
#
#   create   queues a request for the slices and waits until they are there; one that is queued or active already is gone on with
#   setup    copies this checkout to all workers, installs it, mounts the share; again after you have changed the code
#   run      starts `jaxlm ARGUMENTS` on all workers, detached; where it runs already, nothing happens
#   logs     follows the log of the first worker of the first slice (Ctrl-C ends only the following)
#   status   state of the request, and of the run on each worker
#   stop     asks the run to save a checkpoint and end
#   resume   after preemption: a lost request is deleted and made anew, then setup and run, which goes on from the last checkpoint
#   watch    resume once a minute until the run has ended well
#   delete   gives everything back; what is not there need not be deleted
#
#   tools/tpu_vm.sh create mine --zone=us-west4-a --type=v5litepod-16 --spot
#   tools/tpu_vm.sh setup mine --zone=us-west4-a --nfs=10.0.0.2:/share
#   tools/tpu_vm.sh run mine --zone=us-west4-a -- train --config=llama_1b --workdir=/mnt/jaxlm/runs/mine
#
# Options: --type=v5litepod-8 (accelerator type of one slice)   --slices=1   --spot   --project=PROJECT (else gcloud's own)
#   --runtime=VERSION (else what Google names for the type)     --nfs=ADDRESS:/SHARE (Filestore), mounted at /mnt/jaxlm
#   --dry_run   prints every command instead of running it, taking each state as it would be when all goes well
# A worker's own disk goes with it: a workdir that shall survive preemption, or that several workers share, lies on the share.
set -euo pipefail

say() { printf 'tpu_vm: %s\n' "$*" >&2; }
fail() { say "$*"; exit 2; }
usage() { sed -n '2,24s/^# \{0,1\}//p' "$0"; }

[ $# -gt 0 ] || { usage >&2; exit 2; }
case $1 in -h | --help | help) usage; exit 0 ;; esac
[ $# -ge 2 ] || fail "give a verb and a name: tools/tpu_vm.sh create mine --zone=us-west4-a; see --help"
verb=$1 name=$2
shift 2
given=()
zone='' type=v5litepod-8 slices=1 spot='' project='' runtime='' nfs='' dry=''
while [ $# -gt 0 ]; do
  if [ "$1" != -- ]; then given+=("$1"); fi
  case $1 in
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --nfs=*) nfs=${1#*=} ;;
    --spot) spot=1 ;;
    --dry_run) dry=1 ;;
    --) shift; break ;;
    *) fail "unknown option $1; options look like --zone=us-west4-a, and arguments of jaxlm come after --" ;;
  esac
  shift
done
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || fail "NAME=$name must be lower-case letters, digits and -, beginning with a letter"
[ -n "$zone" ] || fail "--zone=ZONE is needed, such as --zone=us-west4-a"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices must be a whole number of at least 1"
[ -z "$nfs" ] || [[ $nfs =~ ^[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*$ ]] || fail "--nfs=$nfs must be ADDRESS:/SHARE"
if [ -z "$runtime" ]; then # docs.cloud.google.com/tpu/docs/runtimes, looked up on 2026-11-22
  case $type in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v4-* | v3-* | v2-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "--type=$type is not known: v6e-N, v5p-N, v5litepod-N, v4-N; or name its --runtime=VERSION" ;;
  esac
fi
root=$(cd "$(dirname "$0")/.." && pwd)
where=("--zone=$zone" ${project:+"--project=$project"})
queue=(gcloud compute tpus queued-resources)

# Runs a command, or prints it as a line that a shell reads back.
act() {
  if [ -n "$dry" ]; then
    local word line=''
    for word in "$@"; do
      if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" '${word//\'/\'\\\'\'}'"; fi
    done
    printf '%s\n' "${line# }"
  else
    "$@"
  fi
}

# State of the request: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED ...; empty when there is none.
state() {
  if [ -n "$dry" ]; then act "${queue[@]}" describe "$name" "${where[@]}" '--format=value(state.state)' >&3; echo "$1"; return; fi
  local answer
  if answer=$("${queue[@]}" describe "$name" "${where[@]}" '--format=value(state.state)' 2>&1); then
    echo "$answer"
  elif [[ $answer != *NOT_FOUND* && $answer != *"not found"* ]]; then
    fail "gcloud could not say what state $name is in: $answer"
  fi
}
exec 3>&1

# shellcheck disable=SC2016  # these are for the workers' shells
ended='if [ -e run.code ]; then cat run.code; elif [ -e run.pid ] && kill -0 "$(cat run.pid)" 2> /dev/null; then echo running; else echo lost; fi'
# shellcheck disable=SC2016
stop='if [ -e run.pid ]; then pkill -TERM -P "$(cat run.pid)" || true; fi'

on_all() { act "${queue[@]}" ssh "$name" "${where[@]}" --node=all --worker=all "--command=$1"; }

create() {
  local now
  now=$(state '')
  case $now in
    '')
      local nodes=("--node-id=$name")
      if [ "$slices" -gt 1 ]; then nodes=("--node-count=$slices" "--node-prefix=$name"); fi
      act "${queue[@]}" create "$name" "${where[@]}" "--accelerator-type=$type" "--runtime-version=$runtime" "${nodes[@]}" ${spot:+--spot} ;;
    FAILED | SUSPENDING | SUSPENDED) fail "$name is there and $now: tools/tpu_vm.sh resume makes it anew, delete gives it up" ;;
    *) say "$name is there: $now" ;;
  esac
  while now=$(state ACTIVE); [ "$now" != ACTIVE ]; do
    case $now in '' | FAILED | SUSPENDING | SUSPENDED) fail "$name is ${now:-gone} and was not given: tools/tpu_vm.sh resume asks once more" ;; esac
    say "$name is $now; Ctrl-C leaves it in the queue"
    sleep 30
  done
}

setup() {
  local archive=/tmp/jaxlm-$name.tgz
  act tar -czf "$archive" -C "$root" pyproject.toml README.md LICENSE configs jaxlm
  act "${queue[@]}" scp "$archive" "$name:jaxlm.tgz" "${where[@]}" --node=all --worker=all
  local share=''
  if [ -n "$nfs" ]; then
    share="command -v mount.nfs > /dev/null || sudo apt-get install -y -q nfs-common; sudo mkdir -p /mnt/jaxlm;
      mountpoint -q /mnt/jaxlm || sudo mount -t nfs $nfs /mnt/jaxlm; sudo chmod 1777 /mnt/jaxlm;"
  fi
  # These images have Python 3.10: uv brings one of its own.
  on_all "set -e; $share rm -rf source; mkdir source; tar -xzf jaxlm.tgz -C source
    [ -x .local/bin/uv ] || python3 -m pip install -q --user uv
    [ -d venv ] || .local/bin/uv venv -q --python 3.12 venv
    .local/bin/uv pip install -q --python venv/bin/python --reinstall-package jaxlm './source[tpu]'"
}

run() {
  [ $# -gt 0 ] || fail "give jaxlm's arguments after --: ... run $name --zone=$zone -- train --config=quickstart --workdir=runs/mine"
  local arguments
  arguments=$(printf '%q ' "$@")
  # In the group of a shell of its own: it outlives this connection, and writes down how the run ended.
  on_all "if [ -e run.pid ] && kill -0 \$(cat run.pid) 2> /dev/null; then echo already running; exit 0; fi
    rm -f run.code
    setsid nohup bash -c 'venv/bin/jaxlm ${arguments//\'/\'\\\'\'}>> run.log 2>&1; echo \$? > run.code' > /dev/null 2>&1 < /dev/null & echo \$! > run.pid"
}

# Looks once a minute; a fault of the network does not end it.
watch() {
  local code
  while true; do
    code=lost
    if [ "$(state ACTIVE)" = ACTIVE ]; then
      code=$(act "${queue[@]}" ssh "$name" "${where[@]}" --node=0 --worker=0 "--command=$ended" || echo unreachable)
    fi
    if [ -n "$dry" ]; then printf '%s\n' "$code"; return; fi
    case $code in
      0) say "the run has ended well"; return ;;
      running | unreachable) ;;
      2) fail "the run ended with code 2, a mistake of its command: see tools/tpu_vm.sh logs" ;;
      *) say "the run ended: $code"; "$0" resume "$name" "${given[@]}" -- "$@" || say "that did not work; once more in a minute" ;;
    esac
    sleep 60
  done
}

resume() {
  [ $# -gt 0 ] || fail "give the same arguments after -- as to run: the run goes on from its last checkpoint"
  case $(state SUSPENDED) in
    FAILED | SUSPENDING | SUSPENDED) act "${queue[@]}" delete "$name" "${where[@]}" --force --quiet ;;
  esac
  create
  setup
  run "$@"
}

case $verb in
  create) create ;;
  setup) setup ;;
  run) run "$@" ;;
  logs) act "${queue[@]}" ssh "$name" "${where[@]}" --node=0 --worker=0 '--command=tail -n 200 -F run.log' ;;
  status)
    now=$(state ACTIVE)
    say "$name is ${now:-not there}"
    if [ "$now" = ACTIVE ]; then on_all "$ended; tail -n 1 run.log"; fi ;;
  stop) on_all "$stop" ;;
  resume) resume "$@" ;;
  watch) [ $# -gt 0 ] || fail "give the same arguments after -- as to run"; watch "$@" ;;
  delete)
    if [ -z "$(state ACTIVE)" ]; then say "$name is not there"; else act "${queue[@]}" delete "$name" "${where[@]}" --force --quiet; fi ;;
  *) fail "unknown verb $verb; known: create, setup, run, logs, status, stop, resume, watch, delete" ;;
esac
