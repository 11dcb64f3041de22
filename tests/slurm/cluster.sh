#!/usr/bin/env bash
# Throw-away Slurm cluster on one machine, for tests. Needs root and the Debian packages of `install`.
#
#   cluster.sh install                  apt packages (idempotent)
#   cluster.sh try                      whether a cluster can be started here; says what cannot be done
#   cluster.sh start WORK               start, wait until every node is idle, return
#   cluster.sh run WORK                 same, in the foreground; ends when stdin closes
#   cluster.sh exec WORK CMD...         run CMD on the controller ("login node")
#   cluster.sh node WORK NODE CMD...    run CMD on a node
#   cluster.sh node-kill WORK NODE      power a node off (every process on it dies)
#   cluster.sh node-up WORK NODE        power it on again
#   cluster.sh stop WORK                end everything that this WORK started
#
# Each node is a network + UTS + mount + PID namespace: own address, own hostname, own process
# table. All of them sit in one outer PID namespace, so that `stop` is one kill of one pid and
# nothing (job steps, orphans of job steps) can survive it. Outside WORK it writes only one cgroup
# folder of its own, removed by `stop`; /etc/hosts is bind-mounted inside the namespaces alone; no
# port of the host is used; several clusters can run side by side.
#
# A task that needs longer than MessageTimeout to die makes the controller repeat the order a minute later, which would
# hit the next start of a requeued job here (on clusters that begins after two minutes): keep KILLWAIT below it.
#
# Knobs (environment): NODES=2 CPUS=8 MEM=4000 GPUS=4 (fake)  KILLWAIT=5 GRACE=20 NODE_TIMEOUT=20
#   CRED_EXPIRE=5 START_TIMEOUT=30 PROCTRACK=auto|cgroup|linuxproc EXTRA_CONF=file for slurm.conf
set -euo pipefail
SELF=$(readlink -f "${BASH_SOURCE[0]}")
CMD=${1:-help}; shift || true
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
NET=10.77.0
FREEZER=/sys/fs/cgroup/freezer                    # cgroup v1; only its own subfolder is used
die() { echo "cluster: $*" >&2; exit 1; }

