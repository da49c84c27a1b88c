"""``python -m mp_lightning.meta`` in processes of its own, without waiting for the imports each time.

One process imports everything once and forks for every command: the child is a whole process, with its own folder,
streams, exit code and signals, as if it had been started from a shell.
"""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SERVER = """
import json, os, runpy, signal, sys
import torch
torch.set_num_threads(1)
import hydra, matplotlib.backends.backend_agg, mp_lightning.cli.fit, mp_lightning.meta
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        for number, name in ((0, os.devnull), (1, order["stdout"]), (2, order["stderr"])):
            file = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
            os.dup2(file, number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(order["folder"])
        sys.argv = ["mp_lightning.meta", *order["words"]]
        code = 0
        try:
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
    print(json.dumps(child), flush=True)
    _, status = os.waitpid(child, 0)
    print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
"""

# The smallest run that still goes through every stage.
TINY = [
    *("meta.steps=2", "meta.batch_size=4", "tasks.architectures=[conv4-2,resnet20-2]", "image_size=16"),
    *("evaluation.steps=2", "evaluation.seeds=1", "evaluation.samples=1", "evaluation.architecture=conv4-2"),
    "trainer.enable_progress_bar=false",
]


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
            env={**os.environ, "OMP_NUM_THREADS": "1"},
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
        assert self._server.stdin is not None and self._server.stdout is not None
        self._count += 1
        out, err = (self._scratch / f"{self._count}.{name}" for name in ("out", "err"))
        order = {"folder": str(folder), "words": list(words), "stdout": str(out), "stderr": str(err)}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        child = int(self._server.stdout.readline())
        if signal_when is not None:
            holds, which = signal_when
            deadline = time.monotonic() + 60
            while not holds() and time.monotonic() < deadline:
                time.sleep(0.005)
            os.kill(child, which)
        code = int(self._server.stdout.readline())
        return Done(code, out.read_text(), err.read_text())


@cache
def shared_command_line() -> CommandLine:
    """One for all tests."""
    commands = CommandLine(Path(tempfile.mkdtemp(prefix="command-line-")))
    atexit.register(commands.close)
    return commands
