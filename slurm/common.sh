# Sourced by the batch scripts, from the repository's root, where jobs are submitted: the environment, and `tasks`,
# which starts a command on all nodes. What becomes of the job then: `finish`, in outcome.sh.
# shellcheck shell=bash
set -eo pipefail +u # modules of sites read what is not set
# shellcheck source=/dev/null
if [ -n "${SITE_ENV:-}" ] || [ -e slurm/site.env ]; then source "${SITE_ENV:-slurm/site.env}"; fi
set -u
PATH=$PWD/.venv/bin:$PATH

job_folder=$(realpath -m "${LOGS:-slurm-logs}")/${SLURM_JOB_NAME:-job}-$SLURM_JOB_ID
export GEMMA_DIST_EXIT_CODES=$job_folder/attempt-${SLURM_RESTART_COUNT:-0} # anew: orphans write to the old one
export LAUNCHER=${LAUNCHER:-accelerate} PYTHONFAULTHANDLER=1
processes_per_node=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
cpus_per_process=$((${SLURM_CPUS_PER_TASK:-1} / processes_per_node))
export NUM_PROCESSES=$((SLURM_NNODES * processes_per_node))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus_per_process > 0 ? cpus_per_process : 1))}
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000)) # two jobs may share a node
rm -rf "$GEMMA_DIST_EXIT_CODES"; mkdir -p "$GEMMA_DIST_EXIT_CODES"

source slurm/outcome.sh
[ "$LAUNCHER" = none ] || [ -e "$ACCELERATE_CONFIG_FILE" ] || end 2 "$ACCELERATE_CONFIG_FILE: no such file"

# tasks COMMAND...: `gemma-dist COMMAND` under a launcher on each node, or as a rank in each task (LAUNCHER=none), until
# all have ended. In the background: bash runs a trap while it waits, and one wait ends with each signal. A node that
# fails ends the others instead of leaving them in an exchange; one that is done (--wait=0) does not. --overlap: Slurm
# may take the GPUs of the health check for busy a moment longer, and refuses a step that wants them.
tasks() {
  local per_node=1 cpus=${SLURM_CPUS_PER_TASK:-1} container=() step
  if [ "$LAUNCHER" = none ]; then per_node=$processes_per_node cpus=$((cpus / per_node > 0 ? cpus / per_node : 1)); fi
  if [ -n "${CONTAINER_IMAGE:-}" ]; then
    container=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD"
      --container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
  fi
  srun --nodes="$SLURM_NNODES" --ntasks="$((SLURM_NNODES * per_node))" --ntasks-per-node="$per_node" \
    --cpus-per-task="$cpus" --export=ALL --overlap --kill-on-bad-exit=1 --wait=0 --open-mode=append \
    --output="$job_folder/%N.log" "${container[@]}" bash slurm/leader.sh "$@" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step" || :; done
  wait "$step" # once more: a signal ends a wait with a code of its own
}

# How long Slurm lets ranks save, in seconds, where it lets them at all: SIGNAL_LEAD_S ahead of the time limit, as in
# --signal, or the partition's GraceTime at preemption. The larger one: a checkpoint begun in vain costs nothing.
grace_s() {
  local partition
  partition=$(scontrol show partition "${SLURM_JOB_PARTITION:-}" | sed -n 's/.*GraceTime=\([0-9]*\).*/\1/p' | head -n 1)
  echo $((${partition:-0} > ${SIGNAL_LEAD_S:-300} ? partition : ${SIGNAL_LEAD_S:-300}))
}

# One process on each node looks at GPUs, disk, versions, clock and network. HEALTH=0: not.
check_health() {
  if [ "${HEALTH:-1}" = 0 ]; then return; fi
  # shellcheck disable=SC2086
  LAUNCHER=none processes_per_node=1 tasks health ${HEALTH_OPTIONS:-} ||
    [ "$(grep -lsx 0 "$GEMMA_DIST_EXIT_CODES"/rank-* | wc -l)" = "$SLURM_NNODES" ] || NUM_PROCESSES=$SLURM_NNODES finish
  if [ -e "$GEMMA_DIST_EXIT_CODES/told" ]; then again 'stopped before it began, as Slurm asked'; fi
  rm -f "$GEMMA_DIST_EXIT_CODES"/rank-*
}
