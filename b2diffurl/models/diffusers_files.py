"""A diffusers pipeline on disk: finding, reading and writing its files.

A pipeline is a directory with a folder for each part (network, VAE, text encoder, tokenizer, scheduler), or a single
.safetensors file whose component configs come from another model's directory. `PipelineSpec` says what differs between
families.
"""

import contextlib
import glob
import hashlib
import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.models import noise_schedule, recognise, whole
from b2diffurl.models.noise_schedule import SCHEDULER_FILE
from b2diffurl.runtime import files
from b2diffurl.runtime.hub import (
    MODEL_PARTS,
    DownloadNeededError,
    checksum,
    find_local,
    locate,
    missing_tokenizer,
    naming_settings,
    require_no_holes,
)
from b2diffurl.runtime.paths import resource

# The weight file of a part, by the package of its class.
WEIGHTS = {"diffusers": "diffusion_pytorch_model{}.safetensors", "transformers": "model{}.safetensors"}
CONFIGS = ("config.json", "tokenizer_config.json")
# Entries of a part's config that change nothing in its output.
NOT_DECISIVE = (
    "_name_or_path", "name_or_path", "_diffusers_version", "transformers_version", "_commit_hash", "torch_dtype", "dtype",
    "architectures", "tokenizer_file", "special_tokens_map_file",
)  # fmt: skip
GET_ANEW = "Get its files anew, or give another base (pretrained.model)."
ANOTHER_BASE = "Give another base (pretrained.model)."


@dataclass(frozen=True)
class PipelineSpec:
    """What a family's pipelines consist of."""

    family: str  # the name in b2diffurl.models.FAMILIES
    pipeline: str  # its class in diffusers
    network: str  # the part that is trained
    classes: Mapping[str, list[str]]  # {part: [package, class]} as in model_index.json, without the scheduler
    unused: tuple[str, ...]  # parts that a pipeline may have and that are not loaded, such as a safety checker
    configs: str  # a model of the family from which a single file takes the configs of its parts, if none is given
    # Refuses parts of a directory that do not fit one another, or that the family cannot run. They may lack weights.
    check_fit: Callable[[Path, Mapping[str, nn.Module]], None]
    schedule: Any = noise_schedule  # the module that reads its scheduler's settings: noise_schedule or flow_schedule
    heeds_force_upcast: bool = False  # a VAE whose config has force_upcast is loaded in float32, whatever the precision

    @property
    def weights(self) -> dict[str, str]:
        """{part: weight file}, of the parts that have weights; {} in it stands for the variant."""
        return {part: WEIGHTS[package] for part, (package, kind) in self.classes.items() if "Tokenizer" not in kind}

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders."""
        return tuple(part for part in self.weights if part.startswith("text_encoder"))

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that a model's directory must have."""
        return (*self.classes, "scheduler")


# ---- where the files are ----


def locate_base(model: ModelSettings, spec: PipelineSpec) -> Path:
    """The directory or single file of a base model. Its files are downloaded if they are not on this machine."""

    try:
        root = fetch(model, spec, plain=())
    except FileNotFoundError:  # the hub cannot be asked whether some parts have no such variant; they may be here without it
        root = find_local(model.name, f"{spec.network}/config.json", revision=model.revision) if model.variant else None
        if root is None:
            raise
    plain = [part for part in spec.weights if model.variant and not has_variant(root / part, model.variant)]
    if not plain or len(plain) == len(spec.weights):
        return root
    return fetch(model, spec, plain)


def fetch(model: ModelSettings, spec: PipelineSpec, plain: Sequence[str]) -> Path:
    """The path of a model whose parts, but for those in `plain`, have its variant. What is missing is downloaded."""
    missing = partial(missing_file, spec=spec, variant=model.variant, plain=plain)
    patterns = file_patterns(model.variant, spec, plain)
    with naming_settings({"pretrained.model": model.name}):
        return locate(model.name, revision=model.revision, patterns=patterns, missing=missing)


