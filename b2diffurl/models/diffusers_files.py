"""A diffusers pipeline on disk: finding, reading and writing its files.

A pipeline is a directory with a folder for each part (network, VAE, text encoder, tokenizer, scheduler), or a single
.safetensors file whose component configs come from another model's directory. `PipelineSpec` says what differs between
families.
"""

import glob
import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.runtime import files
from b2diffurl.runtime.hub import checksum, find_local, locate

SCHEDULER_FILE = Path("scheduler", "scheduler_config.json")  # in a model directory


@dataclass(frozen=True)
class PipelineSpec:
    """What a family's pipelines consist of."""

    pipeline: str  # its class in diffusers
    network: str  # the part that is trained
    classes: Mapping[str, list[str]]  # {part: [package, class]} as in model_index.json, without the scheduler
    weights: Mapping[str, str]  # {part: weight file}, for parts that have weights; {} in it stands for the variant
    unused: tuple[str, ...]  # parts that a pipeline may have and that are not loaded, such as a safety checker

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that a model's directory must have."""
        return (*self.classes, "scheduler")


# ---- where the files are ----


def locate_base(model: ModelSettings, spec: PipelineSpec) -> Path:
    """The directory or single file of a base model. Its files are downloaded if they are not on this machine."""
    return locate(model.name, revision=model.revision, patterns=file_patterns(model.variant, spec))


def locate_configs(model: ModelSettings, spec: PipelineSpec) -> Path:
    """The directory with a base model's component configs. For a single file that is the directory of `model.config`."""
    root = locate_base(model, spec)
    if root.is_dir():
        return root
    try:
        return locate(model.config, patterns=config_patterns(spec))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"a single file needs the configs of its components (pretrained.config): {error}") from None


def file_patterns(variant: str, spec: PipelineSpec) -> list[str]:
    """What to download: configs, tokenizers, and one variant of the weights, as safetensors."""
    suffix = f".{variant}" if variant else ""
    return [*config_patterns(spec), *(f"{part}/{name.format(suffix)}" for part, name in spec.weights.items())]


def config_patterns(spec: PipelineSpec) -> list[str]:
    """Which files of a model to download for its configs: everything but weights."""
    tokenizers = [part for part in spec.classes if part not in spec.weights]
    return ["model_index.json", "README.md", "*/*.json", *(f"{part}/*" for part in tokenizers)]


def weight_files(folder: Path, variant: str) -> list[Path]:
    """A component's weight files of one variant; a FileNotFoundError if there are none."""
    # Without a variant a name with a second dot, such as model.fp16.safetensors, is another variant's file.
    pattern = f"*.{glob.escape(variant)}*.safetensors" if variant else "*.safetensors"
    weights = sorted(path for path in folder.glob(pattern) if variant or path.name.count(".") == 1)
    if not weights:
        raise FileNotFoundError(f"{folder} has no {pattern}. Weights must be safetensors; see pretrained.variant.")
    return weights


def fingerprint(model: ModelSettings, spec: PipelineSpec) -> str:
    """SHA-256 of the network's weights: of their file (a single-file model's only file), or of several files' digests."""
    root = locate_base(model, spec)
    weights = [root] if root.is_file() else weight_files(root / spec.network, model.variant)
    digests = [checksum(path) for path in weights]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def find_here(model: ModelSettings, spec: PipelineSpec) -> tuple[list[Path], dict[str, dict]] | None:
    """(the network's weight files, {part: its config.json}); None if they are not all on this machine.

    Downloads nothing. Parts without weights have no config here.
    """
    probe = f"{spec.network}/config.json"  # the hub's cache is asked for a file, not for a model
    root = find_local(model.name, probe, revision=model.revision)
    single = root is not None and root.is_file()
    configs = find_local(model.config, probe) if single else root
    if configs is None:
        return None
    weights = [root] if single else sorted((configs / spec.network).glob("*.safetensors"))
    paths = {part: configs / part / "config.json" for part in spec.weights}
    if not weights or not all(path.is_file() for path in paths.values()):
        return None
    return weights, {part: files.read_json(path) for part, path in paths.items()}


# ---- loading ----


