"""Scripts as processes of their own that start at once: forked from a server that has imported the libraries.

A child can be one of several ranks, and can meet a fault: be stopped at a chosen moment of its work.
"""

import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRELOADED = ["torch", "accelerate", "peft", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"]


@dataclass(frozen=True)
class Fault:
    """Where a child is stopped, and how.

    `moment` is what happens to a file whose path matches `path`, for the `turn`-th time: `half` (it is half written under
    its temporary name), `whole` (written, not yet renamed), `renamed` (it has just got its name), `appended` (half a line
    was added); or, without a file, `before_step` or `after_step` of the optimizer.
    """

    moment: str
    path: str = ""
    turn: int = 1
    signal: int = signal.SIGKILL


def start(
    folder: Path, argv: Sequence[str], environment: Mapping[str, str] | None = None, fault: Fault | None = None
) -> BaseProcess:
    """`argv[0]` of the project's folder, run in `folder`."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    child = server.Process(target=_child, args=(folder, list(argv), dict(environment or {}), fault))
    child.start()
    return child


def run(folder: Path, argv: Sequence[str], fault: Fault | None = None) -> int:
    """The exit code of a child."""
    child = start(folder, argv, fault=fault)
    child.join()
    return child.exitcode


def run_ranks(folder: Path, argv: Sequence[str], count: int) -> None:
    """`count` processes of one group, as torchrun starts them; each ends well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [start(folder, argv, group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]
    for child in children:
        child.join(120)
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0] * count


def _child(folder: Path, argv: list[str], environment: dict[str, str], fault: Fault | None) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(ROOT))
    sys.argv = argv
    (folder / "log").mkdir(exist_ok=True)
    output = os.open(folder / "log" / "children.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    if fault:
        _provoke(fault)
    runpy.run_path(str(ROOT / argv[0]), run_name="__main__")


def _provoke(fault: Fault) -> None:
    left = [fault.turn]

    def reached(path: str = "") -> bool:
        left[0] -= bool(re.search(fault.path, path))
        return left[0] == 0 and bool(re.search(fault.path, path))

    def stop() -> None:
        (Path.cwd() / "log" / "reached").touch()
        os.kill(os.getpid(), fault.signal)

    if fault.moment in ("before_step", "after_step"):
        import torch

        step = torch.optim.AdamW.step

        def stopped(self, *arguments, **keywords):
            now = reached()
            if now and fault.moment == "before_step":
                stop()
            result = step(self, *arguments, **keywords)
            if now and fault.moment == "after_step":
                stop()
            return result

        torch.optim.AdamW.step = stopped
    elif fault.moment == "appended":
        from b2diffurl.experiment.metrics import Metrics

        log = Metrics.log

        def cut(self, event, **values):
            now = reached(str(self.path))
            log(self, event, **values)
            if now:
                os.truncate(self.path, self.path.stat().st_size - 20)
                stop()

        Metrics.log = cut
    else:
        replace = Path.replace

        def stopped_replace(self, target):
            now = reached(str(target))
            if now and fault.moment == "half" and self.is_file():
                os.truncate(self, self.stat().st_size // 2)
            if now and fault.moment != "renamed":
                stop()
            result = replace(self, target)
            if now and fault.moment == "renamed":
                stop()
            return result

        Path.replace = stopped_replace
