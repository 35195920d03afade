#!/usr/bin/env bash
# A Slurm of one node on this machine, for tests/test_slurm.py:   slurm_cluster.sh start|stop FOLDER
# Installs Debian's packages where they are missing; must run as root. After `start`, use it with
# SLURM_CONF=FOLDER/slurm.conf.
set -eu
folder=$(realpath -m "$2")
conf=$folder/slurm.conf
export SLURM_CONF=$conf

stop() {
  for name in slurmd slurmctld munged; do
    if [ -f "$folder/$name.pid" ]; then kill "$(cat "$folder/$name.pid")" 2>/dev/null || true; fi
  done
}

start() {
  if ! command -v slurmctld munged >/dev/null; then
    apt-get install -y -q --no-install-recommends slurm-wlm munge
  fi
  mkdir -p "$folder"/{state,spool}
  chmod 755 "$folder"
  dd if=/dev/urandom of="$folder/munge.key" bs=1 count=1024 status=none
  chmod 600 "$folder/munge.key"
  cat >"$conf" <<CONF
ClusterName=loopback
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=2
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024))
PartitionName=debug Nodes=ALL Default=YES State=UP
CONF
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
  slurmctld
  slurmd
  for _ in $(seq 60); do
    if sinfo -h -o %T 2>/dev/null | grep -q idle; then return; fi
    sleep 0.5
  done
  echo "Slurm did not come up; see $folder/slurmctld.log and $folder/slurmd.log" >&2
  exit 1
}

"$1"