def locate_configs(model: ModelSettings, spec: PipelineSpec) -> Path:
    """The directory with a base model's component configs. For a single file that is the directory of `model.config`."""
    root = locate_base(model, spec)
    if root.is_dir():
        return root
    whole.require_safetensors(root)
    try:
        missing = partial(missing_config, spec=spec)
        return locate(model.config or spec.configs, patterns=config_patterns(spec), missing=missing)
    except DownloadNeededError as error:
        error.setting = "pretrained.config"
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"a single file needs the configs of its components (pretrained.config): {error}") from None


def file_patterns(variant: str, spec: PipelineSpec, plain: Sequence[str] = ()) -> list[str]:
    """What to download: configs, tokenizers, and one variant of the weights, as safetensors, in one file or in shards.

    Parts in `plain` have no such variant, and are downloaded without it.
    """
    patterns, number = config_patterns(spec), f"[0-9]*-of-{5 * '[0-9]'}"
    for part, name in spec.weights.items():
        suffix = f".{variant}" if variant and part not in plain else ""
        # Before and behind the variant: libraries changed the order.
        names = (suffix, f"{suffix}-{number}", f"-{number}{suffix}")
        patterns += dict.fromkeys(f"{part}/{name.format(one)}" for one in names)
    return patterns


def config_patterns(spec: PipelineSpec) -> list[str]:
    """Which files of a model to download for its configs: everything but weights."""
    tokenizers = [part for part in spec.classes if part not in spec.weights]
    return ["model_index.json", "README.md", "*/*.json", *(f"{part}/*" for part in tokenizers)]


def missing_config(root: Path, spec: PipelineSpec) -> str:
    """A config or tokenizer that every model's directory has and this one lacks, "" if none."""
    for file in (SCHEDULER_FILE, *(Path(part, "config.json") for part in spec.weights)):
        if not (root / file).is_file():
            return str(file)
    tokenizers = [part for part in spec.classes if part not in spec.weights]
    return next((lacks for part in tokenizers if (lacks := missing_tokenizer(root / part))), "")


def missing_file(root: Path, spec: PipelineSpec, variant: str, plain: Sequence[str] | None = None) -> str:
    """The same, or a weight file. Parts in `plain`, by default those that have nothing else, may lack the variant."""
    if plain is None:
        plain = [part for part in spec.weights if not has_variant(root / part, variant)]
    for part, name in spec.weights.items():
        wanted = listed_files(root / part, name, f".{variant}" if variant and part not in plain else "")
        if lacks := next((path for path in wanted if not path.is_file()), None):
            return str(lacks.relative_to(root))
    return missing_config(root, spec)


def find_whole(name: str, spec: PipelineSpec, missing: Callable[..., str], revision: str = "main") -> Path | None:
    """A model's local path or, if nothing is missing there, its snapshot in the hub's cache; None if there is neither.

    Loading a model of the hub that is here in part downloads the rest, so nothing can be said of it yet.
    """
    root = find_local(name, f"{spec.network}/config.json", revision=revision)
    local = root is not None and os.path.exists(resource(name))
    return root if local or (root is not None and not missing(root, spec)) else None


def has_variant(folder: Path, variant: str) -> bool:
    return any(folder.glob(f"*.{glob.escape(variant)}*.safetensors"))


def loaded_files(folder: Path, name: str, variant: str) -> list[Path]:
    """The weight files of a part that are loaded: file `name`, or the shards that its index lists.

    A FileNotFoundError says that there is neither.
    """
    found = listed_files(folder, name, f".{variant}" if variant and has_variant(folder, variant) else "")
    if len(found) == 1 and not found[0].is_file():
        weight_files(folder, variant)  # says so if there are none at all
        raise FileNotFoundError(f"{folder} has no {found[0].name}, the name under which libraries look for its weights.")
    return found


def listed_files(folder: Path, name: str, suffix: str) -> list[Path]:
    """The shards that a part's index lists or, if it has no index, its one weight file. They need not be there."""
    index = folder / f"{name.format('')}.index{suffix}.json"
    if index.is_file():
        return [folder / shard for shard in sorted({*files.read_object(index).get("weight_map", {}).values()})]
    return [folder / name.format(suffix)]


