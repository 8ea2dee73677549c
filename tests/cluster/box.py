"""A cluster in a box: hosts on this machine, each with its own network, process ids, host name and sshd.

    python -m tests.cluster.box up                     # head, node-1 and node-2 (root; Debian: openssh-server pdsh)
    python -m tests.cluster.box run head ssh node-1 hostname -I
    python -m tests.cluster.box unplug node-2          # or: plug, crash, power-off, power-on, stop-ssh, start-ssh
    python -m tests.cluster.box down

A host is a set of Linux namespaces that live as long as their first process; the hosts hang on a bridge in one more
such set, the switch. All of them see the file system of this machine, except for /run, /etc/hosts, the settings of ssh
and the start-up file of root's shell (what it does, a crash would leave half done outside the box), which are private,
so that nothing outside the box changes and boxes do not meet each other.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SWITCH = "switch"
NAMES = ("head", "node-1", "node-2")
COMMANDS = ("ip", "nsenter", "unshare", "setpriv", "/usr/sbin/sshd", "ssh-keygen", "pdsh")
# The first process of a host: it ends with the host, and no dead process stays in its list (SIGCHLD is ignored).
INIT = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); [signal.pause() for _ in iter(int, 1)]"
SSH_CONFIG = """
IdentityFile {folder}/key
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
StrictHostKeyChecking yes
LogLevel ERROR
"""
SSHD_CONFIG = """
AuthorizedKeysFile {folder}/key.pub
PasswordAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile /run/sshd.pid
MaxStartups 100
"""


@dataclass(frozen=True)
class Box:
    """A running box; `folder` (absolute) holds its keys, settings and logs, and the process ids of its hosts."""

    folder: Path
    names: tuple[str, ...] = NAMES

    def up(self, *, lasting: bool = False) -> None:
        """Start all hosts. They end with this process, however it ends, unless they are `lasting`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _quiet("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key"))
        for name in ("hosts", "known_hosts"):
            (self.folder / name).write_text("127.0.0.1 localhost\n" if name == "hosts" else "")
        for name in self.names:
            key = self.folder / f"{name}.hostkey"
            _quiet("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
            with open(self.folder / "hosts", "a") as hosts, open(self.folder / "known_hosts", "a") as known:
                hosts.write(f"{self.address(name)} {name}\n")
                known.write(f"{name},{self.address(name)} {key.with_suffix('.hostkey.pub').read_text()}")
        (self.folder / "bashrc").touch()
        (self.folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self.folder))
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        self._start(SWITCH, lasting)
        self.check(SWITCH, "ip", "link", "add", "bridge", "type", "bridge")
        self.check(SWITCH, "ip", "link", "set", "bridge", "up")
        for name in self.names:
            self.power_on(name, lasting=lasting)

    def down(self) -> None:
        """End all hosts and all that runs in them; the folder stays."""
        for name in (*self.names, SWITCH):
            self.power_off(name)

    def address(self, name: str) -> str:
        """The address of a host in the network of the box."""
        return f"10.77.0.{self.names.index(name) + 1}"

    def pid(self, name: str) -> int | None:
        """Process id, outside the box, of the first process of a host; None when it is not running."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.folder / f"{name}.pid").read_text())
            # An old file may name a process that has nothing to do with us.
            if self._title(name).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return None

    def command(self, name: str, *words: str) -> list[str]:
        """The command line that runs `words` on a host, in the current folder."""
        pid = self.pid(name)
        if pid is None:
            raise RuntimeError(f"{name} of the box {self.folder} is not running")
        return ["nsenter", f"--target={pid}", "--net", "--mount", "--uts", "--pid", f"--wd={os.getcwd()}", "--", *words]

    def check(self, name: str, *words: str) -> str:
        """Run a command on a host; returns its output, raises RuntimeError with it when the command fails."""
        return _quiet(*self.command(name, *words))

    def processes(self, name: str) -> dict[int, list[str]]:
        """Command line of every process on a host by its process id outside the box, but for the first one."""
        pid = self.pid(name)
        if pid is None:
            return {}
        namespace = os.readlink(f"/proc/{pid}/ns/pid")
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may end while we look
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
                if words and int(folder.name) != pid and os.readlink(folder / "ns" / "pid") == namespace:
                    found[int(folder.name)] = words
        return found

    # Faults

    def crash(self, name: str) -> None:
        """Kill all processes of a host; its kernel still closes their connections, so that the others hear of it."""
        kill(*self.processes(name))
        self.power_off(name)

    def power_off(self, name: str) -> None:
        """End a host like a power cut: nobody hears from it again, not even that its connections are closed."""
        pid = self.pid(name)
        if pid is None:
            return
        if name != SWITCH and self.pid(SWITCH):
            self.unplug(name)
        kill(pid)  # the kernel kills all in the namespace of a first process, and lets this one end as the last

    def power_on(self, name: str, *, lasting: bool = False) -> None:
        """Start a host that is off."""
        pid, switch = self._start(name, lasting), self.pid(SWITCH)
        with contextlib.suppress(RuntimeError):
            self.check(SWITCH, "ip", "link", "delete", name)  # the old cable, where the kernel has not tidied up yet
        # The same hardware address at each start: the others remember it.
        hardware = f"02:00:0a:4d:00:{self.names.index(name) + 1:02x}"
        cable = f"link add eth0 address {hardware} netns {pid} type veth peer name {name} netns {switch}"
        _quiet("ip", *cable.split())
        self.check(SWITCH, "ip", "link", "set", name, "master", "bridge", "up")
        script = (
            f"mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && mount --bind {self.folder}/hosts /etc/hosts && "
            f"mount --bind {self.folder}/ssh_config /etc/ssh/ssh_config && "
            f"{{ [ ! -e ~/.bashrc ] || mount --bind {self.folder}/bashrc ~/.bashrc; }} && "
            f"hostname {name} && ip link set lo up && "
            f"ip address add {self.address(name)}/24 dev eth0 && ip link set eth0 up"
        )
        self.check(name, "sh", "-c", script)
        self.start_ssh(name)

    def unplug(self, name: str) -> None:
        """Pull the network cable of a host; connections stay open and silent."""
        self.check(SWITCH, "ip", "link", "set", name, "down")

    def plug(self, name: str) -> None:
        """Put the network cable of a host back."""
        self.check(SWITCH, "ip", "link", "set", name, "up")

    def stop_ssh(self, name: str) -> None:
        """A host takes no new ssh connections; those that are open stay."""
        self.check(name, "sh", "-c", "kill $(cat /run/sshd.pid); while [ -e /run/sshd.pid ]; do sleep 0.01; done")

    def start_ssh(self, name: str) -> None:
        """A host takes ssh connections."""
        log, settings, key = (f"{self.folder}/{file}" for file in (f"{name}.log", "sshd_config", f"{name}.hostkey"))
        self.check(name, "/usr/sbin/sshd", "-E", log, "-f", settings, "-h", key)

    def _title(self, name: str) -> str:
        return f"{name}@{self.folder}"

    def _start(self, name: str, lasting: bool) -> int:
        """Start the first process of a host in namespaces of its own; returns its process id."""
        if self.pid(name):
            raise RuntimeError(f"{name} of the box {self.folder} is running already")
        words = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        words += [sys.executable, "-S", "-c", INIT, self._title(name)]
        # Its parent outside must not be a child of this process that nobody waits for.
        before = [] if lasting else ["setpriv", "--pdeathsig", "KILL"]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        outside = subprocess.Popen([*before, *words], start_new_session=True, **quiet)
        children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and outside.poll() is None:
            for pid in map(int, children.read_text().split()):
                (self.folder / f"{name}.pid").write_text(str(pid))
                if self.pid(name) and Path(f"/proc/{pid}/comm").read_text().startswith("python"):
                    return pid
            time.sleep(0.01)
        raise RuntimeError(f"the namespaces of {name} could not be made (are we root?)")


def kill(*pids: int) -> None:
    """Kill processes and wait until the kernel has closed all that they had open."""
    dying = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            dying.append(os.pidfd_open(pid))
            signal.pidfd_send_signal(dying[-1], signal.SIGKILL)
    for process in dying:
        ended, _, _ = select.select([process], [], [], 30)
        os.close(process)
        if not ended:
            raise RuntimeError("a process that was killed does not end")


def default_folder() -> Path:
    """Where the command line keeps its box."""
    return Path(os.environ.get("MMTRAIN_BOX", f"{tempfile.gettempdir()}/mmtrain-box")).absolute()


def missing() -> str:
    """What this machine lacks for a box, as a reason; empty when nothing."""
    if os.geteuid():
        return "a cluster in a box needs root"
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    return f"a cluster in a box needs {', '.join(absent)} (Debian: openssh-server pdsh)" if absent else ""


def _quiet(*words: str) -> str:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def main(words: list[str]) -> int:
    """The command line above."""
    box = Box(default_folder())
    match words:
        case ["up"] if not missing():
            box.down()
            shutil.rmtree(box.folder, ignore_errors=True)
            box.up(lasting=True)
        case ["down"]:
            box.down()
            shutil.rmtree(box.folder, ignore_errors=True)
        case ["run", name, *command] if command:
            return subprocess.run(box.command(name, *command)).returncode
        case [("crash" | "power-off" | "power-on" | "plug" | "unplug" | "stop-ssh" | "start-ssh") as fault, name]:
            options = {"lasting": True} if fault == "power-on" else {}
            getattr(box, fault.replace("-", "_"))(name, **options)
        case _:
            print(missing() or __doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
