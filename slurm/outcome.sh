# Sourced by common.sh: what becomes of a job whose ranks have ended. Exit codes do not survive launchers, so each rank
# leaves its own in a file (docs/slurm.md lists them), and leader.sh leaves `told` where Slurm asked for the end.
# shellcheck shell=bash disable=SC2154

job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID} # of this task of an array alone
say() { echo "$(date +%FT%T) job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)): $*"; }
end() { say "${*:2}; logs: $job_folder"; exit "$1"; }
state() { for _ in {1..10}; do squeue -h -j "$job" -o '%T %r' && return; sleep 15; done; } # the controller may be away
code() { grep -qsx "$1" "$GEMMA_DIST_EXIT_CODES"/rank-*; } # whether a rank ended with it

finish() {
  local ended; ended=$(find "$GEMMA_DIST_EXIT_CODES" -name 'rank-*' | wc -l)
  if code 2; then end 2 'a user error, which another try would not mend'; fi
  if code 5; then again 'a node is not fit'; fi
  if code 4; then again 'a step hung'; fi
  if [ "$ended" = 0 ]; then again 'no rank left a word: all were killed, or none began'; fi
  if [ "$ended" -lt "$NUM_PROCESSES" ]; then again "$((NUM_PROCESSES - ended)) of $NUM_PROCESSES ranks were killed"; fi
  if grep -qvx -e 0 -e 75 "$GEMMA_DIST_EXIT_CODES"/rank-*; then again 'a rank failed'; fi
  if ! code 75; then end 0 'done'; fi
  if [ -e "$GEMMA_DIST_EXIT_CODES/told" ]; then again 'stopped as Slurm asked'; fi
  end 75 'stopped, but not by Slurm; the same command goes on from there'
}

# again WHY: the job starts once more. Not after scancel (COMPLETING: a requeue would revive it), nor where Slurm does
# so by itself (COMPLETING, too: preemption after its grace, a node that is gone, scontrol requeue).
again() {
  case ${now:=$(state)} in
    'RUNNING '*) requeue "$1" || end 1 "$1; not requeued"; exit 0 ;;
    *) end 1 "$1; Slurm ended this job ($now)" ;;
  esac
}

# requeue WHY: unless MAX_RESTARTS went by without a new checkpoint since.
requeue() {
  local count=0 last=-1 step bad old
  step=$(cat "$GEMMA_DIST_EXIT_CODES/step" 2>/dev/null || echo 0)
  if [ -e "$job_folder/restarts" ]; then read -r count last <"$job_folder/restarts"; fi
  count=$((step > last ? 1 : count + 1)) # of restarts at this step, this one included
  step=$((step > last ? step : last))    # a start that did not come to train knows of none
  if [ "$count" -gt "${MAX_RESTARTS:-3}" ]; then
    say "no new checkpoint since step $step in ${MAX_RESTARTS:-3} restarts (MAX_RESTARTS)"
    return 1
  fi
  echo "$count $step" >"$job_folder/restarts"
  say "$1; requeued at step $step (restart $count of ${MAX_RESTARTS:-3} without a new checkpoint)"
  scontrol requeue "$job" || return 1
  bad=$(sed 's/\..*//' "$GEMMA_DIST_EXIT_CODES/bad-nodes" 2>/dev/null | paste -sd,)
  if [ -n "$bad" ]; then # what is excluded can be changed from now on
    old=$(scontrol show job "$job" | sed -n 's/.*ExcNodeList=//p' | grep -v null || :)
    if scontrol update "JobId=$job" "ExcNodeList=$old${old:+,}$bad"; then say "without $bad from now on"; fi
  fi
}

# The batch shell gets TERM at the time limit: ranks then have KillWait seconds to save, and so has this shell. Requeued
# at once, since nobody may be left to do it afterwards. Other reasons of a TERM are not ours to decide.
at_term() {
  [ "$(state)" != 'COMPLETING TimeLimit' ] || [ ! -e "$GEMMA_DIST_EXIT_CODES/step" ] || requeue 'the time limit' || :
}
trap at_term TERM
