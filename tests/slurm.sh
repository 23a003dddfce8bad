#!/usr/bin/env bash
# A real, throw-away Slurm with one node on this machine, in a folder of its own; nothing under /etc is read or changed.
#
#   slurm.sh up FOLDER      prints the SLURM_CONF to use         slurm.sh down FOLDER
#
# Needs slurmctld, slurmd and munged (Debian: slurm-wlm munge). GPUs, cores and memory are declared, neither real nor
# enforced. `down` ends only processes that carry SLURM_TEST=FOLDER in their environment.
set -euo pipefail
verb=$1
state=$(realpath -m "$2")
PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$state/slurm.conf

ours() { [ -r "/proc/$1/environ" ] && tr '\0' '\n' 2>/dev/null <"/proc/$1/environ" | grep -qxF "SLURM_TEST=$state"; }

down() {
  if timeout 5 scontrol ping 2>/dev/null | grep -q 'is UP'; then # jobs outlive slurmd
    timeout 10 squeue -h -o %A | sort -u | xargs -r timeout 10 scancel --full --signal=KILL || true
  fi
  local signal file
  for signal in TERM KILL; do
    for file in /proc/[0-9]*; do
      if ours "${file#/proc/}"; then kill -s "$signal" "${file#/proc/}" 2>/dev/null || true; fi
    done
    sleep 1
  done
}
if [ "$verb" = down ]; then down; exit; fi

# The daemons listen on what this machine's name resolves to; munge's random key keeps strangers out.
address=$(getent ahostsv4 "$(hostname)" | awk 'NR == 1 { print $1 }')
case $address in 127.*) ;; *) address=127.0.0.1 ;; esac
mkdir -p "$state"/{ctld,spool,dev}
port=17800
while (exec 3<>"/dev/tcp/$address/$port") 2>/dev/null; do port=$((port + 200)); done
devices=() # a GPU needs a character device to be numbered; nothing opens it
for number in 0 1 2 3; do
  mknod "$state/dev/gpu$number" c 1 3 2>/dev/null && devices+=("$state/dev/gpu$number")
done
[ ${#devices[@]} = 4 ] || devices=(/dev/null /dev/zero /dev/full /dev/random) # where mknod is not allowed
(IFS=, && printf 'AutoDetect=off\nName=gpu File=%s\n' "${devices[*]}") >"$state/gres.conf"
: >"$state/plugstack.conf"
if [ "$(slurmctld -V | sed 's/^slurm[^0-9]*//; s/\..*//')" -ge 23 ]; then echo CgroupPlugin=disabled >"$state/cgroup.conf"; fi
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=localhost($address)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
SlurmctldPort=$port
SrunPortRange=$((port + 100))-$((port + 199))
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired, by default for 120 s.
AuthInfo=socket=$state/munge.socket,cred_expire=6
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/spool
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
PlugStackConfig=$state/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
JobRequeue=1
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=localhost NodeHostname=$(hostname -s) NodeAddr=$address Port=$((port + 10)) CoresPerSocket=64 RealMemory=1000000 Gres=gpu:4
PartitionName=defq Nodes=ALL Default=YES MaxTime=2-00:00:00 State=UP
CONF

start() { # NAME COMMAND...
  local log=$state/$1.out
  shift
  SLURM_TEST=$state setsid nohup "$@" </dev/null >>"$log" 2>&1 &
}
wait_for() {
  local end=$((SECONDS + 120))
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || { echo "not ready after 120 s: $*" >&2; tail -n 15 "$state"/*.log "$state"/*.out >&2; down; exit 1; }
    sleep 0.1
  done
}
(umask 077 && head -c 128 /dev/urandom >"$state/munge.key")
# --force: the folder may be below one that others cannot enter, such as pytest's.
start munged munged --foreground --force --key-file="$state/munge.key" --socket="$state/munge.socket" \
  --pid-file="$state/munged.pid" --seed-file="$state/munge.seed" --log-file="$state/munged.log" --num-threads=2
wait_for munge --socket="$state/munge.socket" -n -o /dev/null
start slurmctld slurmctld -D -c -f "$SLURM_CONF"
start slurmd slurmd -D -N localhost -f "$SLURM_CONF"
wait_for sh -c 'sinfo -h -o %T | grep -qx idle'
echo "$SLURM_CONF"