use_work() {
  [ -n "${1:-}" ] || die "work folder missing"
  W=$(readlink -m "$1")
  case $W in *[[:space:]]*) die "no spaces in the work folder's path" ;; esac
  [ ${#W} -le 90 ] || die "work folder's path too long (unix socket)"
  export SLURM_CONF=$W/etc/slurm.conf
}

do_install() {
  local want=(munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins iproute2 util-linux) miss=() p
  for p in "${want[@]}"; do dpkg -s "$p" >/dev/null 2>&1 || miss+=("$p"); done
  [ ${#miss[@]} = 0 ] && return 0
  [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || die "install, as root: ${miss[*]} (names of Debian's packages)"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${miss[@]}" >/dev/null
}

do_try() {                                        # each thing that a cluster does and a container may forbid
  unshare --fork --pid --mount --net --uts --mount-proc --kill-child=KILL -- bash -euc '
    PATH=$PATH:/usr/sbin:/sbin
    hostname head
    mount --bind /etc/hosts /etc/hosts
    ip link add br0 type bridge
    ip link add v1 type veth peer name eth0
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    mknod /dev/shm/gpu0 c 195 0
    mkdir "$1/try.$2"; rmdir "$1/try.$2"' try "$FREEZER" "$$"
}

write_files() {
  local n=${NODES:-2} i gpu=${GPUS:-4} track=${PROCTRACK:-auto}
  if [ "$track" = auto ]; then track=linuxproc; [ -w "$FREEZER" ] && track=cgroup; fi
  mkdir -p "$W"/{etc,state,spool,log,run,munge,dev}
  mkdir -p -m 700 "$W/key"
  chmod 755 "$W" "$W/munge"                       # munged: the socket's folder must be 0711 or wider
  [ -s "$W/key/munge.key" ] || { (umask 077; head -c 1024 /dev/urandom >"$W/key/munge.key"); }
  { echo "127.0.0.1 localhost"; echo "$NET.1 head"
    for ((i = 1; i <= n; i++)); do echo "$NET.$((10 + i)) n$i"; done; } >"$W/etc/hosts"
  cat >"$W/etc/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=head($NET.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$W/munge/sock,cred_expire=${CRED_EXPIRE:-5}
CredType=cred/munge
StateSaveLocation=$W/state
SlurmdSpoolDir=$W/spool/%n
SlurmctldPidFile=$W/run/slurmctld.pid
SlurmdPidFile=$W/run/slurmd.%n.pid
SlurmctldLogFile=$W/log/slurmctld.log
SlurmdLogFile=$W/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/$track
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$W/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
EnforcePartLimits=ALL
KillWait=${KILLWAIT:-5}
MessageTimeout=20
SlurmdTimeout=${NODE_TIMEOUT:-20}
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=DEFAULT CPUs=${CPUS:-8} RealMemory=${MEM:-4000} State=UNKNOWN$( [ "$gpu" = 0 ] || echo " Gres=gpu:$gpu")
CONF
  for ((i = 1; i <= n; i++)); do
    echo "NodeName=n$i NodeAddr=$NET.$((10 + i))" >>"$W/etc/slurm.conf"
  done
  cat >>"$W/etc/slurm.conf" <<CONF
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE:-20}
CONF
  printf '%s\n' CgroupPlugin=cgroup/v1 CgroupMountpoint=/sys/fs/cgroup CgroupAutomount=no \
    >"$W/etc/cgroup.conf"
  if [ "$gpu" != 0 ]; then                        # fake GPUs: slurmd wants device files, never opens them
    for ((i = 0; i < gpu; i++)); do [ -c "$W/dev/gpu$i" ] || mknod "$W/dev/gpu$i" c 195 "$i"; done
    echo "NodeName=n[1-$n] Name=gpu File=$W/dev/gpu[0-$((gpu - 1))]" >"$W/etc/gres.conf"
  else : >"$W/etc/gres.conf"; fi
  [ -z "${EXTRA_CONF:-}" ] || cat "$EXTRA_CONF" >>"$W/etc/slurm.conf"
}

# ---- inside the outer namespaces -------------------------------------------------------------
node_up() {                                       # on head: node_up NAME
  local name=$1 i=${1#n} pid t
  mkdir -p "$W/spool/$name"
  if pid=$(cat "$W/run/node.$name.pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null; then return 0; fi
  unshare --fork --pid --mount --net --uts --mount-proc --kill-child=KILL -- \
    bash "$SELF" __node "$W" "$name" </dev/null >>"$W/log/node.$name.log" 2>&1 &
  pid=$!
  echo "$pid" >"$W/run/node.$name.pid"            # pid as seen on head
  for ((t = 0; t < 100; t++)); do                 # wait until it left our network namespace
    [ "$(readlink /proc/$pid/ns/net)" != "$(readlink /proc/self/ns/net)" ] && break; sleep 0.05
  done
  ip link del "v$i" 2>/dev/null || true
  ip link add "v$i" type veth peer name eth0 netns "$pid"
  ip link set "v$i" master br0 up
}

do_head() {                                       # pid 1 of the outer PID namespace
  local i tag line
  hostname head
  if [ -w "$FREEZER" ]; then                      # private view: two clusters never share a cgroup
    read -r tag <"$W/run/cgroup"; mkdir -p "$FREEZER/$tag"; mount --bind "$FREEZER/$tag" "$FREEZER"
  fi
  mount --bind "$W/etc/hosts" /etc/hosts
  ip link set lo up
  ip link add br0 type bridge
  ip addr add "$NET.1/24" dev br0
  ip link set br0 up
  munged --socket="$W/munge/sock" --key-file="$W/key/munge.key" --log-file="$W/munge/log" \
    --pid-file="$W/munge/pid" --seed-file="$W/munge/seed" --force
  slurmctld -c -f "$SLURM_CONF"
  for ((i = 1; i <= ${NODES:-2}; i++)); do node_up "n$i"; done
  while read -r line <&3; do                      # control pipe: "up NAME"
    set -- $line
    [ "$1" = up ] && node_up "$2"
  done
  wait
}

do_node() {                                       # pid 1 of a node
  local name=$1 t
  hostname "$name"
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  ip link set lo up
  for ((t = 0; t < 100; t++)); do ip link show eth0 >/dev/null 2>&1 && break; sleep 0.05; done
  ip addr add "$NET.$((10 + ${name#n}))/24" dev eth0
  ip link set eth0 up
  slurmd -D -f "$SLURM_CONF" -N "$name" </dev/null &
  wait $! || true
  sleep infinity                                  # a node outlives its slurmd
}

# ---- outside ---------------------------------------------------------------------------------
head_pid() {                                      # host pid of the outer namespace's pid 1
  local u c start
  [ -s "$W/run/outer" ] || return 1
  read -r u start <"$W/run/outer"
  [ -r "/proc/$u/stat" ] && [ "$(cut -d' ' -f22 "/proc/$u/stat")" = "$start" ] || return 1
  c=$(pgrep -o -P "$u") && echo "$c"
}
in_head() {
  local p; p=$(head_pid) || die "not running: $W"
  nsenter --target "$p" --pid --mount --net --uts --wdns="$PWD" -- "$@"
}
in_node() {
  local name=$1 u c; shift
  u=$(cat "$W/run/node.$name.pid")
  c=$(in_head pgrep -o -P "$u") || die "node $name is down"
  in_head nsenter --target "$c" --pid --mount --net --uts --wdns="$PWD" -- "$@"
}
wait_idle() {
  local want=${1:-${NODES:-2}} t got
  for ((t = 0; t < ${START_TIMEOUT:-30} * 10; t++)); do
    got=$(in_head timeout 5 sinfo -h -N -p main -t idle -o %N 2>/dev/null | wc -l) || true
    [ "${got:-0}" -ge "$want" ] && return 0
    head_pid >/dev/null || break                  # a daemon refused its configuration
    sleep 0.1
  done
  tail -n 5 "$W"/log/*.log >&2 || true
  return 1
}
do_start() {
  head_pid >/dev/null 2>&1 && die "already running: $W"
  rm -rf "$W/state" "$W/spool" "$W/run" "$W/munge" "$W/log"
  write_files
  mkfifo "$W/run/ctl"
  echo "cluster.$$.$(date +%s)" >"$W/run/cgroup"
  # fd 3: control pipe, opened read-write so that it never reports end of file
  SLURM_CONF=$SLURM_CONF setsid unshare --fork --pid --mount --net --uts --mount-proc --kill-child=KILL -- \
    bash "$SELF" __head "$W" </dev/null >"$W/log/head.log" 2>&1 3<>"$W/run/ctl" &
  local u=$!
  echo "$u $(cut -d' ' -f22 /proc/$u/stat)" >"$W/run/outer"
  local t; for ((t = 0; t < 50; t++)); do head_pid >/dev/null && break; sleep 0.05; done
  wait_idle || { do_stop; die "nodes did not become idle"; }
}
do_stop() {
  local p t tag
  if p=$(head_pid); then
    kill -KILL "$p" 2>/dev/null || true           # pid 1 of the namespace: the kernel ends all of it
    for ((t = 0; t < 200; t++)); do               # it is gone (or a zombie) only after all the others
      case $(cut -d' ' -f3 "/proc/$p/stat" 2>/dev/null) in '' | Z | X) break ;; esac; sleep 0.05
    done
  fi
  rm -f "$W/run/outer"
  tag=$(cat "$W/run/cgroup" 2>/dev/null) || return 0
  if [ -d "$FREEZER/$tag" ]; then find "$FREEZER/$tag" -depth -type d -exec rmdir {} +; fi
}

case $CMD in
  install) do_install ;;
  try) do_try ;;
  start) use_work "${1:-}"; do_start ;;
  run) use_work "${1:-}"; do_start; trap do_stop EXIT; echo ready; cat >/dev/null ;;
  stop) use_work "${1:-}"; do_stop ;;
  exec) use_work "${1:-}"; shift; in_head "$@" ;;
  node) use_work "${1:-}"; shift; in_node "$@" ;;
  node-kill) use_work "${1:-}"; in_head kill -KILL "$(cat "$W/run/node.$2.pid")" ;;
  node-up) use_work "${1:-}"; echo "up $2" >"$W/run/ctl" ;;
  __head) use_work "$1"; do_head ;;
  __node) use_work "$1"; do_node "$2" ;;
  *) sed -n '2,23p' "$SELF"; exit 2 ;;
esac
