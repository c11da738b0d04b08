#!/usr/bin/env bash
# Trains on machines reached by plain ssh, one process on each with all its GPUs: tools/launch/ssh.sh HOST,HOST... [options] -- arguments of jaxlm
#
#   tools/launch/ssh.sh node1,node2 --folder=/shared/jaxlm -- train --config=llama_1b --workdir=/shared/runs/mine
#
# The first host is the coordinator: the others must reach its port. --folder (the same on all, with .venv in it; else the current folder) and the workdir lie
# on a file system that all share. Ctrl-C asks every process to save a checkpoint and end; the same command goes on from there.
# Options: --folder=DIR   --port=8476   --dry_run prints the commands
set -euo pipefail
fail() { printf 'ssh.sh: %s\n' "$*" >&2; exit 2; }

[ $# -gt 0 ] || fail "give the hosts: tools/launch/ssh.sh node1,node2 -- train --config=... --workdir=..."
IFS=, read -r -a hosts <<< "$1"
shift
folder=$PWD port=8476 dry=''
while [ $# -gt 0 ]; do
  case $1 in
    --folder=*) folder=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --dry_run) dry=1 ;;
    --) shift; break ;;
    *) fail "unknown option $1; arguments of jaxlm come after --" ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "give jaxlm's arguments after --, such as -- train --config=quickstart --workdir=/shared/runs/mine"
for host in "${hosts[@]}"; do
  [[ $host =~ ^[A-Za-z0-9][A-Za-z0-9._@-]*$ ]] || fail "HOST=$host is no name of a machine"
done
coordinator=${hosts[0]#*@}:$port
home=$(printf '%q' "$folder")

# shellcheck disable=SC2329  # the trap calls it
stop() {
  trap '' INT TERM
  interrupted=1
  for host in "${hosts[@]}"; do
    ssh -o BatchMode=yes "$host" "cd $home && kill -TERM \$(cat .jaxlm.$host.pid)" || true
  done
}

waiting=()
trap stop INT TERM
for i in "${!hosts[@]}"; do
  host=${hosts[i]}
  # In a session of its own there, so that Ctrl-C here reaches it only as the TERM that `stop` sends.
  command="cd $home && echo \$\$ > .jaxlm.$host.pid && exec .venv/bin/jaxlm $(printf '%q ' "$@")--coordinator=$coordinator --processes=${#hosts[@]} --process=$i"
  if [ -n "$dry" ]; then
    printf 'ssh -o BatchMode=yes %s %q\n' "$host" "$command"
    continue
  fi
  setsid ssh -o BatchMode=yes "$host" "$command" < /dev/null > >(trap '' INT; sed -u "s/^/[$host] /") 2>&1 &
  waiting+=($!)
done

worst=0
for process in ${waiting[@]+"${waiting[@]}"}; do
  interrupted=1
  while [ -n "$interrupted" ]; do # the trap ends a wait, not the process
    interrupted=''
    code=0
    wait "$process" || code=$?
  done
  if [ "$code" -gt "$worst" ]; then worst=$code; fi
done
exit "$worst"