def weight_files(folder: Path, variant: str) -> list[Path]:
    """A component's weight files of one variant, or without variant if it has none of it, as diffusers takes them.

    A FileNotFoundError says that there are none at all.
    """
    variant = variant if has_variant(folder, variant) else ""
    # Without a variant a name with a second dot, such as model.fp16.safetensors, is another variant's file.
    pattern = f"*.{glob.escape(variant)}*.safetensors" if variant else "*.safetensors"
    weights = sorted(path for path in folder.glob(pattern) if variant or path.name.count(".") == 1)
    if not weights:
        raise FileNotFoundError(f"{folder} has no {pattern}. Weights must be safetensors; see pretrained.variant.")
    return weights


def part_files(root: Path, part: str, model: ModelSettings, spec: PipelineSpec) -> list[Path]:
    """The weight files of a part that are loaded, from a directory or, for every part, the single file `root`."""
    return [root] if root.is_file() else loaded_files(root / part, spec.weights[part], model.variant)


def scheduler_config(model: ModelSettings, spec: PipelineSpec) -> dict[str, Any]:
    """The settings of a base model's scheduler, with the entries of `pretrained.scheduler`."""
    return spec.schedule.read_config(locate_configs(model, spec), model.scheduler)


def read_config(model: ModelSettings, spec: PipelineSpec, part: str) -> Mapping[str, Any]:
    """The config of a base model's part."""
    return files.read_object(locate_configs(model, spec) / part / "config.json")


def fingerprint(model: ModelSettings, spec: PipelineSpec) -> str:
    """SHA-256 of the network's weights: of their file (a single-file model's only file), or of several files' digests."""
    root = locate_base(model, spec)
    weights = part_files(root, spec.network, model, spec)
    digests = [checksum(path) for path in weights]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def identity(model: ModelSettings, spec: PipelineSpec) -> dict[str, str]:
    """{part: a checksum of all that decides its output}, the scheduler and the tokenizer among the parts.

    Where the files lie does not count, nor what programs write into a config about themselves: a model may move.
    """
    root, configs = locate_base(model, spec), locate_configs(model, spec)
    parts: dict[str, Any] = {}
    for part in spec.classes:
        if part in spec.weights:
            weights = part_files(root, part, model, spec)
            parts[part] = [settings_of(configs / part / "config.json"), [checksum(path) for path in weights]]
        else:
            read = sorted(path for pattern in MODEL_PARTS for path in (configs / part).glob(pattern))
            parts[part] = {path.name: settings_of(path) if path.name in CONFIGS else checksum(path) for path in read}
    parts["scheduler"] = spec.schedule.decisive(scheduler_config(model, spec))
    return {part: files.digest(content) for part, content in parts.items()}


def settings_of(path: Path) -> Any:
    """A part's config without the entries by which programs describe themselves: paths, versions, the stored dtype."""
    return {key: value for key, value in files.read_object(path).items() if key not in NOT_DECISIVE}


def find_here(model: ModelSettings, spec: PipelineSpec) -> tuple[list[Path], dict[str, dict]] | None:
    """(the network's weight files, {part: its config.json}); None if they are not all on this machine.

    Downloads nothing. Parts without weights have no config here.
    """
    probe = f"{spec.network}/config.json"  # the hub's cache is asked for a file, not for a model
    root = find_local(model.name, probe, revision=model.revision)
    single = root is not None and root.is_file()
    configs = find_local(model.config or spec.configs, probe) if single else root
    if configs is None:
        return None
    weights = [root] if single else sorted((configs / spec.network).glob("*.safetensors"))
    paths = {part: configs / part / "config.json" for part in spec.weights}
    if not weights or not all(path.is_file() for path in paths.values()):
        return None
    return weights, {part: files.read_object(path) for part, path in paths.items()}


