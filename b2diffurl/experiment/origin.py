"""What a stage was made from, and whether the experiment still holds just that.

    sample   the last LoRA of the stage before, or one that the user chose among its checkpoints   policy.lora_sha256
    select   the stage's images, and the scores of earlier stages                                  made_from
    train    the selection                                                                         made_from

The right column is the entry of the phase's manifest that has the checksums. Manifests of earlier versions lack `made_from`;
what is not recorded is not compared.
"""

from collections.abc import Sequence
from dataclasses import replace

from b2diffurl.experiment.stage import LORA_FILE, PHASES, Stage, finished_stages
from b2diffurl.runtime import files


def require_origin(stage: Stage) -> None:
    """Compare the finished phases of a stage with what they were made from; a ValueError names what has changed since."""
    sampled, selected, trained = (stage.finished(phase) for phase in PHASES)
    if sampled:
        check_lora(stage)
    if sampled and selected:  # what somebody has deleted, to make it anew, cannot be compared
        check_scored(stage)
    if selected and trained:
        check_trained(stage)


def check_lora(stage: Stage) -> None:
    """The LoRA that sampled is a checkpoint of the stage before; nothing is compared if that is not here, or not trained."""
    before = replace(stage, index=stage.index - 1)
    if stage.index == 0 or not before.finished("train"):
        return
    used = stage.manifest("sample").get("policy", {}).get("lora_sha256")
    loras = [entry["sha256"] for name, entry in before.manifest("train")["files"].items() if name.endswith(LORA_FILE)]
    if used is not None and used not in loras:
        refuse(
            stage,
            f"the LoRA {short(used)}",
            f"{before.folder} now has {', '.join(map(short, loras)) or 'none'}",
            before.folder,
        )


def check_scored(stage: Stage) -> None:
    """The images, the history and the scales of a mixture are those that the selection was made from."""
    selected = stage.manifest("select")
    recorded = selected.get("made_from", {})
    if recorded and recorded["images"] != (now := images_sha256(stage)):
        refuse(stage, f"the images {short(recorded['images'])}", f"there are now {short(now)}", stage.images)
    for name, checksum in recorded.get("history", {}).items():
        earlier = replace(stage, index=int(name.removeprefix("stage")))
        if earlier.finished("select") and (now := scores_sha256(earlier)) != checksum:
            refuse(stage, f"the scores {short(checksum)} of {name}", f"{name} now has {short(now)}", earlier.folder)
    if not selected.get("scales"):
        return
    first = next(one for n in range(stage.index + 1) if (one := replace(stage, index=n)).finished("select"))
    if selected["scales"] != (now := first.manifest("select").get("scales")):
        refuse(stage, f"the scales {selected['scales']}", f"{first.folder.name} now has {now}", first.folder)


def check_trained(stage: Stage) -> None:
    """The selection, and the policy that sampled it, are those that were trained on."""
    trained = stage.manifest("train")
    recorded, now = trained.get("made_from", {}), selection_sha256(stage)
    if recorded and recorded["selection"] != now:
        refuse(stage, f"the selection {short(recorded['selection'])}", f"there is now {short(now)}", stage.selection)
    sampled = stage.finished("sample") and stage.manifest("sample").get("policy")
    if sampled and trained.get("policy", sampled) != sampled:
        refuse(stage, f"samples of {trained['policy']}", f"there are now those of {sampled}", stage.manifest_path("sample"))


def refuse(stage: Stage, was: str, now: str, changed: object) -> None:
    """Raise the ValueError: what the stage was made from, what there is now, and what to do."""
    raise ValueError(
        f"{stage.folder} was made from {was}, but {now}. Put back the old {changed}, or delete {stage.folder} and all later "
        "stages, and run the same command again."
    )


def short(checksum: str) -> str:
    """A SHA-256 for people."""
    return f"(SHA-256 {checksum[:12]}…)" if checksum else "(none: a fresh one)"


def images_sha256(stage: Stage) -> str:
    """A checksum of the stage's images and their prompts, from its manifest."""
    described, prompts, images = stage.manifest("sample")["files"], stage.prompts.name, f"{stage.images.name}/"
    names = sorted(name for name in described if name == prompts or name.startswith(images))
    return files.digest([(name, described[name]["sha256"]) for name in names])


def scores_sha256(stage: Stage) -> str:
    return stage.manifest("select")["files"][stage.scores.name]["sha256"]


def selection_sha256(stage: Stage) -> str:
    return stage.manifest("select")["files"][stage.selection.name]["sha256"]


def history_stages(stage: Stage, count: int) -> list[Stage]:
    """The `count` stages before this one, as far as the experiment has gone through them; all of them are scored.

    A ValueError names one whose scores are gone: without them the stage would be normalised by others than it should. An
    experiment may begin with a later stage than 0 (resume_from), so stages before its first one are not missed.
    """
    begun = [one.index for one in finished_stages(stage.root, "sample") if one.index < stage.index]
    before = Stage(stage.root, stage.index - 1)
    known = before.manifest("select").get("made_from", {}).get("history", {}) if before.finished("select") else {}
    first = min([*begun, *(int(name.removeprefix("stage")) for name in known)], default=stage.index)
    stages = [Stage(stage.root, index) for index in range(max(first, stage.index - count), stage.index)]
    for earlier in stages:
        if not earlier.finished("select"):
            raise ValueError(
                f"{stage.folder} needs the scores of {earlier.folder}, which has no {earlier.manifest_path('select').name}. "
                f"Put it back, or, while its samples/ are there, run run_select.py for stage{earlier.index} again; or take "
                "another exp_name, and give as resume_from the LoRA to start from."
            )
    return stages


def require_scales(stage: Stage) -> None:
    """Raise a ValueError if the scales of a mixture are gone: else this stage would measure others than the ones before."""
    earlier = [one for one in finished_stages(stage.root, "sample") if one.index < stage.index]
    scored = finished_stages(stage.root, "select")
    if earlier and not (scored and scored[0].manifest("select").get("scales")):
        raise ValueError(
            f"{stage.folder} standardises rewards by the scales of the first stage, and no select.json has them. "
            f"Put back that of {earlier[0].folder}, or run run_select.py for stage{earlier[0].index} again."
        )


def made_from(stage: Stage, history: Sequence[Stage]) -> dict:
    """The entry of the select phase's manifest: checksums of the images, and of the scores of the stages in the history."""
    return {"images": images_sha256(stage), "history": {f"stage{one.index}": scores_sha256(one) for one in history}}
