"""Zero-shot object detection by a model of transformers: boxes of the objects whose classes are given as words.

H, W an image's height and width, B boxes, C classes, L tokens of a text
"""

import json
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

from b2diffurl.rewards.geneval import Seen
from b2diffurl.runtime.hub import load_whole, model_folder

BY_QUERIES = ("owlv2", "owlvit")  # a text for each class (Minderer et al. 2023, arXiv 2306.09683)
BY_TOKENS = ("grounding-dino", "mm-grounding-dino")  # one text with all classes (Liu et al. 2023, arXiv 2303.05499)


def check_detector(model: str) -> None:
    """Raise an error if `model`, a hub id or directory, is no detector that `Detector` knows, or lacks a package."""
    kind = model_type(model)
    if kind not in (*BY_QUERIES, *BY_TOKENS):
        known = ", ".join((*BY_QUERIES, *BY_TOKENS))
        raise ValueError(f"{model} is a model of type {kind!r}, and no zero-shot object detector of the types {known}")
    if kind == "owlv2" and not find_spec("scipy"):
        raise ModuleNotFoundError("OWLv2 resizes images by scipy: pip install -r requirements-rewards.txt")


def model_type(model: str) -> str:
    """What transformers calls the architecture, from config.json."""
    return json.loads((model_folder(model) / "config.json").read_bytes()).get("model_type", "")


class Detector:
    """A zero-shot object detector, by hub id or directory. Call it with one image uint8 [H,W,3] and the classes to look for.

    It gets one image at a time. OWLv2 pads the texts of a batch to the image with most classes, and takes the padding for
    classes; Grounding DINO pads its tokens. So in a batch an image's boxes would depend on its neighbours' prompts.
    """

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype):
        root = model_folder(model)
        self.by_tokens = model_type(model) in BY_TOKENS
        self.model = load_whole(AutoModelForZeroShotObjectDetection, root, dtype, device)
        self.processor = AutoProcessor.from_pretrained(root, backend="pil", trust_remote_code=False)
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def __call__(self, image: Tensor, classes: Sequence[str], threshold: float) -> list[Seen]:
        """The objects with a score above `threshold`. A box counts for one class, the one that fits it best."""
        texts = list(classes) if self.by_tokens else [f"a photo of a {name}" for name in classes]
        self.require_readable(texts)
        picture = image.permute(2, 0, 1).cpu()
        inputs = self.processor(images=[picture], text=[texts], return_tensors="pt")
        inputs = inputs.to(self.device, self.dtype)
        outputs = self.model(**inputs)
        if self.by_tokens:
            outputs.logits = self.class_logits(outputs.logits, inputs.input_ids[0].tolist(), len(classes))
        outputs.logits, outputs.pred_boxes = outputs.logits.float(), outputs.pred_boxes.float()
        if not outputs.logits.isfinite().all():  # a NaN is above no threshold, so nothing would seem to be there
            raise FloatingPointError(f"the detector overflows in {self.dtype}; take --config.reward.dtype=float32")
        (found,) = self.processor.image_processor.post_process_object_detection(
            outputs, threshold=threshold, target_sizes=[tuple(image.shape[:2])]
        )
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        return [Seen(classes[label], score, tuple(box)) for label, score, box in rows]

    def require_readable(self, texts: Sequence[str]) -> None:
        """Refuse texts that the model would cut: it would look for something else than it is told."""
        config = self.model.config
        texts = [". ".join(texts) + "."] if self.by_tokens else texts
        most = config.max_text_len if self.by_tokens else config.text_config.max_position_embeddings
        for text, tokens in zip(texts, self.processor.tokenizer(texts).input_ids, strict=True):
            if len(tokens) > most:
                raise ValueError(
                    f"the detector reads {most} tokens, and {text!r} has {len(tokens)}; give fewer classes, or shorter names"
                )

    def class_logits(self, logits: Tensor, tokens: Sequence[int], num_classes: int) -> Tensor:
        """Logits of classes [1,B,C] from logits of tokens [1,B,L]: the largest of a class's own tokens.

        The text is `cat. dog.`, so a full stop ends each class. Marks and full stops belong to none.
        """
        stop = self.processor.tokenizer.convert_tokens_to_ids(".")
        ends = [n for n, token in enumerate(tokens) if token == stop]
        if len(ends) != num_classes:
            raise ValueError(
                f"the detector reads {len(ends)} classes in a text of {num_classes}; give fewer or shorter names"
            )
        starts = [1, *(end + 1 for end in ends)]  # a mark comes first
        return torch.stack([logits[..., start:end].amax(-1) for start, end in zip(starts, ends, strict=False)], dim=-1)