def count_weights(model: ModelSettings, spec: PipelineSpec) -> dict[str, int]:
    """{part: how many numbers its weights have}, of the parts that are here, or of a single file's in all.

    Reads the headers of the files only, and downloads nothing.
    """
    root, places = find_local(model.name, f"{spec.network}/config.json", revision=model.revision), {}
    if root and root.is_file():
        places = {"all parts": [root]}
    for part, name in spec.weights.items() if root and root.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            places[part] = loaded_files(root / part, name, model.variant)
    return {part: sum(map(math.prod, whole.stored_shapes(paths).values())) for part, paths in places.items()}


def check_here(model: ModelSettings, spec: PipelineSpec) -> None:
    """Refuse a model that is on this machine and not whole. Downloads nothing, and loads no weights."""
    root = find_whole(model.name, spec, partial(missing_file, variant=model.variant), model.revision)
    if root is None:
        return
    if root.is_dir():
        check_directory(root, model.variant, spec, list(spec.classes))
        return
    whole.require_safetensors(root)
    if configs := find_whole(model.config or spec.configs, spec, missing_config):
        check_single_file(root, configs, spec, list(spec.classes))


# ---- loading ----


def load_parts(model: ModelSettings, spec: PipelineSpec, dtype: torch.dtype, *, decoder: bool) -> dict[str, Any]:
    """Load a pipeline: {part: object}. Without `decoder` the network is the only part."""
    root = locate_base(model, spec)
    wanted = list(spec.classes) if decoder else [spec.network]
    if root.is_dir():
        parts = load_directory(root, model.variant, spec, dtype, wanted)
    else:
        parts = load_single_file(root, locate_configs(model, spec), spec, dtype, wanted)
    for name in spec.weights:
        if name in parts:
            whole.check_loaded(f"the {name} of {root}", parts[name])
    return parts


def load_directory(
    root: Path, variant: str, spec: PipelineSpec, dtype: torch.dtype, wanted: Sequence[str]
) -> dict[str, Any]:
    """Load the `wanted` parts from a directory in the diffusers layout.

    The classes are the family's: its JSON files may name others, even code of their own, and are not asked.
    """
    check_directory(root, variant, spec, wanted)
    upcast, parts = upcast_parts(files.read_object(root / "vae" / "config.json"), spec), {}
    for name in wanted:
        load = class_of(name, spec).from_pretrained
        if name in spec.weights:
            own = variant if has_variant(root / name, variant) else None
            # use_safetensors: never a pickle
            options = {"use_safetensors": True, "dtype": torch.float32 if name in upcast else dtype}
            parts[name], info = load(root, subfolder=name, variant=own, output_loading_info=True, **options)
            require_no_holes(root / name, parts[name], info)
        else:
            parts[name] = load(root, subfolder=name)
    return parts


def upcast_parts(vae: Mapping[str, Any], spec: PipelineSpec) -> list[str]:
    """The parts that are loaded in float32 whatever the precision, by the config of the VAE."""
    return ["vae"] if spec.heeds_force_upcast and vae.get("force_upcast", True) else []


def class_of(part: str, spec: PipelineSpec) -> Any:
    package, kind = spec.classes[part]
    return getattr(importlib.import_module(package), kind)


def load_single_file(
    root: Path, configs: Path, spec: PipelineSpec, dtype: torch.dtype, wanted: Sequence[str]
) -> dict[str, Any]:
    """Load the `wanted` parts from one .safetensors file, with the component configs in directory `configs`."""
    import diffusers

    check_single_file(root, configs, spec, wanted)
    # A part that is given is not loaded, and stays None if that is given.
    given = dict.fromkeys([*spec.unused, *(name for name in spec.classes if name not in wanted)])
    options = {"config": str(configs), "local_files_only": True}
    for name in upcast_parts(files.read_object(configs / "vae" / "config.json"), spec):
        if name in wanted:
            given[name] = class_of(name, spec).from_single_file(str(root), subfolder=name, dtype=torch.float32, **options)
    pipeline = getattr(diffusers, spec.pipeline).from_single_file(str(root), dtype=dtype, **options, **given)
    return {name: getattr(pipeline, name) for name in wanted}


# ---- whether it is whole ----


