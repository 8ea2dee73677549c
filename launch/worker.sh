#!/usr/bin/env bash
# The workers of a run that is started by something else than `mmtrain train`:
#   launch/worker.sh --run-dir RUN        (RUN as `mmtrain train prepare` prints it)
# Under Slurm: srun starts this once per rank, with MASTER_ADDR and MASTER_PORT. Elsewhere: once per node, with
# NNODES, NODE_RANK (or Kubernetes' JOB_COMPLETION_INDEX), RANKS_PER_NODE, MASTER_ADDR and MASTER_PORT.
# Exit code: 0 finished, or stopped on a signal (MMTRAIN_STOPPED_CODE instead, when set), 2 a mistake of yours, 3 hung.
set -euo pipefail

if [ -n "${SLURM_PROCID:-}" ]; then
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    exec python -m mmtrain.train.worker "$@"
fi

node=${NODE_RANK:-${JOB_COMPLETION_INDEX:?set NODE_RANK to the number of this node, from 0}}
ranks=${RANKS_PER_NODE:?set RANKS_PER_NODE to the number of GPUs of a node}
export WORLD_SIZE=$((${NNODES:?set NNODES to the number of nodes} * ranks))
: "${MASTER_ADDR:?set MASTER_ADDR to the name of node 0}" "${MASTER_PORT:?set MASTER_PORT to a free port of node 0}"

declare -A workers=()
trap 'kill -TERM "${!workers[@]}" 2>/dev/null || true' TERM INT USR1 # they finish the step and save
for ((local_rank = 0; local_rank < ranks; local_rank++)); do
    RANK=$((node * ranks + local_rank)) LOCAL_RANK=$local_rank python -m mmtrain.train.worker "$@" &
    workers[$!]=$local_rank
done

while [ ${#workers[@]} -gt 0 ]; do
    code=0
    wait -n -p ended "${!workers[@]}" || code=$?
    [ -n "${ended:-}" ] || continue # only a signal, which the trap has handed on
    unset "workers[$ended]"
    if [ $code != 0 ]; then
        # The others wait for it in vain; one that is writing a checkpoint gets the time to end that.
        kill -TERM "${!workers[@]}" 2>/dev/null || true
        for _ in {1..30}; do
            kill -0 "${!workers[@]}" 2>/dev/null || break
            sleep 1
        done
        kill -KILL "${!workers[@]}" 2>/dev/null || true
        exit $code
    fi
done

[ -n "${MMTRAIN_STOPPED_CODE:-}" ] || exit 0
while [ "$#" -gt 0 ] && [ "$1" != --run-dir ]; do shift; done
for _ in {1..60}; do # until rank 0, which may be on another node, has said how it ended
    grep -q '"state": "running"' "$2/status.json" || break
    sleep 1
done
! grep -q '"state": "stopped"' "$2/status.json" || exit "$MMTRAIN_STOPPED_CODE"
