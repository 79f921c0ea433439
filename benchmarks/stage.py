"""How fast is a stage, phase by phase, compared with the way other implementations run one (benchmarks.peers)?

    python -m benchmarks.stage --repeats 3                      # the small model, its default stage
    python -m benchmarks.stage --model sd14 --peer-images 80    # Stable Diffusion v1.4's architecture, random weights
    python -m benchmarks.stage --model sdxl --no-peers          # SDXL at 1024 px; sd35_medium: Stable Diffusion 3.5 at 512
    python -m benchmarks.stage --startup                        # each script from command to first useful work
    python -m benchmarks.stage --network                        # the network alone, by batch size, compiled or not;
                                                                # --compiled no blocks transformers whole: which parts

A stage runs in fresh processes, ours and the peers' in turn: the peers' are three, and ours as many as run_process.sh
takes. `--write` puts the figures into docs/results/performance.json.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from absl import flags
from ml_collections import ConfigDict, config_flags
from torch import Tensor, nn

from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.stage import Stage, hardware, versions
from b2diffurl.runtime import files
from b2diffurl.runtime.device import choose_device
from b2diffurl.runtime.logs import logger, set_up_logging
from benchmarks.network import COMPILED, measure_network
from benchmarks.peers import DTYPES, SAMPLE_BATCH, Job
from benchmarks.stage_report import TOGETHER, VERBS, Run, in_turn, markdown, network_markdown, startup_markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "performance.json"
# A model's preset with the paper's objective, which the peers have, too.
PRESETS = {"shapes": "shapes_ddpo", "sd14": "sd14", "sd14_10gb": "sd14_10gb", "sdxl": "sdxl", "sd35_medium": "sdxl"}
WITH_PEERS = ("shapes", "sd14", "sd14_10gb")  # of one text encoder; only their FLOPs are counted, too
# Settings over the preset's, which is for nft, for a stage with ratios. Its windows end before the step without noise.
SETTINGS = {"sdxl": {"train.objective": "ddpo", "train.guidance_scale": 0.0}}
SETTINGS["sd35_medium"] = SETTINGS["sdxl"] | {
    "pretrained.resolution": 512,
    "sample.eta": 0.7,
    "sample.guidance_scale": 4.5,
    "eval.deployed.scheduler": "",
}
# --quick: just enough to see that the benchmark works.
QUICK = {
    "shapes": {"sample.batch_size": 4, "sample.num_batches_per_epoch": 1, "sample.num_steps": 3, "split_time": 3},
    "sd14": {"sample.batch_size": 1, "sample.num_batches_per_epoch": 1, "sample.num_steps": 3, "split_time": 2},
}
QUICK["sd14_10gb"] = QUICK["sd14"]
QUICK = {model: settings | {"split_step_left": 2, "split_step_right": 3} for model, settings in QUICK.items()}
QUICK |= dict.fromkeys(("sdxl", "sd35_medium"), QUICK["sd14"] | {"split_step_right": 2, "pretrained.resolution": 256})
# The log line of each script that marks its first useful work.
FIRST_WORK = {"sample": "stage0 sample: S ", "select": "stage0 select: scoring ", "train": "stage0 train: training on "}
STARTUP_REPEATS = 5
MATMUL_SIZE, MATMUL_REPEATS = {"cuda": 8192, "cpu": 2048}, {"cuda": 50, "cpu": 3}


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    set_up_logging(None)
    with workplace(given.folder) as folder:
        settings = settings_of(given, folder)
        what, page, name = kind_of(given)
        facts = what(given, settings, folder)
    text = page(facts)
    if given.write:
        name = name.format(model=given.model, device=facts["device"])
        known = files.read_json(RESULTS) if RESULTS.is_file() else {}
        files.write_json(RESULTS, known | {name: facts})
    print(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=QUICK, default="shapes")
    parser.add_argument("--batches", type=int, default=0, help="sampling batches in our stage; 0: the preset's number")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of every process; 0: what our scripts choose")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="measure the peers' shape, too")
    parser.add_argument(
        "--peer-images",
        type=int,
        default=0,
        help="images in the peers' stage, whose figures are scaled up; 0: as many as in ours",
    )
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="keys of config/stage_process.py")
    parser.add_argument("--folder", type=Path, help="where models and runs go; default: a temporary folder")
    parser.add_argument("--quick", action="store_true", help="few images, to see that it works")
    parser.add_argument("--startup", action="store_true")
    parser.add_argument("--network", action="store_true")
    parser.add_argument(
        "--compiled", nargs="*", choices=COMPILED, default=["no", "blocks"], help="ways to compile for --network"
    )
    parser.add_argument("--write", action="store_true", help="put the figures into docs/results")
    given = parser.parse_args(arguments)
    if given.model not in WITH_PEERS and (given.peers or given.network):
        parser.error(f"the peers' shape and --network are of {', '.join(WITH_PEERS)} alone: add --no-peers")
    given.command = shlex.join(["python", "-m", "benchmarks.stage", *(sys.argv[1:] if arguments is None else arguments)])
    return given


def kind_of(given: argparse.Namespace) -> tuple[Callable, Callable[[dict], str], str]:
    """(the function that measures, the function that writes the tables, the name of the entry in performance.json)."""
    if given.startup:
        return startup, startup_markdown, "startup"
    if given.network:
        return network, network_markdown, f"network ({', '.join(given.compiled)}) of {{model}} on {{device}}"
    return benchmark, markdown, "{model} on {device}"


@contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """The folder for models and runs: the given one, or a temporary one that is deleted afterwards."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
    else:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)


