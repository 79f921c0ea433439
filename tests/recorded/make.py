"""Record begun.zip, an experiment with one finished stage: python tests/recorded/make.py FOLDER

begun.zip was recorded on 2026-11-28 by commit b3ab02d, the last one before the package was divided into sub-packages. A
test goes on with it by today's code, so it must not be recorded again. It has no pictures and no report, to be small.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# What the experiment was begun with; a test goes on with it.
SETTINGS = {
    "exp_name": "begun",
    "num_threads": 1,
    "stage_cnt": 2,
    "split_step_left": 2,
    "split_step_right": 3,
    "split_time": 3,
    "sample.num_steps": 4,
    "sample.batch_size": 2,
    "sample.num_batches_per_epoch": 2,
    "reward.name": "jpeg_incompressibility",
    "eval.num_images": 4,
    "eval.batch_size": 4,
    "eval.every": 1,
    "eval.diversity": "()",
    "eval.deployed.num_steps": 4,
    "train.num_epochs": 1,
    "train.save_interval": 1,
    "train.batch_size": 2,
    "train.gradient_accumulation_steps": 1,
    "train.learning_rate": 1e-2,
    "train.lora_rank": 1,
    "keep.images": 0,
}
PROMPTS = "a red circle\na blue square\n"


def main(folder: Path) -> None:
    """Make the base model, prompts and the experiment's stage 0 in `folder`, and begun.zip beside this file."""
    import tiny

    tiny.exact_stable_diffusion(folder / "base")
    (folder / "prompts.txt").write_text(PROMPTS)
    places = {"pretrained.model": "base", "prompt_file": "prompts.txt", "eval.prompt_file": "prompts.txt"}
    flags = [f"--config.{key}={value}" for key, value in (SETTINGS | places).items()]
    for script, *more in (("sample",), ("select",), ("train",), ("eval", "--due")):
        command = [sys.executable, ROOT / f"run_{script}.py", f"--config={ROOT}/config/stage_process.py:sd14", *flags, *more]
        subprocess.run(command, cwd=folder, check=True, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    root = folder / "model" / "lora" / "begun"
    with zipfile.ZipFile(Path(__file__).with_name("begun.zip"), "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix not in (".png", ".html") and path.name != "tree.json":
                archive.write(path, path.relative_to(root))


if __name__ == "__main__":
    workplace = Path(sys.argv[1])
    shutil.rmtree(workplace, ignore_errors=True)
    main(workplace)
