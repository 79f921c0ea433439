"""Rebuild the embedded world from nothing: autoencoder, base models, scorer, figures.

python -m b2diffurl.shapes.build                  everything, in order; run it again to go on after a stop
python -m b2diffurl.shapes.build --only vae       one stage: prompts, vae, base, scorer, flow or figures
python -m b2diffurl.shapes.build --figures        measure what is shipped, train nothing
python -m b2diffurl.shapes.build --figures flow   measure one part alone
"""

import argparse
import json
import logging
from pathlib import Path

BASE_DIR, CLIP_DIR, FLOW_DIR = Path("model/shapes/base"), Path("model/shapes/clip"), Path("model/shapes_flow")
FIGURES_PATH, GRID_PATH = Path("model/shapes/figures.json"), Path("docs/shapes.png")
PROMPT_DIR = Path("config/prompt")

log = logging.getLogger(__name__)


def write_prompts() -> None:
    """The six prompt files of the world, all relation prompts of the train half, and those to tune on."""
    from b2diffurl.shapes.scene import all_relation_prompts, development_split, prompt_sets

    PROMPT_DIR.mkdir(parents=True, exist_ok=True)
    more = {"shapes_relation_train_all": all_relation_prompts()} | development_split()
    for name, prompts in (prompt_sets() | more).items():
        (PROMPT_DIR / f"{name}.json").write_text(json.dumps(prompts, indent=1) + "\n")


def build_vae() -> None:
    from b2diffurl.shapes.train_vae import train_vae

    train_vae(BASE_DIR)


def build_base() -> None:
    from b2diffurl.shapes.train_base import train_base

    train_base(BASE_DIR)


def build_scorer() -> None:
    from b2diffurl.shapes.train_scorer import train_scorer

    train_scorer(BASE_DIR, CLIP_DIR)


def build_flow() -> None:
    from b2diffurl.shapes.train_flow import train_flow

    train_flow(BASE_DIR, CLIP_DIR, FLOW_DIR)


def measure_figures(only: str | None = None) -> None:
    from b2diffurl.shapes.figures import measure

    measure(BASE_DIR, CLIP_DIR, FLOW_DIR, FIGURES_PATH, GRID_PATH, only)


STAGES = {
    "prompts": write_prompts,
    "vae": build_vae,
    "base": build_base,
    "scorer": build_scorer,
    "flow": build_flow,
    "figures": measure_figures,
}


def main() -> None:
    """Parse, then run the chosen stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STAGES, help="run this stage alone")
    parser.add_argument("--figures", nargs="?", const="", metavar="PART", help="same as --only figures, or one part of them")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.figures is not None:
        measure_figures(args.figures or None)
        return
    for stage in [args.only] if args.only else STAGES:
        log.info("stage %s", stage)
        STAGES[stage]()


if __name__ == "__main__":
    main()
