"""Judge checkpoints on held-out prompts, or draw a prompt: python run_eval.py --checkpoint=base,last --prompts=train,test"""

import json

from absl import flags

from b2diffurl.configuration.command_line import run_script

flags.DEFINE_list(
    "checkpoint",
    ["base", "last"],
    "base, last, stage<i>, stage<i>/checkpoint_<n>, or the path of a LoRA; several with commas.",
)
flags.DEFINE_list("prompts", ["test"], "train, test, or a prompt file; several with commas.")
flags.DEFINE_list(
    "sampler", ["training", "deployed"], "training's, or the one of config.eval.deployed; several with commas."
)
flags.DEFINE_boolean("all", False, "Judge the base and every stage's checkpoint: the learning curve.")
flags.DEFINE_boolean("best", False, "The same, and name the best checkpoint by accuracy, or by reward without a judge.")
flags.DEFINE_boolean("due", False, "After the newest stage of a run: judge it if it is its turn by config.eval.every.")
flags.DEFINE_string("prompt", None, "Draw this prompt by the base and the last checkpoint named, the last sampler.")


def main(config):
    from b2diffurl.configuration.plan import checked_settings, stage_index
    from b2diffurl.configuration.recorded import take_recorded
    from b2diffurl.evaluation.measure import every_checkpoint
    from b2diffurl.evaluation.statistics import name_best
    from b2diffurl.experiment.evaluation_table import headline
    from b2diffurl.experiment.lock import within_run
    from b2diffurl.phases.evaluate import draw_prompt, judge, judge_due

    given = flags.FLAGS
    set_here = [name for name in given if name.startswith("config.") and given[name].present]
    take_recorded(config, [name.removeprefix("config.") for name in set_here])
    settings = checked_settings(config)
    root = settings.output.root
    with within_run(root):
        if given.prompt is not None:
            picture = draw_prompt(settings, given.checkpoint[-1], given.prompt, given.sampler[-1])
            print(json.dumps({"prompt": given.prompt, "picture": str(picture)}), flush=True)
        elif given.due:
            judge_due(settings, stage_index(config.run_name))
        else:
            checkpoints = every_checkpoint(root) if given.all or given.best else given.checkpoint
            results = judge(settings, checkpoints, given.prompts, given.sampler)
            found = name_best(results, given.sampler[0]) if given.best else results[-1]
            print(json.dumps(headline(found)), flush=True)


if __name__ == "__main__":
    run_script("eval", main)
