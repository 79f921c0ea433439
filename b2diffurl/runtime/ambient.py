"""What a process finds around it, and no setting says: variables of the environment, flags of the interpreter.

Each is set by us, refused, or recorded in the manifests (`recorded`). docs/reliability.md has the table.
"""

import os
import sys
import warnings

# Variables that change what is computed behind the back of a setting: {name: (harmless values, what to do instead)}.
OFF = ("", "0", "false", "no", "off", "n", "f")
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": (OFF, "a LoRA is small enough for plain data parallelism"),
    "ACCELERATE_USE_FSDP": (OFF, "a LoRA is small enough for plain data parallelism"),
    "ACCELERATE_USE_MEGATRON_LM": (OFF, "a LoRA is small enough for plain data parallelism"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (OFF, "a LoRA is small enough for plain data parallelism"),
    "ACCELERATE_DYNAMO_BACKEND": (OFF, "--config.compile compiles the network"),
    "NVIDIA_TF32_OVERRIDE": (("",), "--config.allow_tf32 says it"),
    "ONEDNN_DEFAULT_FPMATH_MODE": (("", "strict"), "--config.mixed_precision says it"),
    "DNNL_DEFAULT_FPMATH_MODE": (("", "strict"), "--config.mixed_precision says it"),
}
# Variables that choose among kernels, which differ by rounding.
RECORDED = (
    "ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "DIFFUSERS_ATTN_BACKEND", "DISABLE_ADDMM_CUDA_LT", "DNNL_MAX_CPU_ISA",
    "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_TUNABLEOP_ENABLED", "TORCH_BLAS_PREFER_CUBLASLT", "TORCH_CUDNN_V8_API_DISABLED", "TORCH_LINALG_PREFER_CUSOLVER",
    "USE_HUB_KERNELS",
)  # fmt: skip
# How launchers other than torchrun say the number of processes: accelerate listens to them, the lock and the log do not.
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def require_usable() -> None:
    """Refuse, by a ValueError, an environment in which results would be wrong. Called first of all by every script."""
    if sys.flags.optimize > 1:
        raise ValueError("PYTHONOPTIMIZE is 2, which takes the docstrings that transformers needs. Unset it")
    for name, (harmless, instead) in REFUSED.items():
        value = os.environ.get(name, "")
        if value.lower() not in harmless:
            raise ValueError(f"{name} is {value!r} in the environment. Unset it: {instead}")
    require_whole_group()


def require_whole_group() -> None:
    """Refuse variables of torchrun that do not fit together: they are left over from another program's run."""
    for name in MPI_SIZES:
        if os.environ.get(name, "1") != "1" and "WORLD_SIZE" not in os.environ:
            raise ValueError(
                f"{name} is {os.environ[name]!r}, but processes are started by torchrun. Start this script by torchrun"
            )
    given = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
    if not given:
        return
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    numbers = {name: int(value) for name, value in given.items() if value.isdecimal() and len(value) < 8}
    whole = len(numbers) == 3 and numbers["LOCAL_RANK"] <= numbers["RANK"] < numbers["WORLD_SIZE"]
    addressed = "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ
    if not whole or (numbers["WORLD_SIZE"] > 1 and not addressed):
        raise ValueError(
            f"the environment has {shown}, which no launcher leaves so. Unset RANK, LOCAL_RANK and WORLD_SIZE, or start "
            "several processes by torchrun, as run_process.sh does with NumProcesses"
        )


def calm_warnings() -> None:
    """Show warnings instead of raising them as PYTHONWARNINGS=error has it: the libraries warn of many things."""
    if any(option.startswith("error") for option in sys.warnoptions):
        warnings.simplefilter("default")


def refuse_telemetry() -> None:
    """Have onnxruntime report nothing to its makers, and leave no files in ~/.cache, unless the user has said otherwise.

    It looks at the variable once, when it is imported. Where it is installed diffusers may import it.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def recorded() -> dict[str, str]:
    """The variables of RECORDED that are set, for manifests."""
    return {name: os.environ[name] for name in RECORDED if name in os.environ}
