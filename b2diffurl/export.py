"""Export a checkpoint for other programs, with a model card: as a LoRA for diffusers or ComfyUI, or as a whole pipeline.

    python -m b2diffurl.export shapes --checkpoint last --format kohya --push OWNER/NAME

Written to <experiment>/export/<format>/:

    the weights     a .safetensors file, or a pipeline's folders
    README.md       the model card (reporting/model_card.py); images/ has its pictures
    export.json     which checkpoint this is, and size and checksum of each file
"""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from b2diffurl.configuration.command_line import die, remedy
from b2diffurl.configuration.settings import ModelSettings, read_model
from b2diffurl.experiment.checkpoints import read_state, require_whole
from b2diffurl.experiment.folder import find_experiment, resolve_checkpoint
from b2diffurl.experiment.stage import LORA_FILE
from b2diffurl.models import base_fingerprint, family
from b2diffurl.models.lora import rank_of, write_diffusers
from b2diffurl.reporting.model_card import Exported, write_card
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import set_up_streams, show
from b2diffurl.runtime.paths import user_model, user_path, work_in_repository

RECORD = "export.json"
FORMATS = ("diffusers", "kohya", "pipeline")


def main() -> None:
    """Parse the command line and export. A mistake of the user's ends in two lines and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m b2diffurl.export", description="Export a checkpoint, and a model card.")
    parser.add_argument("experiment", help="its folder, or its name")
    parser.add_argument(
        "--checkpoint", default="last", help="last, stage<i>, stage<i>/checkpoint_<n>, or the path of a LoRA (default: last)"
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="diffusers",
        help="a LoRA for diffusers, a LoRA for ComfyUI and similar programs (kohya), or a pipeline with the LoRA fused in",
    )
    parser.add_argument("--base", default="", help="where the base model is now, if not where it was in training")
    parser.add_argument("--out", type=Path, help="folder to write (default: <experiment>/export/<format>)")
    parser.add_argument("--push", default="", metavar="OWNER/NAME", help="upload to this repository of the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="make that repository a private one, if it is new")
    args = parser.parse_args()
    set_up_streams()
    try:
        work_in_repository()
        if args.push:
            check_login(args.push)  # before the export, which may take minutes
        root = find_experiment(args.experiment)
        out = export(root, args.checkpoint, args.format, base=args.base, out=args.out, repository=args.push)
        show(f"export: {out}")
        if args.push:
            show(f"export: {push(out, args.push, private=args.private)}")
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells have it
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        die(f"export: {error}", hint=f"{remedy(error, '--out')}; --help lists the options.")


def export(
    root: Path,
    checkpoint: str = "last",
    form: str = "diffusers",
    *,
    base: str = "",
    out: Path | None = None,
    repository: str = "",
) -> Path:
    """Export a checkpoint of the experiment in folder `root`; returns the folder written, `out` or export/<form>.

    checkpoint  a name as in experiment/folder.py
    form        one of FORMATS
    base        the base model's path or hub id, if it is not where it was in training
    repository  OWNER/NAME on the hub, for the card

    What cannot be exported is refused by a ValueError or FileNotFoundError before anything is written.
    """
    config = files.read_json(root / "config.json")["config"]
    model = read_model(config["pretrained"] | ({"model": user_model(base)} if base else {}), config["train"]["lora_rank"])
    lora = resolve_checkpoint(root, checkpoint)
    if lora is None:
        raise ValueError("the base model is not trained here. Export last, stage<i>, or the path of a LoRA.")
    require_whole(lora)
    state = family(model).read_lora(lora)
    require_base(lora, model, required=form == "pipeline" or bool(base))
    out = Path(user_path(str(out))) if out else root / "export" / form
    check_replaceable(out)
    # Everything is made in a temporary folder, which then replaces an earlier export by one rename.
    place = out.resolve()  # a link stays one, and its target is replaced
    temporary = place.with_name(place.name + files.TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    if form == "pipeline":
        hide_progress()
        # The LoRA's own rank: it may come from elsewhere, with another rank than the experiment's.
        family(model).write_pipeline(temporary, replace(model, lora_rank=rank_of(state)), lora)
    elif form == "kohya":
        family(model).write_kohya(temporary / f"{root.resolve().name}.safetensors", state)
    else:
        write_diffusers(temporary / LORA_FILE, state)
    exported = Exported(root, lora, form, model, repository)
    write_card(temporary, exported)
    written = sorted(path for path in temporary.rglob("*") if path.is_file())
    described = {path.relative_to(temporary).as_posix(): files.describe(path) for path in written}
    files.write_json(temporary / RECORD, exported.facts() | {"files": described})
    shutil.rmtree(place, ignore_errors=True)
    temporary.replace(place)
    return out


def require_base(lora: Path, model: ModelSettings, *, required: bool) -> None:
    """Refuse a base model that is not the one the LoRA was trained on.

    A base model that the export does not need (`required` False) is only checked if it is a local path: nothing is
    downloaded for the check.
    """
    trained_on = (read_state(lora) or {}).get("base_model_sha256")  # None for a LoRA from elsewhere
    if not required and not (trained_on and Path(model.name).expanduser().exists()):
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
    existing = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    record = existing.pop(RECORD, None)
    if existing and record is None:
        raise ValueError(f"{out} holds {min(existing)} and is not an earlier export. Give another --out.")
    exported = files.read_json(record)["files"] if record else {}
    changed = [name for name, path in sorted(existing.items()) if exported.get(name) != files.describe(path)]
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
