"""Sample the images of one stage: python run_sample.py --config.run_name=stage0"""

from b2diffurl.configuration.usage import run_script


def main(config):
    from b2diffurl.configuration.plan import make_plan
    from b2diffurl.experiment import lock
    from b2diffurl.phases.sample import sample_stage

    plan = make_plan(config)
    with lock.holding(plan.stage.root):
        sample_stage(plan)


if __name__ == "__main__":
    run_script("sample", main)
