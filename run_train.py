"""Update the LoRA on one stage: python run_train.py --config.run_name=stage0"""

from b2diffurl.configuration.command_line import run_script


def main(config):
    from b2diffurl.configuration.plan import alone_in
    from b2diffurl.phases.train import train_stage

    with alone_in(config):
        train_stage(config)


if __name__ == "__main__":
    run_script("train", main)
