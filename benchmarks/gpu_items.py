"""What the items of benchmarks.on_gpu do. Each has a process of its own: python -m benchmarks.gpu_items SPEC RESULT

SPEC is a JSON object: what (a function of WORK), arguments, folder (of models and caches), quick. The result is a JSON
object, too.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

from b2diffurl.configuration.plan import make_plan
from b2diffurl.configuration.settings import read_settings
from b2diffurl.phases.sample import stage_prompts
from b2diffurl.runtime import files
from b2diffurl.runtime.device import choose_device
from b2diffurl.runtime.logs import set_up_logging
from benchmarks import gpu_models, stage
from benchmarks.gpu_plan import compiled_name
from benchmarks.network import measure_network
from benchmarks.peers import DTYPES

AT_ONCE = 4  # networks that are compiled at once
# --quick: tiny images of few steps, for any preset, all of them trained on.
QUICK = {
    "num_threads": 1,
    "pretrained.resolution": 64,
    "split_time": 2,
    "split_step_left": 2,
    "split_step_right": 2,
    "sample.num_steps": 4,
    "sample.batch_size": 2,
    "sample.num_batches_per_epoch": 1,
    "sample.micro_batch_size": 4,
    "selection.images": "all",
    "train.num_epochs": 1,
    "train.gradient_accumulation_steps": 2,
    "train.micro_batch_size": 4,
}
SAID = re.compile(r"^\W*((?:bf16|fp16|batch \d).*)$", re.MULTILINE)  # what the tests print of their measurements


@dataclass(frozen=True)
class Place:
    """Where an item works."""

    folder: Path  # of models, caches and runs
    quick: bool

    def flags(self, preset: str, settings: dict[str, Any]) -> list[str]:
        """The flags of our scripts for a preset with further settings. Builds the models, if need be."""
        model, scorer = (
            gpu_models.model_at(self.folder, name, quick=self.quick)
            for name in (gpu_models.MODELS[preset], gpu_models.SCORER)
        )
        settings = settings | (QUICK if self.quick else {})
        settings |= {"pretrained.model": model, "reward.clip.model": scorer}
        settings |= dict.fromkeys(("save_path", "log_path"), self.folder / "run")
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        return [f"--config=config/stage_process.py:{preset}", *flags]

    def config(self, preset: str, settings: dict[str, Any]) -> ConfigDict:
        return stage.resolve(self.flags(preset, settings))


def matmul(place: Place) -> dict[str, Any]:
    """The matmul peak in bfloat16, or in float32 on the CPU."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    if place.quick:
        stage.MATMUL_SIZE[device] = 256
    return {"matmul_tflops": stage.matmul_tflops(device, dtype), "dtype": str(dtype).removeprefix("torch.")}


def network(place: Place, preset: str, way: str, first_only: bool = False) -> dict[str, Any]:
    """The rows of benchmarks.network of a preset's network, compiled in one way; whether it was `warm`, compiled before."""
    warm = (place.folder / compiled_name(preset, way)).exists()
    rows = measure_network(place.config(preset, {}), way, first_only=first_only)
    if not rows:
        raise MemoryError("no size fits into the GPU's memory")
    (place.folder / compiled_name(preset, way)).touch()
    return {"rows": rows, "warm": warm}


