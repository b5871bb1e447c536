"""A private Slurm on this machine: one controller and two nodes, `node1` and `node2`, with a munge of their own.

    with slurm_site() as slurm:
        number = slurm.submit(script)
        slurm.wait(number, "COMPLETED")

Loopback only, free ports, everything in one temporary folder. Nothing of it outlives the test, not even one that is
killed with SIGKILL: the daemons belong to a process that ends them, their jobs and the folder when its stdin closes.
By hand: `python -m tests.helpers.slurm_site` prints what to `export`, and Ctrl-C ends it.

The nodes claim more cores and memory than the machine may have; jobs are not bound to cores.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launch.local import die_with_parent
from tests.helpers.fetched import not_here

PACKAGES = "slurmctld slurmd slurm-client munge"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
INSTALL = f"there is no Slurm here; on Debian or Ubuntu: apt-get install --no-install-recommends {PACKAGES}"
NODES = ("node1", "node2")
START_SECONDS = 60.0
SHOWN = 10_000
"""Characters of a log in a failure's message."""
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# How long a requeued job waits, too; less than 5 is not taken.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
# A node that is set down stays down; one that did not answer comes back by itself.
ReturnToService=1
KillWait=30
# Seconds that a job is remembered after its end.
MinJobAge=86400
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=16000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 RealMemory=16000
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE
PartitionName=cpu Nodes=ALL MaxTime=INFINITE
"""


def _path() -> str:
    """PATH with the folders where daemons are, which a user's may lack."""
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def require_slurm() -> None:
    """Skips the test where there is no Slurm; fails it in CI, which installs one."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        not_here(f"no {', '.join(missing)}: {INSTALL}")


class Slurm:
    """A Slurm that runs, seen by a user: `environment` is what its commands need."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, str(folder / "slurm.conf")
        self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": self.conf}

    def run(self, *command: str, text: str | None = None) -> str:
        """What the command prints; an AssertionError with its words when it fails."""
        done = subprocess.run(
            command, env=self.environment, input=text, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: str) -> int:
        """The number of the job."""
        return int(self.run("sbatch", "--parsable", text=script))

    def job(self, number: int | str) -> dict[str, str]:
        """What `scontrol show job` says; of an element of an array: `job("12_3")`."""
        text = self.run("scontrol", "show", "job", "--oneliner", str(number))
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, number: int, *states: str, timeout: float = 900.0) -> dict[str, str]:
        """The job, once it is in one of the states; an AssertionError with its log where it ends in another."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")

        def reached() -> bool:
            state = self.job(number)["JobState"]
            assert state in states or state not in ended, f"job {number} is {state}:\n{self.log(number)[-SHOWN:]}"
            return state in states

        self.until(reached, f"job {number} to be {' or '.join(states)}", timeout, lambda: self.log(number))
        return self.job(number)

    def until(
        self, holds: Callable[[], object], what: str, timeout: float = 120.0, log: Callable[[], str] = str
    ) -> None:
        """Waits until `holds`; an AssertionError with what `log` gives when that takes too long."""
        deadline = time.monotonic() + timeout
        while not holds():
            assert time.monotonic() < deadline, f"{timeout:.0f} s were not enough for {what}\n{log()[-SHOWN:]}"
            time.sleep(0.1)

    def log(self, number: int) -> str:
        """What the job has printed so far."""
        path = Path(self.job(number).get("StdOut", "/nowhere"))
        return path.read_text(errors="replace") if path.is_file() else ""


@contextmanager
def only_site() -> Iterator[None]:
    """One at a time on a machine: jobs of two sites would take the same ports, which go by job number."""
    with open(Path(tempfile.gettempdir()) / f"nano3-slurm-{os.getuid()}.lock", "w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        yield


@contextmanager
def slurm_site() -> Iterator[Slurm]:
    """A private Slurm, both nodes idle; ended and removed afterwards. Needs the programs: `require_slurm`."""
    site = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.slurm_site", "--until-stdin-closes"],
        cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert site.stdin is not None
    assert site.stdout is not None
    try:
        folder = site.stdout.readline().strip()
        assert folder, "the private Slurm did not start; its words are above"
        yield Slurm(Path(folder))
    finally:
        site.stdin.close()
        site.wait(timeout=60)


def _daemons(folder: Path) -> list[list[str]]:
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
    munged += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    return [munged, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in NODES)]


def _configure(folder: Path) -> None:
    folder.chmod(0o755)  # munge wants its socket to be reachable
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    holders = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [holder.getsockname()[1] for holder in holders]
    host, user = socket.gethostname().partition(".")[0], os.environ.get("USER") or str(os.getuid())
    text = CONFIGURATION.format(host=host, user="root" if os.getuid() == 0 else user, folder=folder, ports=ports)
    (folder / "slurm.conf").write_text(text)
    for holder in holders:
        holder.close()


def _start(slurm: Slurm) -> list[subprocess.Popen[bytes]]:
    """The daemons, when both nodes are idle."""
    processes: list[subprocess.Popen[bytes]] = []
    for command in _daemons(slurm.folder):
        with (slurm.folder / f"daemon{len(processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=slurm.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip
        processes.append(process)
        if command[0] == "munged":
            slurm.until((slurm.folder / "munge.socket").exists, "munged", START_SECONDS, lambda: _logs(slurm.folder))

    def ready() -> bool:
        dead = [process.args for process in processes if process.poll() is not None]
        assert not dead, f"{dead} ended:\n{_logs(slurm.folder)}"
        with suppress(AssertionError):
            return slurm.run("sinfo", "--noheader", "--partition=batch", "--format=%D %T").split() == ["2", "idle"]
        return False

    slurm.until(ready, "two idle nodes", START_SECONDS, lambda: _logs(slurm.folder))
    return processes


def _logs(folder: Path) -> str:
    return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-3000:]}" for log in sorted(folder.glob("*.log")))


def _stop(slurm: Slurm, processes: list[subprocess.Popen[bytes]]) -> None:
    """Kills the daemons, and every process of a job, which are known by the configuration in their environment."""
    for process in processes:
        process.kill()
        process.wait()
    while left := processes_of(slurm):  # again: one may have started another meanwhile
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def processes_of(slurm: Slurm, **variables: str) -> list[int]:
    """Processes of this Slurm that are alive, those that have all these variables in their environment; oldest first.

    By the time they began, field 22 of /proc/PID/stat: numbers begin again after the largest.
    """
    wanted = {f"{name}={value}".encode() for name, value in ({"SLURM_CONF": slurm.conf} | variables).items()}
    found: list[tuple[int, int]] = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is somebody else's
            if wanted <= set(environment.read_bytes().split(b"\0")):
                began = (environment.parent / "stat").read_text().rpartition(")")[2].split()[19]
                found.append((int(began), int(environment.parent.name)))
    return [pid for _, pid in sorted(found) if pid != os.getpid()]


def main() -> None:
    """Runs the site until stdin closes, or until Ctrl-C."""
    by_hand = "--until-stdin-closes" not in sys.argv
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a short path: a socket's name has 108 bytes
    slurm = Slurm(folder)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        _configure(folder)
        processes = _start(slurm)
        print(f"export SLURM_CONF={folder}/slurm.conf  # Ctrl-C here ends it" if by_hand else folder, flush=True)
        if by_hand:
            signal.pause()
        sys.stdin.read()
    except KeyboardInterrupt:
        pass
    finally:
        _stop(slurm, processes)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