def load_parts(
    model: ModelSettings, spec: PipelineSpec, dtype: torch.dtype, *, decoder: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a pipeline: ({part: object}, the scheduler's config). Without `decoder` the network is the only part."""
    root = locate_base(model, spec)
    wanted = list(spec.classes) if decoder else [spec.network]
    if root.is_dir():
        return load_directory(root, model.variant, spec, dtype, wanted), files.read_json(root / SCHEDULER_FILE)
    if root.suffix != ".safetensors":
        raise ValueError(f"{root} is not a .safetensors file. Convert it first; pickled weights are never loaded.")
    configs = locate_configs(model, spec)
    return load_single_file(root, configs, spec, dtype, wanted), files.read_json(configs / SCHEDULER_FILE)


def load_directory(
    root: Path, variant: str, spec: PipelineSpec, dtype: torch.dtype, wanted: Sequence[str]
) -> dict[str, Any]:
    """Load the `wanted` parts from a directory in the diffusers layout.

    The classes are the family's: its JSON files may name others, even code of their own, and are not asked.
    """
    # Said here: diffusers would say that some file of some part is missing.
    missing = [name for name in spec.folders if name in (*wanted, "scheduler") and not (root / name).is_dir()]
    if missing:
        raise FileNotFoundError(f"{root} has no {missing[0]}/. A model directory holds {', '.join(spec.folders)}.")
    for name in spec.weights:
        if name in wanted:
            weight_files(root / name, variant)  # raises if there are none, before gigabytes of another part are read
    options = {"variant": variant or None, "use_safetensors": True, "dtype": dtype}  # use_safetensors: never a pickle
    parts = {}
    for name in wanted:
        package, kind = spec.classes[name]
        loader = getattr(importlib.import_module(package), kind)
        parts[name] = loader.from_pretrained(root, subfolder=name, **(options if name in spec.weights else {}))
    return parts


def load_single_file(
    root: Path, configs: Path, spec: PipelineSpec, dtype: torch.dtype, wanted: Sequence[str]
) -> dict[str, Any]:
    """Load the `wanted` parts from one .safetensors file, with the component configs in directory `configs`."""
    import diffusers

    check_index(configs / "model_index.json", spec)
    # A part that is given as None is not loaded.
    left_out = dict.fromkeys([*spec.unused, *(name for name in spec.classes if name not in wanted)])
    pipeline = getattr(diffusers, spec.pipeline).from_single_file(
        str(root), config=str(configs), dtype=dtype, local_files_only=True, **left_out
    )
    return {name: getattr(pipeline, name) for name in wanted}


def check_index(path: Path, spec: PipelineSpec) -> None:
    """Refuse a model_index.json with other classes than the family's, because diffusers imports whatever it names."""
    index = files.read_json(path)
    for name, allowed in spec.classes.items():
        if index.get(name) != allowed:
            raise ValueError(f"{path} names {index.get(name)} as its {name}; it must be {allowed}, and no other code is run")
    if index.get("scheduler", [""])[0] != "diffusers":
        raise ValueError(f"{path} names {index.get('scheduler')} as its scheduler; it must be one of diffusers")


# ---- the scheduler ----


def check_unclipped(scheduler: Mapping[str, Any], model: str) -> None:
    """Refuse a DDIM scheduler that clips latents: a step would not be the Gaussian of which log-probabilities are taken."""
    for key in ("clip_sample", "thresholding"):
        if scheduler.get(key, key == "clip_sample"):  # diffusers' default is on for clip_sample, off for thresholding
            state = "on" if key in scheduler else "not given, and on by DDIM's default"
            raise ValueError(
                f"{key} is {state} in the scheduler of {model}; latents must not be clipped. "
                f'Put "{key}": false into its scheduler/scheduler_config.json.'
            )


def read_scheduler(path: Path) -> Any:
    """The diffusers scheduler that a scheduler_config.json describes; a ValueError if it names another kind of class."""
    import diffusers

    config = files.read_json(path)
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise ValueError(f"{path} names the class {config.get('_class_name')!r}, which is not a scheduler of diffusers")
    return kind.from_config(config)


# ---- writing ----


def write_pipeline(folder: Path, parts: Mapping[str, Any], model: ModelSettings, spec: PipelineSpec, **more: Any) -> None:
    """Write `parts`, and the scheduler of `model`, as a directory in the diffusers layout.

    `more` are further arguments of the pipeline's class. The files name no path of this machine. They are those of the hub's
    models, so that transformers 4 and other programs read them.
    """
    import diffusers
    import transformers

    scheduler = read_scheduler(locate_configs(model, spec) / SCHEDULER_FILE)
    transformers.utils.logging.set_verbosity_error()  # importing the pipeline warns of a torchvision that it does not need
    # Not by from_pretrained: it runs the classes that model_index.json names, and a file of code beside it.
    pipeline = getattr(diffusers, spec.pipeline)(**parts, scheduler=scheduler, **dict.fromkeys(spec.unused), **more)
    for part in (pipeline, *(parts[name] for name, (package, _) in spec.classes.items() if package == "diffusers")):
        part.register_to_config(_name_or_path="")  # diffusers records the path that it loaded from
    with files.naming(folder):
        pipeline.save_pretrained(folder)
    for name, (_, kind) in spec.classes.items():
        if kind == "CLIPTextModel":
            name_as_the_hub(folder / name / "model.safetensors")
        if kind == "CLIPTokenizer":  # transformers 5 writes tokenizer.json alone, of which version 4 reads no words
            parts[name].backend_tokenizer.model.save(str(folder / name))  # vocab.json and merges.txt
    for path in folder.glob("*/*.safetensors"):  # safetensors lets the owner alone read them, whatever the umask
        path.chmod((folder / "model_index.json").stat().st_mode)


def name_as_the_hub(path: Path) -> None:
    """Give CLIP's text weights the prefix that they have on the hub.

    transformers 5 writes them without it, unless it loaded them with it. transformers 4 and ComfyUI need it.
    """
    prefix = "text_model."
    tensors = {prefix + key.removeprefix(prefix): value for key, value in files.read_tensors(path).items()}
    files.write_bytes(path, safetensors.torch.save(tensors, metadata={"format": "pt"}))
