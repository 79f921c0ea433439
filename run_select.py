"""Score the images of one stage and select what is trained on: python run_select.py --config.run_name=stage0"""

from b2diffurl.configuration.usage import run_script


def main(config):
    from b2diffurl.configuration.plan import make_plan
    from b2diffurl.experiment import lock
    from b2diffurl.phases.select import select_stage

    plan = make_plan(config)
    with lock.holding(plan.stage.root):
        select_stage(plan)


if __name__ == "__main__":
    run_script("select", main)
