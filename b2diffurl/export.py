"""Export a checkpoint for other programs, with a model card: as a LoRA for diffusers or ComfyUI, or as a whole pipeline.

    python -m b2diffurl.export shapes --checkpoint last --format kohya --push OWNER/NAME

Written to <experiment>/export/<format>/:

    the weights     a .safetensors file, or a pipeline's folders
    README.md       the model card (reporting/model_card.py); images/ has its pictures
    export.json     which checkpoint this is, and size and checksum of each file
"""

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from b2diffurl.configuration.command_line import die, remedy, set_up_command
from b2diffurl.configuration.settings import ModelSettings, read_model
from b2diffurl.experiment.checkpoints import read_state, require_whole
from b2diffurl.experiment.folder import find_experiment, resolve_checkpoint
from b2diffurl.models import base_fingerprint, family
from b2diffurl.models.lora import rank_of, write_diffusers
from b2diffurl.reporting.model_card import Exported, base_license, write_card
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import show
from b2diffurl.runtime.paths import resource, user_model, user_path

RECORD = "export.json"
FORMATS = ("diffusers", "kohya", "pipeline")
DTYPES = ("float32", "float16", "bfloat16")


def main() -> None:
    """Parse the command line and export. A mistake of the user's ends in two lines and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m b2diffurl.export",
        description="Export a checkpoint, and a model card.",
        epilog="Examples: python -m b2diffurl.export shapes --format kohya; python -m b2diffurl.export model/lora/shapes "
        "--checkpoint stage3 --format pipeline --out my_pipeline. More in docs/evaluation.md.",
    )
    parser.add_argument("experiment", help="its folder, or its name below model/lora")
    parser.add_argument(
        "--checkpoint",
        default="last",
        help="last, stage<i>, stage<i>/checkpoint_<n>, one of these with /ema for the average of its LoRA, or the path of a "
        "LoRA (default: last)",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="diffusers",
        help="a LoRA for diffusers, a LoRA for ComfyUI and similar programs (kohya), or a pipeline with the LoRA fused in "
        "(default: diffusers)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of a pipeline's weights (default: float32); a LoRA is always float32",
    )
    parser.add_argument(
        "--license", default="", help="for the card, as the hub writes it (default: the base model's, if its files say it)"
    )
    parser.add_argument("--base", default="", help="where the base model is now, if not where it was in training")
    parser.add_argument("--out", type=Path, help="folder to write (default: <experiment>/export/<format>)")
    parser.add_argument("--push", default="", metavar="OWNER/NAME", help="upload to this repository of the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make that repository a private one, if it is new")
    set_up_command("export")
    args = parser.parse_args()
    try:
        if args.push:
            check_login(args.push)  # before the export, which may take minutes
        root = find_experiment(args.experiment)
        words = {"base": args.base, "repository": args.push, "dtype": args.dtype, "license": args.license}
        out = export(root, args.checkpoint, args.format, out=args.out, **words)
        show(f"export: {out}")
        if args.push:
            show(f"export: {push(out, args.push, private=args.private)}")
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells have it
    except (ValueError, OSError, ImportError, RecursionError, SafetensorError) as error:
        die(f"export: {error}", hint=f"{remedy(error, '--out')}; --help lists the options.")


def export(
    root: Path,
    checkpoint: str = "last",
    form: str = "diffusers",
    *,
    base: str = "",
    out: Path | None = None,
    repository: str = "",
    dtype: str = "float32",
    license: str = "",
) -> Path:
    """Export a checkpoint of the experiment in folder `root`; returns the folder written, `out` or export/<form>.

    checkpoint  a name as in experiment/folder.py
    form        one of FORMATS
    base        the base model's path or hub id, if it is not where it was in training
    repository  OWNER/NAME on the hub, for the card
    dtype       one of DTYPES, of a pipeline's weights
    license     for the card, as the hub writes it; "": the base model's, if its files say it

    What cannot be exported is refused by a ValueError or FileNotFoundError before anything is written.
    """
    if dtype != "float32" and form != "pipeline":
        raise ValueError(f"--dtype={dtype} is for --format=pipeline; a LoRA is always float32. Leave it out.")
    if not re.fullmatch(r"[a-z0-9.-]*", license):
        raise ValueError(f"--license is {license!r}; the hub writes licenses such as mit or creativeml-openrail-m, or other")
    config = files.read_json(root / "config.json")["config"]
    model = read_model(config["pretrained"] | ({"model": user_model(base)} if base else {}), config["train"])
    lora = resolve_checkpoint(root, checkpoint)
    if lora is None:
        raise ValueError("the base model is not trained here. Export last, stage<i>, or the path of a LoRA.")
    require_whole(lora)
    state = family(model).read_lora(lora)
    require_base(lora, model, required=form == "pipeline" or bool(base))
    out = Path(user_path(str(out))) if out else root / "export" / form
    check_replaceable(out)
    exported = Exported(root, lora, form, model, repository, dtype, license or base_license(model))
    place = out.resolve()  # a link stays one, and its target is replaced
    with folder_beside(place) as temporary:
        if form == "pipeline":
            hide_progress()
            # The LoRA's own rank: it may come from elsewhere, with another rank than the experiment's.
            own = replace(model, lora=replace(model.lora, rank=rank_of(state)))
            family(model).write_pipeline(temporary, own, lora, dtype=dtype)
        elif form == "kohya":
            family(model).write_kohya(temporary / exported.file, state)
        else:
            write_diffusers(temporary / exported.file, state)
        write_card(temporary, exported)
        written = sorted(path for path in temporary.rglob("*") if path.is_file())
        described = {path.relative_to(temporary).as_posix(): files.describe(path) for path in written}
        files.write_json(temporary / RECORD, exported.facts() | {"files": described})
        check_replaceable(out)  # again: a pipeline takes minutes, in which the user may have put something there
        shutil.rmtree(place, ignore_errors=True)
        temporary.replace(place)
    if not exported.license:
        show("export: no license is known of the base model, so the card names none; --license names one", stream=sys.stderr)
    return out


@contextmanager
def folder_beside(place: Path) -> Iterator[Path]:
    """The path of a folder to be, under a name that nobody else has, from which one rename leads to `place`.

    What is left there in the end is deleted.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{place.name}.", suffix=files.TEMPORARY, dir=place.parent) as folder:
        yield Path(folder, place.name)  # below it, because only the user can read the folder itself


