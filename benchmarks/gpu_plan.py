"""What benchmarks.on_gpu measures: its items in the order of what a minute brings, each with an estimate of its time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu_models import MODELS, SCORER
from benchmarks.network import COMPILED

NETWORKS = {"sd14": COMPILED, "sdxl": ("no", "blocks", "transformers", "whole"), "sd35": ("no", "blocks", "whole")}
BATCHES = 4  # of the 32 of the preset: 160 images, whose seconds are scaled to 1,280
FEW = {"sample.num_batches_per_epoch": BATCHES}
ONE_BATCH = {"sample.num_batches_per_epoch": 1, "train.num_epochs": 1}
COMPILE = "compile"
BUILD_SECONDS = {"sd14": 10, SCORER: 10, "sdxl": 20, "sd35_medium": 20}  # of a model's files
# Seconds in which a way of a network is compiled by itself, on 16 cores. Those of sd14's blocks were measured on an H200.
COMPILE_SECONDS = {
    ("sd14", "blocks"): 110,
    ("sd14", "transformers"): 130,
    ("sd14", "whole"): 180,
    ("sd14", "graphs"): 250,
    ("sdxl", "blocks"): 150,
    ("sdxl", "transformers"): 180,
    ("sdxl", "whole"): 300,
    ("sd35", "blocks"): 60,
    ("sd35", "whole"): 100,
}


@dataclass(frozen=True)
class Item:
    """A measurement that is made in a process of its own."""

    name: str
    what: str  # the function of benchmarks.gpu_items that makes it
    seconds: float  # estimate, with its models built and its network compiled
    arguments: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ()  # that it needs
    compiled: tuple[str, str] | None = None  # preset and way of the network that it needs
    extra: bool = False  # beyond the 25 minutes: only if it is asked for

    @property
    def cold_seconds(self) -> float:
        """More, if its network was not compiled before."""
        return COMPILE_SECONDS[self.compiled] if self.compiled else 0.0


def network(preset: str, way: str) -> Item:
    arguments, pair = {"preset": preset, "way": way}, None if way == "no" else (preset, way)
    return Item(f"network-{preset}-{way}", "network", {"graphs": 40}.get(way, 30), arguments, (MODELS[preset],), pair)


def stage(name: str, preset: str, seconds: float, settings: Mapping[str, Any], *, extra: bool = False) -> Item:
    arguments, pair = {"preset": preset, "settings": dict(settings)}, (preset, "blocks") if "compile" in settings else None
    return Item(name, "stage", seconds, arguments, (MODELS[preset], SCORER), pair, extra)


def peers(name: str, seconds: float, *, fused: bool = False, extra: bool = False) -> Item:
    arguments = {"preset": "sd14", "num_images": 40, "fused": fused}
    return Item(name, "peers", seconds, arguments, (MODELS["sd14"], SCORER), extra=extra)


# Longest first, so that none is alone at the end.
PAIRS = sorted(COMPILE_SECONDS, key=lambda pair: -COMPILE_SECONDS[pair])
# First what is not compiled, about a call of nine minutes; then the compiler, with most of a call; then what needs it.
ITEMS = (
    Item("matmul", "matmul", 15),
    network("sd14", "no"),
    stage("stage-sd14", "sd14", 95, FEW),
    peers("stage-sd14-peers", 95),
    network("sd35", "no"),
    network("sdxl", "no"),
    stage("memory-sd14_10gb", "sd14_10gb", 60, ONE_BATCH),
    Item(COMPILE, "compile", 380, {"pairs": PAIRS}, tuple(dict.fromkeys(MODELS[preset] for preset, _ in PAIRS))),
    stage("stage-sd14-compiled", "sd14", 105, FEW | {"compile": True}),
    *(network(preset, way) for preset in ("sd14", "sdxl", "sd35") for way in NETWORKS[preset] if way != "no"),
    stage("memory-sdxl_24gb", "sdxl_24gb", 70, ONE_BATCH | {"sample.batch_size": 2}),
    stage("memory-sd35_24gb", "sd35_24gb", 50, ONE_BATCH | {"sample.batch_size": 4}),
    stage("stage-sd14_nft", "sd14_nft", 65, {"sample.num_batches_per_epoch": 2}),
    Item("tests", "tests", 130, models=("sd14",)),
    stage("stage-sd14-compiled-whole", "sd14", 400, {"compile": True}, extra=True),
    peers("stage-sd14-peers-fused", 100, fused=True, extra=True),
    stage("stage-sd35", "sd35", 120, ONE_BATCH, extra=True),
    stage("stage-sdxl", "sdxl", 200, ONE_BATCH, extra=True),
)
NAMES = tuple(item.name for item in ITEMS)


def compiled_name(preset: str, way: str) -> str:
    """The name of the file that says that a network was compiled here in this way."""
    return f"compiled-{preset}-{way}"
