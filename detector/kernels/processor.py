"""What the processor's instructions are, as oneDNN may use them.

The environment variable `ONEDNN_MAX_CPU_ISA` of oneDNN (older: `DNNL_MAX_CPU_ISA`) keeps it from newer instructions;
`AVX2`, set before the process starts, makes a machine with AVX-512 behave as one without. What is chosen by processor
asks here, so that all choices follow.
"""

import os
from functools import lru_cache
from pathlib import Path

import torch

# Of x86, oldest first; names are those of torch.cpu.get_capabilities.
_X86 = ("sse4_1", "avx", "avx2", "avx512_f", "avx512_bf16", "amx_bf16")
# The newest of these under each value of the variable. Under any other, of AMX or unknown to oneDNN, all of them.
_NEWEST = {
    "sse41": "sse4_1",
    "avx": "avx",
    "avx2": "avx2",
    "avx2_vnni": "avx2",
    "avx2_vnni_2": "avx2",  # its bfloat16 is a conversion to float32
    "avx512_core": "avx512_f",
    "avx512_core_vnni": "avx512_f",
    "avx512_core_bf16": "avx512_bf16",
    "avx512_core_fp16": "avx512_bf16",
    "avx10_1_512": "avx512_bf16",
    "avx10_2": "avx512_bf16",
    "avx10_2_512": "avx512_bf16",
}

# The best first: name in torch.cpu.get_capabilities or /proc/cpuinfo, ours, and what computes bfloat16, for people.
_SETS = (
    ("amx_bf16", "amx", "AMX"),
    ("avx512_bf16", "avx512_bf16", "AVX-512 BF16"),
    ("avx512_f", "avx512", None),
    ("avx2", "avx2", None),
    ("avx", "avx", None),
    ("sse4_1", "sse", None),
    ("sve_bf16", "sve_bf16", "SVE BF16"),
    ("svebf16", "sve_bf16", "SVE BF16"),
    ("bf16", "neon_bf16", "NEON BF16"),
    ("sve", "sve", None),
    ("neon", "neon", None),
    ("asimd", "neon", None),
)


def instruction_set() -> str:
    """Return the newest instructions for arrays that may be used.

    Of x86 `amx`, `avx512_bf16`, `avx512`, `avx2`, `avx`, `sse`; of ARM `sve_bf16`, `neon_bf16`, `sve`, `neon`;
    `unknown` otherwise.
    """
    flags = cpu_flags()
    return next((name for flag, name, _ in _SETS if flag in flags), "unknown")


def cpu_bfloat16() -> str | None:
    """Return the name of the instructions for bfloat16 that torch's convolutions use, or None where there are none.

    Without them bfloat16 is emulated, and slower than float32.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    flags = cpu_flags()
    return next((words for flag, _, words in _SETS if words and flag in flags), None)


def cpu_flags() -> set[str]:
    """Return the processor's flags up to the limit of the environment, named as by `torch.cpu.get_capabilities`."""
    value = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    newest = _NEWEST.get(value.lower(), _X86[-1])
    return set(_processor_flags()) - set(_X86[_X86.index(newest) + 1 :])


@lru_cache
def _processor_flags(cpuinfo: str = "/proc/cpuinfo") -> frozenset[str]:
    if hasattr(torch.cpu, "get_capabilities"):
        return frozenset(name for name, value in torch.cpu.get_capabilities().items() if value is True)
    path = Path(cpuinfo)  # older torch
    lines = path.read_text().splitlines() if path.is_file() else []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return frozenset("avx512_f" if flag == "avx512f" else flag for flag in flags)
