"""``python -m mp_lightning.meta`` in processes of its own, without waiting for the imports each time.

One process imports everything once and forks for every command: the child is a whole process, with its own folder,
streams, exit code and signals, as if it had been started from a shell.
"""

import atexit
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SERVER = """
import json, os, runpy, signal, sys
import torch
torch.set_num_threads(1)
import hydra, matplotlib.backends.backend_agg, torch.utils.tensorboard, mp_lightning.cli.fit, mp_lightning.meta
for line in sys.stdin:
    order = json.loads(line)
    children = []
    for number, environment in enumerate(order["environments"]):
        child = os.fork()
        if child:
            children.append(child)
            continue
        os.setsid()
        torch.set_num_threads(1)  # makes the pool of threads anew, which does not survive a fork, before others need it
        for stream, name in ((0, os.devnull), (1, order["stdout"]), (2, order["stderr"])):
            file = os.open(name if stream == 0 else f"{name}{number}", os.O_RDWR | os.O_CREAT, 0o600)
            os.dup2(file, stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(order["folder"])
        os.environ.update(environment)
        sys.argv = ["mp_lightning.meta", *order["words"]]
        code = 0
        try:
            exec(order["first"].get(str(number), ""))
            runpy.run_module("mp_lightning.meta", run_name="__main__", alter_sys=True)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else (0 if error.code is None else 1)
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(json.dumps(children), flush=True)
    for child in children:
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
"""

# The smallest run that still goes through every stage.
TINY = [
    *("meta.steps=2", "meta.batch_size=4", "tasks.architectures=[conv4-2,resnet20-2]", "image_size=16"),
    *("evaluation.steps=2", "evaluation.seeds=1", "evaluation.samples=1", "evaluation.architecture=conv4-2"),
    "trainer.enable_progress_bar=false",
]


_LONGEST = 150.0  # seconds; less than a test may take, so that the next test finds this at rest


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    stdout: str
    stderr: str


class CommandLine:
    """Runs commands one after the other, in a folder."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Where a process ends while another asks it something, torch warns of it by chance, in lines of its own.
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )
        self._count = 0

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def __call__(
        self, folder: Path, *words: str, signal_when: tuple[Callable[[], bool], signal.Signals] | None = None
    ) -> Done:
        """Run ``python -m mp_lightning.meta WORDS`` in ``folder``; send it a signal once something holds."""
        (done,) = self.together(folder, *words, signal_when=signal_when)
        return done

    def together(
        self,
        folder: Path,
        *words: str,
        ranks: int = 1,
        first: dict[int, str] | None = None,
        signal_when: tuple[Callable[[], bool], signal.Signals] | None = None,
        signalled: int = 0,
        environments: list[dict[str, str]] | None = None,
    ) -> list[Done]:
        """Run it as that many processes of one run, as torchrun or SLURM would start them.

        Args:
            folder: where.
            words: of the command, without the number of devices.
            ranks: how many processes.
            first: by rank, Python code that its process runs before the command.
            signal_when: once the first holds, a process is sent the second.
            signalled: the rank of that process.
            environments: what tells each process its rank; None: as torchrun would on one node.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        self._count += 1
        out, err = (self._scratch / f"{self._count}.{name}" for name in ("out", "err"))
        if ranks > 1:
            words = (*words, f"trainer.devices={ranks}")
        if environments is None and ranks > 1:
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
            environments = [{**meeting, "LOCAL_RANK": str(rank), "NODE_RANK": "0"} for rank in range(ranks)]
        order = {
            **{"folder": str(folder), "words": list(words), "stdout": str(out), "stderr": str(err)},
            **{"environments": environments or [{}], "first": first or {}},
        }
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        children = json.loads(self._server.stdout.readline())
        if signal_when is not None:
            holds, which = signal_when
            deadline = time.monotonic() + 60
            while not holds() and time.monotonic() < deadline:
                time.sleep(0.005)
            os.kill(children[signalled], which)
        # Whoever waits forever must not keep the other tests waiting.
        end = threading.Timer(_LONGEST, lambda: [os.kill(child, signal.SIGKILL) for child in children])
        end.start()
        codes = [int(self._server.stdout.readline()) for _ in children]
        end.cancel()
        return [
            Done(code, Path(f"{out}{rank}").read_text(), Path(f"{err}{rank}").read_text())
            for rank, code in enumerate(codes)
        ]


def free_port() -> int:
    """A port that no one listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@cache
def shared_command_line() -> CommandLine:
    """One for all tests."""
    commands = CommandLine(Path(tempfile.mkdtemp(prefix="command-line-")))
    atexit.register(commands.close)
    return commands
