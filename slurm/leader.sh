#!/usr/bin/env bash
# The top process of a task, the only one that Slurm signals under cgroups (but for KILL). It starts the launcher, or a
# rank (LAUNCHER=none), and passes on to the ranks that Slurm wants them to stop: USR1 ahead of the time limit, TERM at
# preemption, the limit and scancel. The launcher hears of neither: it would die of USR1, and end the ranks at TERM.
# shellcheck disable=SC2317 # functions that traps call
set -u
trap 'early=1' USR1 TERM

case $LAUNCHER in
  none)
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    command=(python -m gemma_dist)
    ;;
  *)
    command=(accelerate launch --config_file "$ACCELERATE_CONFIG_FILE"
      --num_machines "$SLURM_NNODES" --num_processes "$NUM_PROCESSES" --machine_rank "$SLURM_NODEID"
      --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" -m gemma_dist)
    ;;
esac
(trap '' USR1; exec "${command[@]}" "$@") & # ignored by all that it starts, until a rank listens
top=$!

ranks() { if [ "$LAUNCHER" = none ]; then echo "$top"; else cat /proc/"$top"/task/*/children 2>/dev/null; fi; }
listens() { (( 0x$(sed -n 's/^SigCgt:\t//p' "/proc/$1/status" 2>/dev/null || echo 0) & 1 << 9 )); } # handles USR1

# Tell each rank once, as soon as it listens: the stop may come while it is starting.
tell_ranks() {
  local rank told=' '
  trap '' USR1
  while sleep 0.2; do
    for rank in $(ranks); do
      if [[ $told != *" $rank "* ]] && listens "$rank"; then kill -USR1 "$rank" && told+="$rank "; fi
    done
  done
}

# A stop that comes after a rank has ended is no wish of Slurm's: srun ends the others then.
asked() {
  [ -n "${teller:-}" ] && return
  [ -n "$(find "$GEMMA_DIST_EXIT_CODES" -name 'rank-*' -o -name told)" ] || : >"$GEMMA_DIST_EXIT_CODES/told"
  tell_ranks & teller=$!
}
trap asked USR1 TERM
[ -z "${early:-}" ] || asked

while kill -0 "$top" 2>/dev/null; do wait "$top"; done
wait "$top" # once more: a signal ends a wait with a code of its own
rc=$?
[ -z "${teller:-}" ] || kill "$teller"
exit "$rc"
