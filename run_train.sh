#!/usr/bin/env bash
# Train on this machine: ./run_train.sh [--section.key=value ...]
#
# NGPU          processes on this node (default: the GPUs here, or 1)
# CONFIG        a file of train_configs/ (default: debug.toml)
# NNODES        nodes of the job (default 1). Each runs this script with its NODE_RANK and the same MASTER_ADDR and MASTER_PORT
# TRAIN         the script to run (default: train.py)
# Further words go to the script.
#
# TERM, USR1, INT and HUP go to the training processes, not to torchrun: torchrun dies of USR1 and orphans them, and answers TERM by
# failing. They save a checkpoint and exit 0, and so does this script. A second Ctrl-C ends the job without waiting for that.
set -um # job control puts torchrun in a process group of its own, so that Ctrl-C reaches only this script

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$(command -v python || command -v python3)}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}

gpus=0
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
fi
NGPU=${NGPU:-$((gpus > 0 ? gpus : 1))}

if [ "$NNODES" -gt 1 ]; then
    if [ -z "${MASTER_ADDR:-}" ]; then
        echo "run_train.sh: NNODES=$NNODES needs MASTER_ADDR, the host of NODE_RANK 0" >&2
        exit 2
    fi
    rendezvous="$MASTER_ADDR:${MASTER_PORT:-29500}"
else
    rendezvous="localhost:${MASTER_PORT:-0}" # port 0: any free one
fi
is_host=$([ "$NODE_RANK" = 0 ] && echo true || echo false)

cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NGPU ? cores / NGPU : 1))}
if [ "$gpus" -gt 0 ] && [ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then
    export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True} # less fragmentation under changing expert loads
fi

"$python" -m torch.distributed.run \
    --nnodes="$NNODES" --nproc-per-node="$NGPU" \
    --rdzv-backend=c10d --rdzv-id="${RUN_ID:-lmoe}" --rdzv-endpoint="$rendezvous" --rdzv-conf="is_host=$is_host" \
    "${TRAIN:-$here/train.py}" --config="${CONFIG:-$here/train_configs/debug.toml}" "$@" </dev/null &
torchrun=$!

workers() { # the children of torchrun; a slim container has no ps or pgrep
    if [ -d /proc/self ]; then
        for status in /proc/[0-9]*/status; do
            while read -r key value; do
                if [ "$key" = PPid: ]; then
                    [ "$value" = "$torchrun" ] && basename "$(dirname "$status")"
                    break
                fi
            done <"$status"
        done 2>/dev/null
    else
        pgrep -P "$torchrun"
    fi
}

signals=0
interrupts=0
pass_on() {
    signals=$((signals + 1))
    [ "$1" = INT ] && interrupts=$((interrupts + 1))
    pids=$(workers)
    if [ "$interrupts" -gt 1 ] || [ -z "$pids" ]; then
        kill -TERM "$torchrun" 2>/dev/null
    else
        kill -"$1" $pids 2>/dev/null
    fi
}
trap 'pass_on TERM' TERM HUP
trap 'pass_on INT' INT
trap 'pass_on USR1' USR1

while :; do # a signal makes wait return early
    before=$signals
    wait "$torchrun"
    status=$?
    [ "$signals" = "$before" ] && break
done
exit "$status"