def settings_of(given: argparse.Namespace, folder: Path) -> list[str]:
    """The flags for our scripts. Builds the models that they name, if need be."""
    settings = {"num_threads": given.threads}
    if given.batches:
        settings["sample.num_batches_per_epoch"] = given.batches
    settings |= SETTINGS.get(given.model, {}) | (QUICK[given.model] if given.quick else {})
    settings |= dict(one.split("=", 1) for one in given.overrides)
    if given.model != "shapes":
        from benchmarks.full_size import MEASURED, build_measured
        from benchmarks.sd14 import build, build_clip

        large = given.model in MEASURED
        model = (given.model, partial(build_measured, name=given.model)) if large else ("sd14", build)
        for key, (name, builder) in {"pretrained.model": model, "reward.clip.model": ("clip", build_clip)}.items():
            if key not in settings:
                settings[key] = once(builder, folder / name)
    return [
        f"--config=config/stage_process.py:{PRESETS[given.model]}",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]


def once(builder: Callable[[Path], Path], root: Path) -> Path:
    """Build a model in folder `root` unless it is there. Returns `root`."""
    if not root.is_dir():
        # Build under another name and rename, so that a killed build is never taken for a model.
        half = root.with_name(root.name + files.TEMPORARY)
        shutil.rmtree(half, ignore_errors=True)
        elsewhere(builder, half)
        half.rename(root)
    return root


def elsewhere(function: Callable, *arguments: Any) -> Any:
    """Call a function in a fresh process and return its result, so that this process uses no GPU and little memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resolve(settings: Sequence[str]) -> ConfigDict:
    """The configuration that our scripts read from these flags."""
    values, command = flags.FlagValues(), [__file__, *settings]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    values(command)
    return values["config"].value


# --- one stage ------------------------------------------------------------------------------------


def benchmark(given: argparse.Namespace, settings: list[str], folder: Path) -> dict[str, Any]:
    """Run our stage and the peers' in turn. Returns everything that the tables need."""
    config = resolve(settings)
    runs: dict[str, list[Run]] = {}
    for shape in in_turn(["ours", "peers", "fused"] if given.peers else ["ours"], given.repeats):
        logger.info("a stage: %s", shape)
        if shape == "ours":
            run, facts = run_ours(settings, config, folder / "ours")
            job = make_job(config, facts, given.peer_images)
        else:
            run = run_peers(job, folder / shape, fused=shape == "fused")
        if not run["num_transitions"]:
            raise ValueError(f"nothing was selected of {run['num_images']} images ({shape}); take more")
        runs.setdefault(shape, []).append(run)
        files.write_json(folder / "runs.json", runs)  # so that a benchmark that is stopped leaves its figures
    device = torch.device(facts["device"]).type
    counted = config.to_dict() if given.model in WITH_PEERS else None
    machine = elsewhere(measure_machine, counted, facts["mixed_precision"], facts["num_threads"], device)
    return described(given, facts) | {"machine": machine, "runs": runs, "settings": settings[1:]}


def described(given: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    """Command, date, hardware, versions and precision, from a manifest (`facts`)."""
    hardware, versions = facts["hardware"], facts["versions"]
    return {
        "command": given.command,
        "date": str(date.today()),
        "hardware": hardware.get("gpu", f"{hardware['cpu']}, {hardware['cpu_cores']} cores"),
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "diffusers", "peft")),
        "device": torch.device(facts.get("device", "cpu")).type,
        "threads": facts.get("num_threads"),
        "precision": {"no": "float32"}.get(facts.get("mixed_precision"), facts.get("mixed_precision")),
    }