def compile_all(place: Place, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Compile networks, several at once. Later processes read the compiler's cache.

    Returns seconds of the first passes by network and kind of pass, and why some could not be compiled. After a call that
    ended before all were compiled, the next one on this machine compiles those that are missing.
    """
    (place.folder / "logs").mkdir(exist_ok=True)
    for preset, _ in pairs:  # not several of them at once
        place.flags(preset, {})
    with ThreadPoolExecutor(1 if place.quick else AT_ONCE) as pool:
        found = pool.map(lambda pair: compile_one(place, *pair), pairs)
        return {"first_seconds": {" ".join(pair): first_seconds(one) for pair, one in zip(pairs, found, strict=True)}}


def compile_one(place: Place, preset: str, way: str) -> dict[str, Any]:
    """What `network` returns for the first passes, from a process of its own; or why it `failed`."""
    name, threads = compiled_name(preset, way), max(1, (os.cpu_count() or 1) // AT_ONCE)
    answer, arguments = place.folder / f"{name}.json", {"preset": preset, "way": way, "first_only": True}
    if answer.is_file():
        return files.read_json(answer)
    with (place.folder / "logs" / f"{name}.log").open("w") as log:
        command = command_of("network", arguments, place, answer)
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": f"{threads}"}
        # In the same group of processes, so that all of them end together.
        ended = subprocess.run(command, stdout=log, stderr=log, cwd=stage.ROOT, env=environment)
    if ended.returncode:
        return {"failed": last_words(Path(log.name).read_text(errors="replace"))}
    return files.read_json(answer)


def first_seconds(found: dict[str, Any]) -> dict[str, Any]:
    """{kind of pass and rows at once: seconds}, of what `compile_one` returned."""
    return {f"{row['kind']} {row['at_once']}": row["first_seconds"] for row in found["rows"]} if "rows" in found else found


def one_stage(place: Place, preset: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A stage of ours by three scripts, in the form of benchmarks.stage_report."""
    flags = place.flags(preset, settings)
    run, facts = stage.run_ours(flags, stage.resolve(flags), place.folder / "run")
    if not run["num_transitions"]:
        raise ValueError(f"nothing was selected of {run['num_images']} images")
    return {"run": run, "batch_sizes": facts["batch_sizes"]}


def peers(place: Place, preset: str, num_images: int, fused: bool) -> dict[str, Any]:
    """A stage in the peers' shape, on about `num_images` images of the preset's stage."""
    config = place.config(preset, {})
    plan = make_plan(config)
    sampling = plan.settings.sampling
    prompts = [one for batch in range(sampling.num_batches) for one in stage_prompts(plan, batch)]
    _, precision = choose_device(read_settings(config).compute)
    if precision not in DTYPES:
        raise ValueError(f"the peers' shape is not written for {precision}")
    facts = {
        "prompts": [prompt for prompt in prompts for _ in range(sampling.num_branches)],
        "num_trained_steps": plan.window.num_steps,
        "num_threads": config.num_threads,
        "mixed_precision": precision,
    }
    return {"run": stage.run_peers(stage.make_job(config, facts, num_images), place.folder / "run", fused=fused)}


def tests(place: Place) -> dict[str, Any]:
    """`python -m pytest -m gpu`, of the files that have such tests: others may need packages that are not here."""
    if find_spec("pytest") is None:
        raise ModuleNotFoundError("pytest is not installed: pip install -r tests/requirements.txt")
    paths = sorted(path for path in (stage.ROOT / "tests").rglob("test_*.py") if "@pytest.mark.gpu" in path.read_text())
    paths = [path for path in paths if not place.quick or path.name == "test_device.py"]
    environment = os.environ | {"SD14_DIR": str(gpu_models.model_at(place.folder, "sd14", quick=place.quick))}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-s", "-rfE", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", *map(str, paths)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=stage.ROOT, env=environment)
    print(ended.stdout, ended.stderr)
    lines = [line for line in ended.stdout.splitlines() if line.strip()]
    bad = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    summary = next((line for line in reversed(lines) if re.search(r"\bin [\d.]+s", line)), "")
    if not summary:
        raise RuntimeError(f"pytest ended with {ended.returncode}: {last_words(ended.stdout + ended.stderr)}")
    return {"summary": summary.strip("= "), "bad": bad, "said": SAID.findall(ended.stdout)}


def circumstances(place: Place) -> dict[str, Any]:
    """Hardware and versions, and whether there is a GPU."""
    hardware, versions = stage.hardware(), stage.versions()
    return {
        "hardware": hardware.get("gpu", f"{hardware['cpu']}, {hardware['cpu_cores']} cores"),
        "versions": ", ".join(
            f"{name} {versions[name]}" for name in ("python", "torch", "diffusers", "transformers", "peft")
        ),
        "cuda": torch.cuda.is_available(),
    }


WORK: dict[str, Callable[..., dict[str, Any]]] = {
    "matmul": matmul,
    "network": network,
    "compile": compile_all,
    "stage": one_stage,
    "peers": peers,
    "tests": tests,
    "circumstances": circumstances,
}


def command_of(what: str, arguments: dict[str, Any], place: Place, answer: Path) -> list[str]:
    """The command that makes an item, and writes its result into file `answer`."""
    spec = {"what": what, "arguments": arguments, "folder": str(place.folder), "quick": place.quick}
    return [sys.executable, "-m", "benchmarks.gpu_items", json.dumps(spec), str(answer)]


def last_words(text: str) -> str:
    """Why a process failed: the last line of its output that names an error, or its last line; at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b|error: ", line)]
    return (errors or lines or ["it said nothing"])[-1][:300]


def end_with(parent: int) -> None:
    """Kill this process and those it has started, once the process that started it is gone: a GPU is not ours for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    spec, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    if os.getpgrp() == os.getpid():
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    set_up_logging(None)
    folder = Path(spec["folder"])
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    files.write_json(answer, WORK[spec["what"]](Place(folder, spec["quick"]), **spec["arguments"]))


if __name__ == "__main__":
    main()
