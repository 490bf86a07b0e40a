"""A SLURM cluster of one node, for the tests: as root, without systemd, accounting or anything outside one folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")

CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits as long as a credential lives, which must be more than five seconds.
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SwitchType=switch/none
KillWait=2
OverTimeLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=3 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here; None where one can."""
    if os.geteuid() != 0:
        return "a SLURM cluster of our own needs root"
    missing = [name for name in PROGRAMS if _program(name) is None]
    return f"no SLURM here: {', '.join(missing)} missing (Debian: slurm-wlm and munge)" if missing else None


class Cluster:
    """A running cluster; commands find it by the environment variable SLURM_CONF."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "slurm.conf"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        ports = [_free_port(), _free_port()]
        self.config.write_text(
            CONFIG.format(host=host, folder=self.folder, controller_port=ports[0], node_port=ports[1])
        )
        places = {
            "socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log",
            "seed-file": "munge.seed",
        }  # fmt: skip
        self._spawn(
            "munged", "--foreground", "--force", *(f"--{flag}={self.folder / file}" for flag, file in places.items())
        )
        self.wait(lambda: (self.folder / "munge.socket").exists())
        self.start_controller()
        self._spawn("slurmd", "-D", "-f", str(self.config))
        self.wait(lambda: "idle" in self.ask("sinfo", "--noheader", "--format=%T"))

    def start_controller(self) -> None:
        self._spawn("slurmctld", "-D", "-f", str(self.config))

    def stop_controller(self) -> None:
        self._end("slurmctld")

    def stop(self) -> None:
        """Cancels what is left, and ends the daemons."""
        if self.processes.get("slurmctld"):
            self.ask("scancel", "--user=root")
            for _ in range(150):
                if not self.ask("squeue", "--noheader"):
                    break
                time.sleep(0.1)
        for name in ("slurmd", "slurmctld", "munged"):
            if name in self.processes:
                self._end(name)

    def ask(self, *command: str) -> str:
        """The standard output of a SLURM command."""
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "SLURM_CONF": str(self.config)}
        )
        return done.stdout.strip()

    def wait(self, condition, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self._last_words()
            time.sleep(0.1)

    def _spawn(self, name: str, *arguments: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen([_program(name), *arguments], stdout=log, stderr=log)

    def _end(self, name: str) -> None:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _last_words(self) -> str:
        return "\n".join(
            f"{log.name}: {line}" for log in self.folder.glob("*.log") for line in log.read_text().splitlines()[-5:]
        )


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