def check_directory(root: Path, variant: str, spec: PipelineSpec, wanted: Sequence[str]) -> None:
    """Refuse a directory whose `wanted` parts are not whole or do not fit one another. It loads no weights."""
    index = root / "model_index.json"
    kind = str(files.read_object(index).get("_class_name", spec.pipeline)) if index.is_file() else spec.pipeline
    if recognise.PIPELINES.get(kind, spec.family) != spec.family:
        raise ValueError(f"{root} is a {kind}, and not a {spec.pipeline}. Leave pretrained.family at auto.")
    # Said here: diffusers would say that some file of some part is missing.
    missing = [name for name in spec.folders if name in (*wanted, "scheduler") and not (root / name).is_dir()]
    if missing:
        other = f" It is a {kind}, which may not be supported yet." if kind != spec.pipeline else ""
        raise FileNotFoundError(f"{root} has no {missing[0]}/. A model directory holds {', '.join(spec.folders)}.{other}")
    if variant and not any(has_variant(root / part, variant) for part in spec.weights):
        raise FileNotFoundError(
            f"{root} has no *.{variant}.safetensors in any part. Set pretrained.variant to one that it has."
        )
    # Before any config is read: a part without weights is the plainest fault.
    paths = {part: loaded_files(root / part, name, variant) for part, name in spec.weights.items() if part in wanted}
    for name, part in empty_parts(root, spec, wanted).items():
        whole.check_tensors(f"{root / name}", part, whole.stored_shapes(paths[name]), GET_ANEW)


def check_single_file(root: Path, configs: Path, spec: PipelineSpec, wanted: Sequence[str]) -> None:
    """Refuse a single file whose `wanted` parts are not whole, or not what `configs` describes. It loads no weights."""
    whole.require_safetensors(root)
    check_index(configs / "model_index.json", spec)
    shapes = whole.stored_shapes([root])
    found = recognise.family_of_tensors(shapes)
    if found not in ("", spec.family):
        remedy = "Leave pretrained.family at auto" if found in recognise.PIPELINES.values() else recognise.GIVE
        raise ValueError(f"{root} is a model of {found}, and not of {spec.family}. {remedy}.")
    parts = empty_parts(configs, spec, wanted)
    for name, part in parts.items():
        found = whole.converted(part, shapes)
        if not found.keys() & whole.names_of(part):
            raise ValueError(f"{root} has no {name}. A single file must hold {', '.join(spec.weights)}. {ANOTHER_BASE}")
        remedy = f"Get the file anew, or give the model with its configs, now {configs}, as pretrained.config."
        whole.check_tensors(f"the {name} in {root}", part, found, remedy)


def empty_parts(root: Path, spec: PipelineSpec, wanted: Sequence[str]) -> dict[str, nn.Module]:
    """The `wanted` parts that have weights, by their configs in directory `root`, without weights. They fit one another."""
    parts = {name: whole.empty_part(class_of(name, spec), root / name) for name in spec.weights if name in wanted}
    spec.check_fit(root, parts)
    return parts


def check_index(path: Path, spec: PipelineSpec) -> None:
    """Refuse a model_index.json with other classes than the family's, because diffusers imports whatever it names."""
    index = files.read_object(path)
    for name, allowed in spec.classes.items():
        if index.get(name) != allowed:
            raise ValueError(f"{path} names {index.get(name)} as its {name}; it must be {allowed}, and no other code is run")
    if index.get("scheduler", [""])[0] != "diffusers":
        raise ValueError(f"{path} names {index.get('scheduler')} as its scheduler; it must be one of diffusers")


# ---- writing ----


def write_pipeline(folder: Path, parts: Mapping[str, Any], model: ModelSettings, spec: PipelineSpec, **more: Any) -> None:
    """Write `parts`, and the scheduler of `model`, as a directory in the diffusers layout.

    `more` are further arguments of the pipeline's class. The files name no path of this machine. They are those of the hub's
    models, so that transformers 4 and other programs read them.
    """
    import diffusers
    import transformers

    scheduler = noise_schedule.stock_scheduler(scheduler_config(model, spec))
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
