"""Branch-sample one stage: python run_sample.py --config.run_name=stage0"""

from b2diffurl.script import run_script


def main(config):
    from b2diffurl.experiment import alone_in
    from b2diffurl.sample import sample_stage

    with alone_in(config):
        sample_stage(config)


if __name__ == "__main__":
    run_script("sample", main)
