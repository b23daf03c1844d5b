"""The einsum operator on CPUs in float32 and float64: einsum.c, compiled at first use.

The compiler is $CC, or the first of cc, gcc and clang that exists. The library is kept in
$XDG_CACHE_HOME/einsum-kernels (~/.cache), under a hash of source, flags, compiler and CPU. If it cannot be
built or loaded, a RuntimeWarning says why in one sentence, and the torch body computes instead.
"""
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("einsum.c")
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-shared", "-fPIC"]
MACROS = {torch.float32: ["-DREAL=float"], torch.float64: ["-DREAL=double", "-DDOUBLE"]}
CPU_FLAGS = (["-march=native"], ["-mcpu=native"], [])  # the first that the compiler takes


def _compiler() -> list[str]:
    """The compiler's command. Raises OSError if there is none."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise OSError("there is no C compiler (cc, gcc or clang)")


def _cpu() -> str:
    """What tells one kind of CPU from another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
        return "\n".join([platform.machine(), *sorted(kinds)])
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _run(command: list[str]) -> str:
    """The command's output. Raises OSError, with its first error, if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise OSError(f"{command[0]} cannot be run ({e})") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        line = next((line for line in lines if "error" in line), lines[-1])
        raise OSError(f"{command[0]} failed with exit status {done.returncode}: {line}")
    return done.stdout


def build(dtype: torch.dtype, folder: Path) -> Path:
    """The compiled library for a dtype in the folder, made if it is not there. Raises OSError."""
    compiler = _compiler()
    version = _run([*compiler, "--version"])
    text = "\0".join([SOURCE.read_text(), *FLAGS, *MACROS[dtype], *compiler, version, _cpu()])
    path = folder / f"einsum-{hashlib.sha256(text.encode()).hexdigest()[:24]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)  # other processes may compile it too
    os.close(handle)
    try:
        for cpu_flags in CPU_FLAGS:
            try:
                _run([*compiler, *FLAGS, *cpu_flags, *MACROS[dtype], str(SOURCE), "-o", unfinished,
                      "-lm", "-lpthread"])
                break
            except OSError:
                if not cpu_flags:
                    raise
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return path


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "einsum-kernels"


def load(path: Path) -> ctypes.CDLL:
    """The library with its functions' types. Raises OSError."""
    library = ctypes.CDLL(str(path))
    library.scratch_size.restype = library.vector_bits.restype = ctypes.c_int64
    library.forward.argtypes = [ctypes.c_void_p] * 12
    library.backward.argtypes = [ctypes.c_void_p] * 16
    return library


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled einsum.c for a dtype, or None, with a warning, if it cannot be built or loaded."""
    try:
        return load(build(dtype, cache_folder()))
    except (OSError, RuntimeError) as e:  # RuntimeError: there is no home folder
        warnings.warn(f"einsums use PyTorch's products, which are slower, since {e}", RuntimeWarning,
                      stacklevel=2)
        return None


@functools.lru_cache(maxsize=1024)
def _scratch(dtype: torch.dtype, dims: bytes, backward: int) -> int:
    """How many numbers of scratch memory a call needs."""
    sizes = (ctypes.c_int64 * 13).from_buffer_copy(dims)
    return library(dtype).scratch_size(sizes, ctypes.c_int64(backward))


@functools.cache
def _openmp() -> ctypes.c_void_p:
    """GOMP_parallel of the OpenMP that torch is linked to, so that its threads are used; else null."""
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return ctypes.c_void_p()


def _sizes(x: Tensor, first: Tensor, routed: bool, top_k: int, sizes, swapped: bool):
    T = x.shape[0]
    slots = max(1, min(torch.get_num_threads(), T // 32))
    return (ctypes.c_int64 * 13)(T, len(first), top_k, routed, *sizes, swapped, slots)


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def forward(x, first, second, router, balance, experts, top_k, sizes, swapped):
    """See operators.einsum. All tensors are contiguous, and of one type; experts are of int64.

    Raises IndexError for experts that do not exist, or rows without one: einsum.c would read out of bounds.
    """
    if experts is not None and len(experts) != len(x):
        raise IndexError(f"experts has {len(experts)} rows, and x {len(x)}")
    if experts is not None and len(experts):
        least, most = map(int, experts.aminmax())
        if least < 0 or most >= len(first):
            raise IndexError(f"experts must be from 0 to {len(first) - 1}; got {least} to {most}")
    lib, routed = library(x.dtype), router is not None
    dims = _sizes(x, first, routed, top_k, sizes, swapped)
    _, _, _, d, e, f, _ = sizes
    y = x.new_empty(x.shape[0], d * e * f)
    logits = x.new_empty(x.shape[0], len(first)) if routed else None
    chosen = x.new_empty(x.shape[0], top_k, dtype=torch.int64) if routed else experts
    scratch = x.new_empty(_scratch(x.dtype, bytes(dims), 0))
    lib.forward(dims, *_pointers(scratch), _openmp(),
                *_pointers(x, first, second, router, balance, experts, y, logits, chosen))
    return y, logits, chosen


def backward(dy, dlogits, x, first, second, router, experts, logits, chosen, sizes, swapped):
    """See operators.einsum. All tensors are contiguous, and of one type."""
    lib, routed = library(x.dtype), router is not None
    dims = _sizes(x, first, routed, chosen.shape[1] if routed else 1, sizes, swapped)
    dx, dfirst, dsecond = (torch.empty_like(t) for t in (x, first, second))
    drouter = torch.empty_like(router) if routed else None
    scratch = x.new_empty(_scratch(x.dtype, bytes(dims), 1))
    lib.backward(dims, *_pointers(scratch), _openmp(),
                 *_pointers(dy, dlogits, x, first, second, router, experts, logits, chosen, dx, dfirst,
                            dsecond, drouter))
    return dx, dfirst, dsecond, drouter
