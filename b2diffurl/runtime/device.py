"""Which device a network runs on, and in which precision. Errors say what this machine has."""

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Compute:
    """Where and how a network is to run."""

    dev_id: int  # number of the CUDA device; torchrun's processes take theirs by LOCAL_RANK instead
    mixed_precision: str  # auto | no | fp16 | bf16
    allow_tf32: bool
    compile: bool  # by torch.compile
    num_threads: int  # CPU threads of torch; 0: torch's default
    num_processes: int  # how many processes the run must have; 0: any number


def make_accelerator(compute: Compute, *, shared: bool = True) -> "Accelerator":
    """An Accelerator on the chosen CUDA device, or on the CPU of a machine without CUDA; sets what torch computes by.

    A ValueError says that the run has another number of processes than it must have. `shared` False skips that check: for
    work that one process does alone, such as evaluating.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():  # a bar would fill a log file with its redrawn lines
        transformers_logging.disable_progress_bar()
    if compute.num_threads:
        torch.set_num_threads(compute.num_threads)
    cuda, precision = choose_device(compute)
    if cuda and "LOCAL_RANK" not in os.environ:  # torchrun sets it, and accelerate then chooses the device
        torch.cuda.set_device(compute.dev_id)
    set_defaults(compute)
    # Explicitly 1: otherwise a variable of the environment would say by how much accelerate divides our gradients.
    once = GradientAccumulationPlugin(num_steps=1)
    accelerator = Accelerator(cpu=not cuda, mixed_precision=precision, gradient_accumulation_plugin=once)
    if (accelerator.device.type == "cuda") != cuda:
        raise ValueError(
            f"accelerate chose {accelerator.device}, by ACCELERATE_USE_CPU or ACCELERATE_TORCH_DEVICE in the environment. "
            "Unset them; CUDA_VISIBLE_DEVICES= hides the GPUs."
        )
    if shared and compute.num_processes and accelerator.num_processes != compute.num_processes:
        raise ValueError(
            f"num_processes is {compute.num_processes}, but this run has {accelerator.num_processes}. Start it by "
            "torchrun --nproc_per_node, as run_process.sh does with NumProcesses."
        )
    return accelerator


def set_defaults(compute: Compute) -> None:
    """Set what torch takes from its global state, which a configuration file or a library may have changed."""
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False  # it would choose kernels by timing them
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = compute.allow_tf32


def choose_device(compute: Compute) -> tuple[bool, str]:
    """(whether CUDA is used, precision: no | fp16 | bf16); a ValueError says what this machine lacks."""
    cuda = torch.cuda.is_available()
    if cuda and "LOCAL_RANK" not in os.environ and not 0 <= compute.dev_id < torch.cuda.device_count():
        raise ValueError(f"dev_id is {compute.dev_id}; this machine has CUDA devices 0..{torch.cuda.device_count() - 1}")
    precision = resolve_precision(compute.mixed_precision, cuda=cuda)
    # Without these checks torch would emulate the precision, slowly, or fail in the first layer.
    if precision == "fp16" and not cuda:
        raise ValueError("mixed_precision is fp16, which needs CUDA. On the CPU use no, or bf16.")
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"mixed_precision is bf16, which {torch.cuda.get_device_name()} lacks. Use fp16, or no.")
    return cuda, precision


def resolve_precision(wanted: str, *, cuda: bool) -> str:
    """The precision that `wanted` stands for. `auto` is no on the CPU; on CUDA bf16 if the device has it, else fp16."""
    if wanted != "auto":
        return wanted
    if not cuda:
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
