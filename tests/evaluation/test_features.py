"""Features of other models: the Inception Score of a classifier of transformers."""

import numpy as np
import pytest
import tiny
from conftest import PROMPTS, experiment, run_evaluation
from PIL import Image
from safetensors.torch import load_file, save_file


def test_inception_score_of_a_classifier(overrides, tmp_path):
    """`inception` among eval.diversity: of each prompt the Inception Score of the classes that a real classifier of
    transformers sees in its images, as computed here from its logits one image at a time."""
    from transformers import AutoImageProcessor, ViTForImageClassification

    folder = tiny.classifier(tmp_path / "vit")
    settings = {"eval.diversity": ("inception",), "eval.inception.model": str(folder)}
    (result,) = run_evaluation(tmp_path, overrides, ["base"], **settings)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    classifier = ViTForImageClassification.from_pretrained(folder).eval()
    expected = {}
    for n, prompt in enumerate(PROMPTS):
        images = [experiment(tmp_path) / result["folder"] / f"{row:05d}.png" for row in (n, n + 3)]
        pixels = [processor(images=Image.open(path), return_tensors="pt").pixel_values for path in images]
        seen = np.stack([classifier(one).logits.softmax(1).detach().numpy()[0] for one in pixels])
        assert np.abs(seen[0] - seen[1]).max() > 1e-3
        divergences = (seen * np.log(seen / seen.mean(0))).sum(1)
        expected[prompt] = np.exp(divergences.mean())
    assert result["diversity"]["inception"]["all"] == pytest.approx(expected, abs=1e-5)
    assert result["diversity/inception"] == pytest.approx(np.mean(list(expected.values())), abs=1e-5)
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    save_file({name: value * 2 for name, value in weights.items()}, path, metadata={"format": "pt"})
    (other,) = run_evaluation(tmp_path, overrides, ["base"], **settings)
    assert other["conditions"] != result["conditions"]