def require_base(lora: Path, model: ModelSettings, *, required: bool) -> None:
    """Refuse a base model that is not the one the LoRA was trained on.

    A base model that the export does not need (`required` False) is only checked if it is a local path: nothing is
    downloaded for the check.
    """
    trained_on = (read_state(lora) or {}).get("base_model_sha256")  # None for a LoRA from elsewhere
    if not required and not (trained_on and resource(model.name).exists()):
        return
    try:
        # By the weights' checksum and not by name: a model may have moved, or its files may have been replaced.
        fingerprint = base_fingerprint(model)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} It is the base model. Say where it is now by --base.") from None
    if trained_on and fingerprint != trained_on:
        raise ValueError(
            f"{lora} was trained on another base model (SHA-256 {trained_on[:12]}…, {model.name} has "
            f"{fingerprint[:12]}…). Give the one it was trained on as --base."
        )


def check_replaceable(out: Path) -> None:
    """Refuse an output folder that holds anything else than an unchanged earlier export, because it will be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file. Give a folder as --out.")
    existing = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_symlink() or path.is_file()}
    record = existing.pop(RECORD, None)
    if existing and record is None:
        raise ValueError(f"{out} holds {min(existing)} and is not an earlier export. Give another --out.")
    exported = files.read_json(record)["files"] if record else {}
    changed = [
        name for name, path in sorted(existing.items()) if path.is_symlink() or exported.get(name) != files.describe(path)
    ]
    if changed:
        raise ValueError(f"{out / changed[0]} is not what was exported, and would be lost. Move it, or give another --out.")


def hide_progress() -> None:
    """Let diffusers and transformers draw progress bars only on a terminal."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        if not sys.stderr.isatty():
            library.utils.logging.disable_progress_bar()


def check_login(repository: str) -> None:
    """Refuse, before any work, a repository name that is not OWNER/NAME and a user who is not logged in."""
    from huggingface_hub import whoami
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    if repository.count("/") != 1:
        raise ValueError(f"--push is {repository!r}; it must be OWNER/NAME")
    validate_repo_id(repository)
    try:
        whoami()
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise ValueError(f"the hub does not know you ({error}) Log in first: hf auth login") from None
    except (HTTPError, OSError) as error:  # no answer at all: after HfHubHTTPError, which is one of these
        raise ValueError(
            f"the hub cannot be reached ({error}), so nothing can be uploaded; without --push it is exported"
        ) from None


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload an export to a repository of the hub, which is made if it is new; returns its URL."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of b2diffurl")
    except HTTPError as error:
        raise ValueError(f"{folder} is written, but could not be uploaded: {error}") from None
    return str(url)


if __name__ == "__main__":
    main()