def run_ours(settings: list[str], config: ConfigDict, root: Path) -> tuple[Run, dict[str, Any]]:
    """Run a stage as run_process.sh would. Returns the run, and sample.json with the stage's `prompts`. Deletes its files.

    On the CPU it is one process, on a GPU each phase has one of its own.
    """
    shutil.rmtree(root, ignore_errors=True)
    flags = [*settings, f"--config.save_path={root}", f"--config.log_path={root}"]
    if choose_device(read_settings(config).compute)[0]:
        processes = {verb: run_process([f"run_{verb}.py", *flags]) for verb in VERBS}
    else:
        processes = {TOGETHER: run_process(["-m", "benchmarks.one_process", *flags])}
    stage = Stage(root / config.exp_name, 0)
    manifests = {verb: stage.manifest(verb) for verb in VERBS}
    facts = manifests["sample"] | {"prompts": files.read_json(stage.prompts)}
    shutil.rmtree(root)
    return summarise(processes, manifests, facts["num_evaluations"], cuda=facts["device"] != "cpu"), facts


def make_job(config: ConfigDict, facts: dict[str, Any], num_images: int) -> Job:
    """The peers' job: the same stage, on about `num_images` images of it (0: all), in whole batches."""
    prompts = facts["prompts"][:: config.split_time]
    if num_images:
        per_batch = SAMPLE_BATCH * config.split_time
        prompts = prompts[: max(1, round(num_images / per_batch)) * SAMPLE_BATCH]
    same = {key: facts[key] for key in ("num_trained_steps", "num_threads", "mixed_precision")}
    return Job(config.to_dict(), prompts, fused=False, **same)


def run_peers(job: Job, root: Path, *, fused: bool) -> Run:
    """Run a stage in the peers' shape and delete its files."""
    shutil.rmtree(root, ignore_errors=True)
    files.write_json(root / "job.json", asdict(job) | {"fused": fused})
    (root / "images").mkdir()
    processes = {verb: run_process(["-m", "benchmarks.peers", verb, str(root)]) for verb in VERBS}
    manifests = {verb: files.read_json(root / f"{verb}.json") for verb in VERBS}
    shutil.rmtree(root)
    prefix = job.config["sample"]["num_steps"] - job.num_trained_steps
    num_evaluations = len(job.prompts) * prefix + manifests["sample"]["num_images"] * job.num_trained_steps
    return summarise(processes, manifests, num_evaluations, cuda=job.device.type == "cuda")


@dataclass(frozen=True)
class Ended:
    """What a finished process used."""

    seconds: float  # until its end, or until the line that was waited for
    peak_bytes: int  # of main memory
    written_bytes: int  # to files and pipes
    cpu_seconds: float = 0.0


def run_process(arguments: Sequence[str], *, until: str = "") -> Ended:
    """Run Python with `arguments` in the project's folder. With `until`, kill it as soon as it prints a line with that text.

    A RuntimeError if it fails, or ends without that line.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    started, lines, arrived = time.perf_counter(), [], None
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT, "env": environment}
    process = subprocess.Popen([sys.executable, *arguments], **how)
    for line in process.stdout:
        lines.append(line)
        if until and until in line and arrived is None:
            arrived = time.perf_counter()
            process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # WNOWAIT keeps /proc/<pid> for bytes_written
    ended = arrived or time.perf_counter()
    written = bytes_written(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if (arrived is None) if until else process.returncode:
        raise RuntimeError(f"{shlex.join(map(str, arguments))} ended with {process.returncode}:\n{''.join(lines[-20:])}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Ended(ended - started, peak, written, usage.ru_utime + usage.ru_stime)


def bytes_written(pid: int) -> int:
    """Bytes that a process passed to write calls, rewriting counted again; 0 if the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return int(dict(line.split(": ") for line in lines)["wchar"])


def summarise(processes: dict[str, Ended], manifests: dict[str, dict], num_evaluations: int, *, cuda: bool) -> Run:
    """The three processes as one Run of benchmarks.stage_report."""
    return {
        "wall": {verb: ended.seconds for verb, ended in processes.items()},
        "seconds": {verb: manifest["seconds"] for verb, manifest in manifests.items()},
        "peak_bytes": {verb: ended.peak_bytes for verb, ended in processes.items()},
        "device_bytes": {verb: manifest.get("peak_memory_bytes", 0) for verb, manifest in manifests.items() if cuda},
        "written_bytes": {verb: ended.written_bytes for verb, ended in processes.items()},
        "num_images": manifests["sample"]["num_images"],
        "num_evaluations": num_evaluations,
        "num_transitions": manifests["train"]["num_transitions"],
        "first_log_ratio": manifests["train"].get("max_abs_log_ratio_first_update"),
    }


# --- the machine ----------------------------------------------------------------------------------


