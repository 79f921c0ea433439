"""Branch-sample one stage: python run_sample.py --config.run_name=stage0"""

from b2diffurl.configuration.command_line import run_script


def main(config):
    from b2diffurl.configuration.plan import alone_in
    from b2diffurl.phases.sample import sample_stage

    with alone_in(config):
        sample_stage(config)


if __name__ == "__main__":
    run_script("sample", main)
