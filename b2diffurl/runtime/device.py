"""Where a network runs and in which precision; errors say what this machine has."""

import os
import sys
from typing import TYPE_CHECKING

import torch
from ml_collections import ConfigDict

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(config: ConfigDict, num_threads: int, *, shared: bool = True) -> "Accelerator":
    """An Accelerator on the chosen CUDA device if there is one, else on the CPU; `num_threads` 0 keeps torch's default. What
    is not `shared` is one process's work, however many a run has."""
    from accelerate import Accelerator
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    if num_threads:
        torch.set_num_threads(num_threads)
    cuda, precision = choose_device(config)
    if cuda and "LOCAL_RANK" not in os.environ:
        torch.cuda.set_device(config.dev_id)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    accelerator = Accelerator(cpu=not cuda, mixed_precision=precision)
    if shared and config.num_processes and accelerator.num_processes != config.num_processes:
        raise ValueError(
            f"num_processes is {config.num_processes}, but this is one of {accelerator.num_processes}. Start it by torchrun "
            "--nproc_per_node, as run_process.sh does with NumProcesses."
        )
    return accelerator


def choose_device(config: ConfigDict) -> tuple[bool, str]:
    """Whether CUDA is used, and the precision (no, fp16, bf16); a ValueError for what this machine has not got."""
    cuda = torch.cuda.is_available()
    if cuda and "LOCAL_RANK" not in os.environ and not 0 <= config.dev_id < torch.cuda.device_count():
        raise ValueError(f"dev_id is {config.dev_id}; this machine has CUDA devices 0..{torch.cuda.device_count() - 1}")
    precision = resolve_precision(config.mixed_precision, cuda=cuda)
    if precision == "fp16" and not cuda:
        raise ValueError("mixed_precision is fp16, which needs CUDA. On the CPU use no, or bf16.")
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"mixed_precision is bf16, which {torch.cuda.get_device_name()} lacks. Use fp16, or no.")
    return cuda, precision


def resolve_precision(wanted: str, *, cuda: bool) -> str:
    """`auto`: none on the CPU; on CUDA bf16 where the device has it, else fp16."""
    if wanted != "auto":
        return wanted
    if not cuda:
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
