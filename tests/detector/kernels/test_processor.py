"""The processor's instructions: of whom there are which, and that oneDNN's limit counts."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from detector.kernels import processor
from detector.kernels.processor import cpu_bfloat16, cpu_flags, instruction_set

EVERYTHING = {"sse4_1", "avx", "avx2", "fma3", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16"}


@pytest.fixture(autouse=True)
def no_limit(monkeypatch) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def flags(monkeypatch):
    """`flags(set)`: a processor with these."""
    return lambda found: monkeypatch.setattr(processor, "_processor_flags", lambda: frozenset(found))


@pytest.mark.parametrize(
    ("found", "name", "bfloat16"),
    [
        (EVERYTHING, "amx", "AMX"),
        (EVERYTHING - {"amx_tile", "amx_bf16"}, "avx512_bf16", "AVX-512 BF16"),
        ({"sse4_1", "avx", "avx2", "avx512_f", "amx_tile"}, "avx512", None),
        ({"sse4_1", "avx", "avx2", "avx_vnni"}, "avx2", None),
        ({"sse4_1"}, "sse", None),
        ({"neon", "bf16", "sve", "sve_bf16"}, "sve_bf16", "SVE BF16"),
        ({"asimd", "bf16", "svebf16"}, "sve_bf16", "SVE BF16"),
        ({"neon", "bf16"}, "neon_bf16", "NEON BF16"),
        ({"neon", "sve"}, "sve", None),
        ({"asimd"}, "neon", None),
        (set(), "unknown", None),
    ],
)
def test_processors(flags, found, name, bfloat16) -> None:
    flags(found)
    assert (instruction_set(), cpu_bfloat16()) == (name, bfloat16)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("SSE41", "sse"),
        ("AVX", "avx"),
        ("AVX2", "avx2"),
        ("avx2_vnni_2", "avx2"),
        ("AVX512_CORE", "avx512"),
        ("AVX512_CORE_VNNI", "avx512"),
        ("AVX512_CORE_BF16", "avx512_bf16"),
        ("AVX512_CORE_FP16", "avx512_bf16"),
        ("AVX10_1_512", "avx512_bf16"),
        ("AVX512_CORE_AMX", "amx"),
        ("AVX10_1_512_AMX", "amx"),
        ("ALL", "amx"),
        ("DEFAULT", "amx"),
        ("", "amx"),
        ("AVX3", "amx"),  # oneDNN does not know it either
    ],
)
def test_limit_of_onednn(flags, monkeypatch, value, name) -> None:
    flags(EVERYTHING)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", value)
    assert instruction_set() == name
    assert (cpu_bfloat16() is None) == (name in ("sse", "avx", "avx2", "avx512"))
    assert "fma3" in cpu_flags()


def test_a_limit_adds_nothing(flags, monkeypatch) -> None:
    flags({"sse4_1", "avx", "avx2"})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert (instruction_set(), cpu_bfloat16()) == ("avx2", None)
    flags({"neon", "bf16"})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert instruction_set() == "neon_bf16"


def test_the_newer_name_of_the_variable_wins(flags, monkeypatch) -> None:
    flags(EVERYTHING)
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    assert instruction_set() == "avx2"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert instruction_set() == "avx512"


def test_without_onednn_bfloat16_is_emulated(flags, monkeypatch) -> None:
    flags({"avx512_bf16"})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert cpu_bfloat16() is None
    assert instruction_set() == "avx512_bf16"


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="these are instructions of x86")
def test_the_limit_holds_for_onednn_itself() -> None:
    """In a process that starts under it oneDNN refuses bfloat16, on any processor."""
    program = (
        "import torch; from detector.kernels.processor import cpu_bfloat16; from detector.kernels.onednn import "
        "computes_bfloat16; print(cpu_bfloat16(), computes_bfloat16(), torch.ops.mkldnn._is_mkldnn_bf16_supported())"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["None", "False", "False"]


def test_flags_of_the_kernel_where_torch_has_none(monkeypatch, tmp_path) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    read = processor._processor_flags
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert read(str(file)) == {"fpu", "avx2", "avx512_f", "avx512_bf16"}
    file = tmp_path / "of_arm"
    file.write_text("Features\t: asimd bf16 svebf16\n")
    assert read(str(file)) == {"asimd", "bf16", "svebf16"}
    assert read(str(tmp_path / "none")) == set()
