"""Judge checkpoints on prompt files: python run_eval.py --checkpoint=base,last --prompts=train,test --grid"""

import json
from pathlib import Path

from absl import flags

from b2diffurl.runtime import logger, run_script

flags.DEFINE_list("checkpoint", ["last"], "base, last, stage<i>, or the path of a LoRA; several with commas.")
flags.DEFINE_list("prompts", ["test"], "train, test, or a prompt file; several with commas.")
flags.DEFINE_integer("num_steps", None, "Sampler steps; as in training if not given.", lower_bound=1)
flags.DEFINE_float("eta", None, "DDIM's eta, 0 is deterministic; as in training if not given.", 0.0, 1.0)
flags.DEFINE_float("guidance_scale", None, "Classifier-free guidance; as in training if not given.", 1.0)
flags.DEFINE_boolean("grid", False, "Draw the first images of each prompt file, base above tuned, into one PNG.")


def main(config):
    from b2diffurl.evaluate import SamplerSettings, evaluate
    from b2diffurl.report import draw_before_after

    given = {name: flags.FLAGS[name].value for name in ("num_steps", "eta", "guidance_scale")}
    settings = {name: config.sample[name] if value is None else value for name, value in given.items()}
    checkpoints = ["base"] * flags.FLAGS.grid + flags.FLAGS.checkpoint
    results = evaluate(config, checkpoints, flags.FLAGS.prompts, SamplerSettings(**settings))
    if flags.FLAGS.grid:
        grid = Path(config.save_path) / config.exp_name / "before_after.png"
        draw_before_after(results, grid, judged=bool(config.eval.judge))
        logger.info("eval before | after on the same noise: %s", grid)
    hidden = ("values", "diversity", "shown_prompts", "folder")
    print(json.dumps({key: value for key, value in results[-1].items() if key not in hidden}), flush=True)


if __name__ == "__main__":
    run_script("eval", main)
