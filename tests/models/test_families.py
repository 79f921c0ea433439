"""What depends on the model family is asked of the family, so that a new one is a module and a line in FAMILIES."""

import inspect
import re
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest
from conftest import ROOT, experiment, run_script
from safetensors import safe_open

from b2diffurl import models
from b2diffurl.configuration.settings import read_settings
from b2diffurl.evaluation.generate import deployed_sampler
from b2diffurl.export import export
from b2diffurl.models import FAMILIES, Description, Family, family, stable_diffusion
from b2diffurl.runtime import files

ASKED = {name: value for name, value in vars(Family).items() if inspect.isfunction(value) and not name.startswith("_")}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_answers_all_that_is_asked(name):
    """By methods of the same parameters."""
    found = models.family_of(name)
    assert ASKED.keys() >= {"load", "fingerprint", "sizes", "schedulers", "read_lora", "write_kohya", "describe"}
    for function, asked in ASKED.items():
        given, expected = (inspect.signature(one).parameters.values() for one in (getattr(found, function), asked))
        assert [(one.name, one.kind) for one in given] == [(one.name, one.kind) for one in expected if one.name != "self"]


def test_an_unknown_family_is_refused(config):
    model = replace(read_settings(config).model, family="sdxxl")
    for ask in (family, models.base_fingerprint, models.base_sizes):
        with pytest.raises(ValueError, match=r"unknown pretrained\.family 'sdxxl'; known: auto, stable_diffusion"):
            ask(model)


def test_only_the_families_know_stable_diffusion():
    """Outside of models/ and the embedded world nothing names a class, a part or a layer of it."""
    known = re.compile(
        r"StableDiffusion|UNet2D|AutoencoderKL|CLIPText(Model)?\b|unet\b|\bto_q\b|Karras|models\.stable_diffusion"
    )
    paths = [path for path in (ROOT / "b2diffurl").rglob("*") if path.suffix in (".py", ".md")]
    paths = [path for path in paths if not {"models", "shapes"} & set(path.relative_to(ROOT / "b2diffurl").parts)]
    assert len(paths) > 50
    assert [path.name for path in paths if known.search(path.read_text())] == []


@pytest.fixture
def mine(monkeypatch) -> Family:
    """A family `mine` beside Stable Diffusion, which is like it but for its words, schedulers and kohya's metadata."""
    module = ModuleType("b2diffurl.models.mine")
    module.FAMILY = stable_diffusion.StableDiffusionFamily()
    module.FAMILY.describe = lambda model: Description("My Diffusion", ("my-diffusion",), "MyPipeline", "transformer")
    module.FAMILY.schedulers = lambda: ["FlowMatchEulerDiscreteScheduler"]
    module.FAMILY.write_kohya = lambda path, state: models.lora.write_kohya(path, state, {"mine": "yes"})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(FAMILIES, "mine", "mine")
    return module.FAMILY


def test_a_new_family_is_a_module(mine, workplace, overrides, config):
    """Its evaluation's schedulers, its card and its files are its own, and nothing else had to be told of it."""
    config.pretrained.family = "mine"
    with pytest.raises(ValueError, match=r"'DDIMScheduler'; known: FlowMatchEulerDiscreteScheduler$"):
        deployed_sampler(read_settings(config))
    config.eval.deployed.scheduler = "FlowMatchEulerDiscrete"
    assert deployed_sampler(read_settings(config)).scheduler == "FlowMatchEulerDiscreteScheduler"
    path = experiment(workplace) / "config.json"
    record = files.read_json(path)
    record["config"]["pretrained"]["family"] = "mine"
    files.write_record(path, record)
    out = export(experiment(workplace), form="kohya")
    with safe_open(out / "tiny.safetensors", "pt") as file:
        assert file.metadata() == {"mine": "yes"}
    card = (out / "README.md").read_text()
    for words in (
        "- my-diffusion\n",
        "A LoRA for My Diffusion,",
        "changes the transformer alone",
        "MyPipeline.from_pretrained",
    ):
        assert words in card
    assert not re.search("Stable Diffusion|UNet|stable-diffusion", card)


def test_a_new_family_is_sampled(mine, overrides, tmp_path):
    """A script takes it by name; a scheduler that it does not name is refused before anything is loaded."""
    settings = overrides | {"pretrained.family": "mine"}
    ended = run_script(tmp_path, "sample", settings)
    assert (ended.code, "known: FlowMatchEulerDiscreteScheduler" in ended.stderr) == (2, True)
    mine.schedulers = stable_diffusion.FAMILY.schedulers
    ended = run_script(tmp_path, "sample", settings)
    assert ended.code == 0, ended.stderr
    assert files.read_json(experiment(tmp_path) / "config.json")["config"]["pretrained"]["family"] == "mine"


def test_asking_a_family_costs_little():
    """Sizes, which the dry run asks for, import neither diffusers nor peft."""
    code = "import sys, b2diffurl.models.stable_diffusion; print({'diffusers', 'peft'} & sys.modules.keys())"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "set()\n", ended.stderr
