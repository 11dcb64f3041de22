#!/usr/bin/env bash
# One node's part of a run, for schedulers that start the same container on every node (jobset.yaml, skypilot.yaml):
#
#   examples/cluster/node.sh accelerate_configs/zero3.yaml launch/31b_lora_zero3.yaml [key=value ...]
#
# From the repository's root. NUM_NODES, NODE_RANK, MAIN_ADDRESS and PROCESSES_PER_NODE say where it is; GRACE_S how many
# seconds pass between TERM and KILL. Ends with the exit code of the ranks, which the launcher hides: 2 for a user error,
# 75 for a run that stopped as it was asked to and goes on when the same command comes again.
set -euo pipefail

usage='usage: examples/cluster/node.sh ACCELERATE_CONFIG RECIPE [key=value ...]'
config=${1:?$usage} recipe=${2:?$usage}
shift 2
: "${NUM_NODES:?}" "${NODE_RANK:?}" "${MAIN_ADDRESS:?}" "${PROCESSES_PER_NODE:?}"
grace_s=${GRACE_S:-30}

GEMMA_DIST_EXIT_CODES=$(mktemp -d)
export GEMMA_DIST_EXIT_CODES
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$grace_s # until the launcher, told to end, kills its ranks

# The launcher passes them on. Without a trap, process 1 of a container ignores them.
trap 'if [ -n "${!:-}" ]; then kill -TERM "$!" || :; else exit 143; fi' TERM INT
accelerate launch --config_file "$config" \
  --num_machines "$NUM_NODES" --num_processes $((NUM_NODES * PROCESSES_PER_NODE)) --machine_rank "$NODE_RANK" \
  --main_process_ip "$MAIN_ADDRESS" --main_process_port "${MAIN_PORT:-29500}" \
  -m gemma_dist train "$recipe" "stop_grace_s=$grace_s" "$@" &
launcher=$!

while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || :; done
rc=0
wait "$launcher" || rc=$? # once more: a signal ends a wait with a code of its own

ended_with() { grep -qsx "$1" "$GEMMA_DIST_EXIT_CODES"/rank-*; } # whether a rank of this node did
for code in 2 4 74 75; do
  if ended_with "$code"; then exit "$code"; fi
done
exit "$rc"
