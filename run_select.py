"""Score one stage and pick its contrast pairs: python run_select.py --config.run_name=stage0"""

from b2diffurl.configuration.command_line import run_script


def main(config):
    from b2diffurl.configuration.plan import alone_in
    from b2diffurl.phases.select import select_stage

    with alone_in(config):
        select_stage(config)


if __name__ == "__main__":
    run_script("select", main)
