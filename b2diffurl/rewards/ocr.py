"""The text that a prompt quotes against the text that is read in the image: `a shop sign that says "OPEN"`.

The score is Flow-GRPO's for the rendering of text (Liu et al. 2025, arXiv 2505.05470): 1 minus the edit distance, as a part
of the length of what is quoted, and at least 0; 1 also where the image has other text beside that. The reader is rapidocr,
an optional dependency whose wheel carries its models.
"""

import importlib.util
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from b2diffurl.rewards import Parts, Reward, different
from b2diffurl.runtime.ambient import refuse_telemetry
from b2diffurl.runtime.apart import Apart

# The models in the wheel, by their part in reading, and the thresholds between them.
MODELS = {
    "Det": "models/PP-OCRv6_det_small.onnx",  # finds lines
    "Cls": "models/ch_ppocr_mobile_v2.0_cls_mobile.onnx",  # finds those that are upside down
    "Rec": "models/PP-OCRv6_rec_small.onnx",  # reads a line
}
THRESHOLDS = "config.yaml"
INSTALL = "pip install -r requirements-rewards.txt"

# A straight mark after a digit is that of inches: a 12" pizza.
QUOTED = re.compile(
    r'(?<!\d)"([^"]+)"|“([^“”"]+)[”"]|„([^„“”"]+)[“”"]|”([^”]+)”'
    r"|«([^«»]+)»|»([^«»]+)«|‹([^‹›]+)›|›([^‹›]+)‹|「([^「」]+)」|『([^『』]+)』"
)
SINGLE = re.compile(r"(?<!\w)(?:'(?=\S)(.+?)(?<=\S)'|‘(.+?)’|‚(.+?)[‘’])(?!\w)")
OPENING = re.compile(r"(?<!\w)['‘‚](?=\w)")
MARK = re.compile(r'(?<!\d)"|[“”„«»‹›「」『』]')
SCRIPTS = ("LATIN", "GREEK", "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA")  # that the reader knows
MAX_ORDERED = 4  # quotes that may stand in the image in any order: 24 orders


def check(name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
    for package in ("rapidocr", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"reward ocr needs the package {package}: {INSTALL}")
    for path in files(name, own):
        if not path.is_file():
            raise FileNotFoundError(f"reward ocr: {path} is missing; the version of rapidocr that has it: {INSTALL}")
    for prompt in prompts:
        quoted(prompt)


def files(name: str, own: Mapping[str, Any]) -> list[Path]:
    return [package_folder() / path for path in (*MODELS.values(), THRESHOLDS)]


def load(name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
    """`device` and `dtype` are ignored: the models run on the CPU, in float32."""
    read = reader()

    def ocr(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Parts]:
        first, rows = different(images, [""] * len(images))  # what is read does not depend on the prompt
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            found = list(pool.map(read, map(Image.fromarray, images[first].cpu().numpy())))
        texts = [found[row] for row in rows]
        pairs = [compare(quoted(prompt), text) for prompt, text in zip(prompts, texts, strict=True)]
        scores, exact = torch.tensor(pairs, dtype=torch.float32).unbind(1)
        return scores, {"exact": exact, "text": texts}

    return ocr


# ---- what a prompt asks for ----


def quoted(prompt: str) -> list[str]:
    """The texts between quotation marks, in order: those between single ones only if there are no others.

    An apostrophe is taken for a quotation mark only outside words. A ValueError names a prompt that leaves a quotation mark
    open, or has one that may open or be an apostrophe, or quotes nothing, nothing with letters or digits, or what cannot be
    read.
    """
    hint = 'Put the text that the image should show in quotation marks: a sign that says "OPEN"'
    if MARK.search(QUOTED.sub(" ", prompt)):
        raise ValueError(f"reward ocr: the prompt {prompt!r} has a quotation mark without its partner. {hint}")
    found = QUOTED.findall(prompt) or SINGLE.findall(prompt)
    texts = ["".join(groups) for groups in found]  # of the groups, one for each kind of marks, one has matched
    if not QUOTED.search(prompt) and OPENING.search(" ".join([SINGLE.sub(" ", prompt), *texts])):
        raise ValueError(
            f"reward ocr: the prompt {prompt!r} has an apostrophe that may be a quotation mark without its partner. Put the "
            'text that the image should show in quotation marks that are none: a sign that says "OPEN"'
        )
    if not texts:
        raise ValueError(f"reward ocr: the prompt {prompt!r} quotes no text. {hint}")
    if not letters("".join(texts)):
        raise ValueError(
            f"reward ocr: what the prompt {prompt!r} quotes has no letter and no digit, which are compared. {hint}"
        )
    if unknown := {one for one in letters("".join(texts)) if one.isalpha() and not is_known(one)}:
        raise ValueError(
            f"reward ocr: the prompt {prompt!r} quotes {''.join(sorted(unknown))}, which the reader does not know. It reads "
            "Latin, Greek, Chinese and Japanese letters, and digits"
        )
    return texts


def is_known(letter: str) -> bool:
    """Whether the reader knows the script of a letter, with which its name in Unicode begins."""
    return unicodedata.name(letter, "").startswith(SCRIPTS)


# ---- comparing ----


def letters(text: str) -> str:
    """What is compared of a text: letters with their marks and digits, whatever their case and form (Unicode's NFKC)."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(one for one in folded if unicodedata.category(one)[0] in "LMN")


def compare(quotes: Sequence[str], text: str) -> tuple[float, bool]:
    """The score of a text that is read, in 0..1, and whether it is the quotes and nothing else.

    Quotes may stand in any order if they are few (MAX_ORDERED), else in the prompt's.
    """
    wanted, read = [one for one in map(letters, quotes) if one], letters(text)
    orders = sorted(set(permutations(wanted))) if len(wanted) <= MAX_ORDERED else [wanted]
    exact = read in map("".join, orders)
    length = sum(map(len, wanted))
    if any(has_in_order(order, read) for order in orders):
        return 1.0, exact
    if len(read) >= 2 * length:  # then as many letters at least are too many
        return 0.0, exact
    return max(0.0, 1 - min(edit_distance("".join(order), read) for order in orders) / length), exact


def has_in_order(wanted: Sequence[str], read: str) -> bool:
    """Whether all these texts are in `read`, one behind the other; there may be others between them."""
    end = 0
    for text in wanted:
        start = read.find(text, end)
        if start < 0:
            return False
        end = start + len(text)
    return True


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's distance: the fewest letters to insert, delete or exchange, row by row of the usual table."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


# ---- reading ----


def package_folder() -> Path:
    """Where rapidocr is installed, found without importing it."""
    spec = importlib.util.find_spec("rapidocr")
    return Path(*spec.submodule_search_locations)


def reader() -> Callable[[Image.Image], str]:
    """A function that reads an image: the text of its lines, from top to bottom, "" if it has none.

    Several threads may call it. An image is read by one thread, so it is read the same however many there are. Models are
    named by their paths, for otherwise rapidocr would download what it misses.
    """
    with Apart()():  # what is imported changes the environment, and warnings
        refuse_telemetry()
        import onnxruntime  # noqa: F401 - now, while that holds
        from rapidocr import RapidOCR

        engine = RapidOCR(
            params={
                "Global.log_level": "error",
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                **{f"{part}.model_path": str(package_folder() / path) for part, path in MODELS.items()},
            }
        )

    def read(image: Image.Image) -> str:
        # Where no line is found, or none can be read, the answer has no texts.
        return " ".join(getattr(engine(image), "txts", None) or ())

    return read