def measure_machine(config: dict[str, Any] | None, precision: str, num_threads: int, device: str) -> dict[str, float]:
    """Measure the matmul peak in TFLOP/s, and count the FLOPs of a guided evaluation and of a trained transition.

    They are those of the Stable Diffusion of `config`; with None they are not counted.
    """
    torch.set_num_threads(num_threads)
    peak = matmul_tflops(device, DTYPES[precision])
    if config is None:
        return {"matmul_tflops": peak}
    root = Path(config["pretrained"]["model"])
    rows = 1 if config["sample"]["guidance_scale"] == 1 else 2
    num_tokens = files.read_json(root / "text_encoder" / "config.json")["max_position_embeddings"]
    unet = files.read_json(root / "unet" / "config.json")
    unet["sample_size"] = config["pretrained"]["resolution"] // 8 or unet["sample_size"]
    evaluation, transition = unet_flops(unet, rows, num_tokens, config["train"]["lora_rank"])
    return {"matmul_tflops": peak, "evaluation_flops": evaluation, "transition_flops": transition}


def unet_flops(config: dict[str, Any], rows: int, num_tokens: int, lora_rank: int) -> tuple[int, int]:
    """(FLOPs of a forward pass of `rows` latents, FLOPs of forward and backward with frozen weights and a LoRA).

    On the meta device: shapes are followed, nothing is computed.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from peft import LoraConfig

    from benchmarks.peers import LORA_TARGETS

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config).requires_grad_(False)
        unet.add_adapter(LoraConfig(r=lora_rank, target_modules=LORA_TARGETS))
        unet.set_attn_processor(AttnProcessor())
        latents = torch.empty(rows, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        embeds = torch.empty(rows, num_tokens, unet.config.cross_attention_dim)
        return count_flops(unet, lambda: unet(latents, 1, embeds, return_dict=False)[0])


def count_flops(network: nn.Module, forward: Callable[[], Tensor]) -> tuple[int, int]:
    """(FLOPs of a forward pass without gradient, FLOPs of a forward pass and the backward pass to the trained weights)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as alone:
        forward()
    with FlopCounterMode(display=False) as both:
        forward().sum().backward()
    network.zero_grad()
    return alone.get_total_flops(), both.get_total_flops()


def matmul_tflops(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product: the fastest of five tries, after one to warm up."""
    size, repeats = MATMUL_SIZE[device], MATMUL_REPEATS[device]
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def go() -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            one @ other
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    go()  # warms up
    return 2 * size**3 * repeats / min(go() for _ in range(5)) / 1e12


def network(given: argparse.Namespace, settings: list[str], folder: Path) -> dict[str, Any]:
    """Measure the network alone. Each way to compile runs in a process of its own, and its rows are logged at once."""
    config = resolve(settings)
    cuda, precision = choose_device(read_settings(config).compute)
    device, threads = "cuda" if cuda else "cpu", given.threads or torch.get_num_threads()
    facts = {
        "device": device,
        "mixed_precision": precision,
        "num_threads": threads,
        "hardware": hardware(),
        "versions": versions(),
    }
    machine = elsewhere(measure_machine, config.to_dict(), precision, threads, device)
    rows = []
    for way in given.compiled:
        rows += elsewhere(measure_network, config, way)
        logger.info("network, compiled: %s: %s", way, [row for row in rows if row["compiled"] == way])
    return described(given, facts) | {"machine": machine, "rows": rows}


# --- start-up -------------------------------------------------------------------------------------


def startup(given: argparse.Namespace, settings: list[str], folder: Path) -> dict[str, Any]:
    """Measure the seconds from command to first useful work of each script, in turn with `import torch`.

    Every script gets a stage in which the phases before it are done.
    """
    exp_name = resolve(settings).exp_name
    roots = {verb: folder / f"before_{verb}" for verb in VERBS}  # the experiment as each script finds it

    def command(verb: str, root: Path) -> list[str]:
        return [f"run_{verb}.py", *settings, f"--config.save_path={root}", f"--config.log_path={root}"]

    for root in roots.values():
        shutil.rmtree(root, ignore_errors=True)
    run_process(command("sample", roots["select"]))
    shutil.copytree(roots["select"], roots["train"])
    run_process(command("select", roots["train"]))
    facts = Stage(roots["train"] / exp_name, 0).manifest("sample")
    seconds: dict[str, list[float]] = {}
    for name in in_turn(["import torch", *VERBS], STARTUP_REPEATS):
        if name == "sample":
            shutil.rmtree(roots["sample"], ignore_errors=True)
        if name == "import torch":
            ended = run_process(["-c", "import torch"])
        else:
            ended = run_process(command(name, roots[name]), until=FIRST_WORK[name])
        seconds.setdefault(name, []).append(ended.seconds)
    for root in roots.values():
        shutil.rmtree(root)
    return described(given, facts) | {"seconds": seconds}


if __name__ == "__main__":
    main()
