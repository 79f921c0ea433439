"""What each setting may be by itself: numbers by interval, texts by what they are for."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Ends too wide for any use keep out what would only exhaust memory, or overflow float32.
COUNT, SIZE, SEED, WEIGHT = "[1, 1e9]", "[0, 1e9]", "[-2e18, 2e18]", "[0, 1e6]"
RANGES = {
    "seed": SEED, "num_processes": "[0, 1e5]", "dev_id": "[0, 1023]", "num_threads": "[0, 1024]", "stage_cnt": "[1, 1e5]",
    "split_time": "[1, 1e4]", "prompt_random_choose": "[0, 1]", "pretrained.resolution": "[0, 8192]",
    "sample.num_steps": "[1, 1000]", "sample.eta": "[0.001, 1]", "sample.prefix_eta": "-1 or [0, 1]",
    "sample.guidance_scale": "[1, 1000]", "sample.batch_size": "[1, 1e5]", "sample.num_batches_per_epoch": "[1, 1e6]",
    "sample.micro_batch_size": SIZE, "sample.decode_batch_size": COUNT,
    "reward.batch_size": COUNT, "reward.num_workers": "[1, 1024]",
    "reward.bertscore.max_new_tokens": "[1, 1e5]", "reward.bertscore.num_layers": "[0, 1000]",
    "reward.http.timeout_sec": "(0, 1e6]", "reward.http.num_retries": "[0, 20]",
    "eval.history_cnt": SIZE, "eval.pos_threshold": "[-1e9, 1e9]", "eval.neg_threshold": "[-1e9, 1e9]",
    "eval.num_images": "[1, 1e6]", "eval.batch_size": "[1, 1e6]", "eval.seed": SEED, "eval.every": SIZE,
    "eval.deployed.num_steps": "[1, 1000]", "eval.deployed.eta": "[0, 1]",
    "eval.deployed.guidance_scale": "0 or [1, 1000]",
    "train.num_epochs": "[1, 1e5]", "train.batch_size": COUNT, "train.gradient_accumulation_steps": COUNT,
    "train.micro_batch_size": COUNT, "train.timestep_fraction": "(0, 1]", "train.learning_rate": "[0, 1]",
    "train.adam_beta1": "[0, 1)", "train.adam_beta2": "[0, 1)", "train.adam_weight_decay": "[0, 100]",
    "train.adam_epsilon": "[1e-20, 1]", "train.max_grad_norm": "(0, 1e12]", "train.eps": WEIGHT, "train.kl_weight": WEIGHT,
    "train.dpo_beta": WEIGHT, "train.beta1": WEIGHT, "train.beta2": WEIGHT, "train.adv_clip_max": "(0, 1e6]",
    "train.lora_rank": "[1, 4096]", "train.save_interval": COUNT, "keep.images": "[-1, 1e9]",
}  # fmt: skip
WHY = {"sample.eta": "without noise there is no log-probability", "sample.guidance_scale": "1 is no guidance",
       "sample.prefix_eta": "-1 is as sample.eta", "eval.deployed.guidance_scale": "0 is as in training"}  # fmt: skip
OPTIONAL = ("preset", "resume_from", "prompt", "pretrained.variant", "pretrained.config", "reward.http.url", "eval.judge")
FREE = ("prompt", "reward.bertscore.question", "reward.bertscore.reference")  # lines, tabs and control characters included
FOLDERS = ("save_path", "log_path")
NAME_BYTES = 200  # of an experiment: what is made of its name, such as a log file's, must be one, too


def check_values(flat: Mapping[str, Any]) -> None:
    """Refuse a value that can work in no combination, with what is allowed."""
    for key, value in flat.items():
        if value is None and key != "reward.weights":
            raise ValueError(f"{key} is None; it must have a value")
        if key in RANGES:
            check_number(key, value, RANGES[key])
        elif isinstance(value, str):
            check_text(key, value)
    check_name(flat["exp_name"])
    for key in FOLDERS:
        check_folder(key, flat[key])


def check_log(exp_name: str, log_path: str) -> None:
    """Refuse what the log's place is made of, before anything is written there."""
    for key, value in (("exp_name", exp_name), ("log_path", log_path)):
        check_text(key, value)
    check_name(exp_name)
    check_folder("log_path", log_path)


def check_number(key: str, value: Any, allowed: str) -> None:
    single, low, high, (opening, closing) = parse(allowed)
    inside = low <= value <= high and not (opening == "(" and value == low) and not (closing == ")" and value == high)
    if isinstance(value, bool) or not (inside or value == single):
        must = f"lie in {allowed}" if single is None else f"be {allowed.replace(' or ', ' or lie in ')}"
        why = f": {WHY[key]}" if key in WHY else ""
        raise ValueError(f"{key} is {shown(value)}; it must {must}{why}")


def parse(allowed: str) -> tuple[float | None, float, float, str]:
    """A value outside it that is allowed, or None; ends and brackets of the interval."""
    single, opening, low, high, closing = re.fullmatch(r"(?:(.+) or )?([\[(])(.+), (.+)([\])])", allowed).groups()
    return float(single) if single else None, float(low), float(high), opening + closing


def check_text(key: str, value: str) -> None:
    """Refuse a blank text, one that UTF-8 has no bytes for, and control characters in what names something."""
    odd = [one for one in value if ("\ud800" <= one <= "\udfff" if key in FREE else not one.isprintable())]
    if odd:
        raise ValueError(f"{key} is {shown(value)}; it must be text without {odd[0]!r}")
    if not value.strip() and (value or key not in OPTIONAL):
        raise ValueError(f"{key} is {value!r}; it must not be blank")


def check_name(name: str) -> None:
    """Refuse an experiment's name that is no single folder's, under save_path."""
    if not re.fullmatch(r"[\w.-]+", name) or not name.strip("."):
        raise ValueError(f"exp_name is {shown(name)}; allowed are letters, digits, '_', '-' and '.'")
    if len(name.encode()) > NAME_BYTES:
        raise ValueError(f"exp_name is {shown(name)}, {len(name.encode())} bytes; it must have at most {NAME_BYTES}")


def check_folder(key: str, value: str) -> None:
    """Refuse a path at which no folder is, and none can be made."""
    path = Path(value)
    try:
        there = next(place for place in (path, *path.parents) if os.path.lexists(place) or place.exists())
        reason = "" if there.is_dir() else f"{there} is no folder"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise ValueError(f"{key} is {shown(value)}; it must be a folder, or one that can be made ({reason:.200})")


def shown(value: Any) -> str:
    """A value as Python writes it, in one line, its beginning if it is long."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 100 else f"{text[:100]}…"


def flatten(nested: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their keys, such as `train.learning_rate`."""
    flat = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
