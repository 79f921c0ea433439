"""Judge checkpoints, or draw one prompt: python run_eval.py --checkpoint=base,last --prompts=train,test"""

import json

from absl import flags

from b2diffurl.configuration.command_line import given_keys, run_script

flags.DEFINE_list(
    "checkpoint",
    ["base", "last"],
    "What to judge: base, last, stage<i>, stage<i>/checkpoint_<n>, one of these with /ema for the average of its LoRA, or "
    "the path of a LoRA; several with commas.",
)
flags.DEFINE_list("prompts", ["test"], "Prompts: train, test, or a prompt file; several with commas.")
flags.DEFINE_list(
    "sampler", ["training", "deployed"], "The sampler of training, or the one of config.eval.deployed; several with commas."
)
flags.DEFINE_boolean("all", False, "Judge the base model and the checkpoint of every stage: the learning curve.")
flags.DEFINE_boolean(
    "best", False, "Like --all; then name the checkpoint of best accuracy, or of best reward without a judge."
)
flags.DEFINE_boolean("due", False, "Judge the stage config.run_name if it is due by config.eval.every.")
flags.DEFINE_string(
    "prompt",
    None,
    "Only draw this prompt: by the base and the last of --checkpoint, with the last of --sampler.",
)


def main(config):
    from b2diffurl.configuration.plan import checked_settings, stage_index
    from b2diffurl.configuration.recorded import take_recorded
    from b2diffurl.evaluation.measure import every_checkpoint
    from b2diffurl.evaluation.statistics import name_best
    from b2diffurl.experiment.evaluation_table import headline
    from b2diffurl.experiment.lock import within_run
    from b2diffurl.phases.evaluate import draw_prompt, evaluate_and_show, evaluate_due
    from b2diffurl.runtime.logs import show
    from b2diffurl.runtime.paths import user_path

    given = flags.FLAGS
    # What defines the experiment comes from its config.json, unless the command line says otherwise.
    take_recorded(config, given_keys())
    settings = checked_settings(config)
    root = settings.output.root
    with within_run(root):
        if given.prompt is not None:
            picture = draw_prompt(settings, given.checkpoint[-1], given.prompt, given.sampler[-1])
            show(json.dumps({"prompt": given.prompt, "picture": str(picture)}))
        elif given.due:
            evaluate_due(settings, stage_index(config.run_name))
        else:
            checkpoints = every_checkpoint(root) if given.all or given.best else given.checkpoint
            prompt_sets = [name if name in ("train", "test") else user_path(name) for name in given.prompts]
            results = evaluate_and_show(settings, checkpoints, prompt_sets, given.sampler)
            shown = name_best(results, given.sampler[0]) if given.best else results[-1]
            show(json.dumps(headline(shown)))


if __name__ == "__main__":
    run_script("eval", main)
