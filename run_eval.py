"""Judge checkpoints, or draw one prompt: python run_eval.py --checkpoint=base,last --prompts=train,test"""

import json
import sys
from contextlib import nullcontext, redirect_stdout

from absl import flags

from b2diffurl.configuration.usage import run_script

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
    "best",
    False,
    "Like --all, by the first of --sampler; then name the checkpoint of best accuracy, or reward without a judge. It is "
    "chosen by half of the first of --prompts, and judged by the other half.",
)
flags.DEFINE_string(
    "validation", "", "With --best: choose by these prompts, train or a file, and judge by all of the others."
)
flags.DEFINE_boolean("due", False, "Judge the stage config.run_name if it is due by config.eval.every.")
flags.DEFINE_string(
    "prompt",
    None,
    "Only draw this prompt: by the base and the last of --checkpoint, with the last of --sampler.",
)
flags.DEFINE_boolean("verdict", True, "At the end tell what the newest judged stage has changed, and write the report anew.")
flags.DEFINE_boolean("json", False, "Print one JSON object and nothing else on stdout; log lines go to stderr.")


def main(config):
    from b2diffurl.runtime.logs import show

    as_json = flags.FLAGS.json
    # What a reward prints belongs to people, too.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        answer = judge(config)
    if as_json and answer is not None:
        show(json.dumps(answer))


def judge(config):
    """Do what the flags say; returns what --json prints: the last evaluation, or the best one."""
    from b2diffurl.configuration.command_line import given_keys
    from b2diffurl.configuration.plan import checked_settings, stage_index
    from b2diffurl.configuration.recorded import take_recorded
    from b2diffurl.evaluation.measure import every_checkpoint
    from b2diffurl.experiment.evaluation_table import headline
    from b2diffurl.experiment.lock import within_run
    from b2diffurl.phases.evaluate import (
        draw_prompt,
        evaluate_and_show,
        evaluate_and_warn,
        evaluate_due,
        judge_best,
        tell_verdict,
    )
    from b2diffurl.runtime.logs import announce
    from b2diffurl.runtime.paths import user_path

    given = flags.FLAGS
    # What defines the experiment comes from its config.json, unless the command line says otherwise.
    take_recorded(config, given_keys())
    settings = checked_settings(config)
    root = settings.output.root
    prompt_sets = [name if name in ("train", "test") else user_path(name) for name in (*given.prompts, given.validation)]
    *prompt_sets, validation = prompt_sets
    with within_run(root):
        if given.prompt is not None:
            picture = str(draw_prompt(settings, given.checkpoint[-1], given.prompt, given.sampler[-1]))
            announce(f"Drawn: {picture}")
            return {"prompt": given.prompt, "picture": picture}
        if given.due:
            return evaluate_due(settings, stage_index(config.run_name))
        if given.best:
            return judge_best(settings, prompt_sets[0], given.sampler[0], validation)
        checkpoints = every_checkpoint(root) if given.all else given.checkpoint
        judge = evaluate_and_show if given.verdict else evaluate_and_warn
        results = judge(settings, checkpoints, prompt_sets, given.sampler)
        if given.verdict and any(one["stage"] is not None for one in results):
            tell_verdict(settings)
        return headline(results[-1])


if __name__ == "__main__":
    run_script("eval", main)
