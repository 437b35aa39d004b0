"""A private Slurm of two nodes on this machine, in a folder of its own: munge, one controller, two node daemons."""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from tests.support import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
# Slurm starts a requeued job only after this delay.
_REQUEUE_SECONDS = 120
# Debian installs daemons in folders that are not on the PATH of a plain user.
SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={controller_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,sched_interval=5
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
KillWait=15
InactiveLimit=0
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


class Cluster:
    """A cluster that runs between `start()` and `stop()`, and leaves no process behind."""

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        self.environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCHED}
        self.environment.pop("CUDA_VISIBLE_DEVICES", None)
        self._cpus = cpus
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle."""
        self._configure()
        self._start("munged", *self._munge_words())
        _wait("munge", lambda: (self.folder / "munge.socket").exists())
        self._start("slurmctld", "slurmctld", "-D", "-i")
        for node in ("n1", "n2"):
            self.start_node(node)
        _wait("the nodes", lambda: self.nodes() == {"n1": "idle", "n2": "idle"})

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill the daemon of a node and the ranks on it; the daemon of the job step stays and reports them."""
        for process in [*self._started_by(node), self._daemons[node].pid]:
            _signal(process, signal.SIGKILL)
        self._daemons.pop(node).wait()

    def stop(self) -> None:
        """End all jobs, then all daemons."""
        self.run("scancel", "--user", getpass.getuser(), "--signal=KILL", "--full", check=False)
        self.run("scancel", "--user", getpass.getuser(), check=False)
        time.sleep(1)
        leftover = [p for p in self._started_by(None) if p not in {d.pid for d in self._daemons.values()}]
        for name in reversed(list(self._daemons)):
            self._daemons[name].terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in leftover:
            _signal(process, signal.SIGKILL)

    def run(self, *words: str, check: bool = True, more: dict[str, str] | None = None) -> str:
        """Run a command in the cluster's environment, with `more` variables, and return its output."""
        done = subprocess.run(
            words, env=self.environment | (more or {}), capture_output=True, text=True, timeout=600, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout.strip()

    def nodes(self) -> dict[str, str]:
        """Return the state of each node."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T", check=False)
        return dict(line.split() for line in lines.splitlines())

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of a job, such as JobState, Restarts and ExitCode."""
        text = self.run("scontrol", "--oneliner", "show", "job", job, check=False)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def state(self, job: str) -> str:
        """Return the state of a job, such as PENDING or COMPLETED."""
        return self.job(job).get("JobState", "")

    def start_now(self, job: str) -> None:
        """Make a requeued job start a few seconds later instead of after two minutes.

        It must not start at once: a node refuses a credential from the second in which it revoked
        the previous attempt.
        """
        found = self.job(job)
        if found.get("JobState") != "PENDING" or found.get("Reason") != "BeginTime":
            return
        left = datetime.fromisoformat(found["StartTime"]) - datetime.now()
        if left.total_seconds() < _REQUEUE_SECONDS - 5:
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def wait(self, job: str, seconds: float = 600) -> dict[str, str]:
        """Wait for the end of a job and of all its attempts, and return its fields."""
        unfinished = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED", "")
        deadline = time.monotonic() + seconds
        while self.state(job) in unfinished:
            if time.monotonic() > deadline:
                raise AssertionError(f"job {job} did not end: {self.job(job)}")
            self.start_now(job)
            time.sleep(1)
        return self.job(job)

    def _configure(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("state", "spool.n1", "spool.n2"):
            (self.folder / name).mkdir(exist_ok=True)
        first, *others = free_ports(3)
        text = CONFIGURATION.format(
            host=socket.gethostname(),
            user=getpass.getuser(),
            folder=self.folder,
            cpus=self._cpus,
            controller_port=first,
            node_ports=f"[{','.join(map(str, others))}]",
        )
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

    def _munge_words(self) -> list[str]:
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={self.folder}/munge.{suffix}" for option, suffix in names.items()]
        # --force: munged otherwise refuses a folder below /tmp, which everybody may write to.
        return ["munged", "--foreground", "--force", "--num-threads=2", *files]

    def _start(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.console").open("ab") as console:
            self._daemons[name] = subprocess.Popen(
                words, env=self.environment, stdout=console, stderr=console, stdin=subprocess.DEVNULL
            )

    def _started_by(self, node: str | None) -> list[int]:
        """Return the processes that `node` has started, or all processes of the cluster for None."""
        import psutil  # type: ignore[import-untyped]

        found: list[int] = []
        for process in psutil.process_iter(["environ"]):
            environment = process.info["environ"] or {}
            ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"] and process.pid != os.getpid()
            if ours and node in (None, environment.get("SLURMD_NODENAME")):
                found.append(process.pid)
        return found


def missing_programs() -> list[str]:
    """Return the programs for a private Slurm that this machine does not have."""
    return [program for program in PROGRAMS if shutil.which(program, path=SEARCHED) is None]


def _signal(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def _wait(what: str, ready: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not ready after {seconds:.0f} s")
        time.sleep(0.2)
