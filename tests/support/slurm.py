"""Runs a command with a real SLURM of two nodes on this machine: `python -m tests.support.slurm COMMAND`.

Two slurmd with eight GPUs each (which are /dev/null), a controller and munge run in their own namespaces. Their
addresses, host names and mounts are not visible outside, and all of them end with the command. There are also eight
large nodes, for which `sbatch --test-only` checks whether a job would fit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from omegaconf import OmegaConf

from tests.support.packages import install

ROOT = Path(__file__).parents[2]
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("node1", "node2")
GPUS = 8
LARGE = tuple(f"big{i + 1}" for i in range(8))  # as many as the largest cluster preset has; no job runs on them
_NAMESPACES = ["--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--mount-proc", "--kill-child=KILL"]

_CONF = """\
ClusterName=ci
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=17000
SrunPortRange=17100-17399
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={d}/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool/%n
SlurmctldPidFile={d}/slurmctld.pid
SlurmdPidFile={d}/slurmd.%n.pid
SlurmctldLogFile={d}/log/slurmctld.log
SlurmdLogFile={d}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={d}/log/jobcomp.txt
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
GresTypes=gpu
NodeName=DEFAULT Boards=1 SocketsPerBoard=1 ThreadsPerCore=1
NodeName=DEFAULT CPUs=16 CoresPerSocket=16 RealMemory=8000 Gres=gpu:{gpus}
NodeName=node1 NodeAddr=127.0.0.1 Port=17001
NodeName=node2 NodeAddr=127.0.0.1 Port=17002
NodeName=DEFAULT CPUs=128 CoresPerSocket=128 RealMemory=2000000 Gres=gpu:h100:{gpus}
NodeName=big[1-{large}] NodeAddr=127.0.0.1 Port=[17011-{last}]
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=node[1-2] MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node[1-2] MaxTime=60 State=UP PriorityTier=9 PreemptMode=OFF
{partitions}
"""


def main(command: list[str]) -> int:
    if not command:
        print("usage: python -m tests.support.slurm COMMAND ...", file=sys.stderr)
        return 2
    if command[0] == "--inside":
        return _inside(Path(command[1]), command[2:])
    if why := _install():
        print(f"SLURM cannot be tested here: {why}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        inner = [sys.executable, "-m", "tests.support.slurm", "--inside", folder, *command]
        return subprocess.call(["unshare", *_NAMESPACES, *inner], cwd=ROOT)


def _install() -> str:
    """Install the packages that are missing. Returns why SLURM cannot run here, or an empty string."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces and daemons require root on Linux (in a container: docker run --privileged)"
    if why := install(("slurmctld", "slurmd", "sbatch", "munged"), PACKAGES):
        return why
    tried = subprocess.run(["unshare", *_NAMESPACES, "true"], capture_output=True, text=True, check=False)
    return f"unshare is not permitted ({tried.stderr.strip()})" if tried.returncode else ""


def _inside(folder: Path, command: list[str]) -> int:
    """Runs inside the namespaces: starts everything, waits for all nodes, runs the command."""
    for name in ("spool", "state", "log", "gpu"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "addr", "add", "127.0.0.11/8", "dev", "lo")  # with 127.0.0.1 alone getaddrinfo finds no address
    _run("hostname", "localhost")
    names = ["localhost", *NODES, *LARGE]
    (folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in names))
    _run("mount", "--bind", str(folder / "hosts"), "/etc/hosts")
    for i in range(GPUS):
        _run("mknod", "-m666", str(folder / f"gpu/nvidia{i}"), "c", "1", "3")  # SLURM requires a device file: /dev/null
    _write_conf(folder)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    os.environ["SLURM_TEST_FOLDER"] = str(folder)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "munge.seed"}
    _run("munged", f"--log-file={folder}/log/munged.log", *(f"--{key}={folder}/{file}" for key, file in files.items()))
    _run("slurmctld", "-c")
    for node in [*NODES, *LARGE]:
        _run("unshare", "--uts", "sh", "-c", f"hostname {node} && exec slurmd -N {node}")
    deadline = time.monotonic() + 120
    while _idle() < len(NODES) + len(LARGE):
        if time.monotonic() > deadline:
            print((folder / "log/slurmctld.log").read_text()[-3000:], file=sys.stderr)
            print("SLURM's nodes did not come up within 120 s", file=sys.stderr)
            return 1
        time.sleep(0.2)
    return subprocess.call(command)


def _write_conf(folder: Path) -> None:
    """Write slurm.conf with the partitions and the GPU type that the cluster presets name."""
    sites = [OmegaConf.load(path) for path in sorted((ROOT / "configs/cluster").glob("*.yaml"))]
    slurm = [site for site in (OmegaConf.select(site, "cluster.slurm") for site in sites) if site is not None]
    partitions = sorted({site.partition for site in slurm if site.get("partition")})
    big = [f"PartitionName={name} Nodes=big[1-{len(LARGE)}] MaxTime=INFINITE State=UP" for name in partitions]
    default = f"PartitionName=any Default=YES Nodes=big[1-{len(LARGE)}] MaxTime=INFINITE State=UP"
    filled = {"d": folder, "gpus": GPUS, "large": len(LARGE), "last": 17010 + len(LARGE)}
    text = _CONF.format(partitions="\n".join([default, *big]), **filled)
    (folder / "slurm.conf").write_text(text)
    lines = ["AutoDetect=off", f"NodeName=node[1-2] Name=gpu File={folder}/gpu/nvidia[0-{GPUS - 1}]"]
    lines.append(f"NodeName=big[1-{len(LARGE)}] Name=gpu Type=h100 File={folder}/gpu/nvidia[0-{GPUS - 1}]")
    (folder / "gres.conf").write_text("\n".join(lines) + "\n")


def _idle() -> int:
    try:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-t", "idle", "-o", "%n"], capture_output=True, text=True, timeout=5, check=False
        )
    except subprocess.TimeoutExpired:
        return 0
    return len(set(done.stdout.split()))


def _run(*words: str) -> None:
    subprocess.run(words, check=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
