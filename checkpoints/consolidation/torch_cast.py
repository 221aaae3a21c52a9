"""Cast arrays of numbers with torch's own kernels, without importing torch.

`import torch` takes 1.4 to 2 s, loading its C++ library 0.2 s. The library has a stable C interface (that of
AOTInductor), of which three functions are enough. Where it is not to be had, torch is imported.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..formats.tensors import DTYPES

Bytes = NDArray[np.uint8]
# Copies numbers between two buffers of as many elements; the names are those of torch's dtypes.
Copier = Callable[[Bytes, str, Bytes, str], None]


@functools.lru_cache(maxsize=1)
def copier() -> Copier:
    """Return the function that casts; both ways round as torch does, bit for bit."""
    library = _library()
    return _imported_copier if library is None else functools.partial(_copy, library)


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    found = importlib.util.find_spec("torch")
    folders = (found.submodule_search_locations if found is not None else None) or []
    for path in (Path(folder, "lib", "libtorch_cpu.so") for folder in folders):
        try:
            return _declared(ctypes.CDLL(str(path)))
        except (OSError, AttributeError):  # another system's name, or a torch before 2.2
            continue
    return None


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Say what the functions take; raise AttributeError where one is missing."""
    address, sizes = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int64)
    library.aoti_torch_create_tensor_from_blob.argtypes = (
        *(address, ctypes.c_int64, sizes, sizes, ctypes.c_int64),
        *(ctypes.c_int32, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(address)),
    )
    library.aoti_torch_copy_.argtypes = (address, address, ctypes.c_int32)
    library.aoti_torch_delete_tensor_object.argtypes = (address,)
    return library


def _copy(library: ctypes.CDLL, source: Bytes, source_dtype: str, target: Bytes, target_dtype: str) -> None:
    with _tensor(library, source, source_dtype) as source_tensor, _tensor(library, target, target_dtype) as tensor:
        if library.aoti_torch_copy_(tensor, source_tensor, 0):
            raise RuntimeError(f"torch did not cast {source_dtype} to {target_dtype}; its reason is on stderr")


@contextmanager
def _tensor(library: ctypes.CDLL, values: Bytes, dtype: str) -> Iterator[ctypes.c_void_p]:
    code = getattr(library, f"aoti_torch_dtype_{dtype}")()
    handle, one = ctypes.c_void_p(), ctypes.c_int64(1)
    size = ctypes.c_int64(values.nbytes // DTYPES[dtype].num_bytes)
    error = library.aoti_torch_create_tensor_from_blob(
        *(values.ctypes.data, 1, ctypes.byref(size), ctypes.byref(one), 0),
        *(code, library.aoti_torch_device_type_cpu(), 0, ctypes.byref(handle)),
    )
    if error:
        raise RuntimeError(f"torch did not take a buffer of {dtype}; its reason is on stderr")
    try:
        yield handle
    finally:
        library.aoti_torch_delete_tensor_object(handle)


def _imported_copier(source: Bytes, source_dtype: str, target: Bytes, target_dtype: str) -> None:
    import torch

    values = torch.from_numpy(source).view(getattr(torch, source_dtype))
    torch.from_numpy(target).view(getattr(torch, target_dtype)).copy_(values)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Keep torch from starting a pool of threads within each of ours."""
    get_count, set_count = _thread_counts()
    before = get_count()
    set_count(1)
    try:
        yield
    finally:
        set_count(before)


def _thread_counts() -> tuple[Callable[[], int], Callable[[int], object]]:
    library = _library()
    names = ("_ZN2at15get_num_threadsEv", "_ZN2at15set_num_threadsEi")  # at::get_num_threads, at::set_num_threads
    if library is not None and all(hasattr(library, name) for name in names):
        return library[names[0]], library[names[1]]
    import torch

    return torch.get_num_threads, torch.set_num_threads
