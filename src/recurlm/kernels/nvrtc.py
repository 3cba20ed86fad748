"""CUDA C++ compiled at first use by NVIDIA's run-time compiler, kept on disk, and launched, if need be with all blocks at once.

Needs the package cuda-bindings and the libraries that torch's CUDA builds bring; no compiler of the user's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def missing() -> str:
    """What NVRTC needs and is not here, as part of a sentence; '' when nothing is."""
    there = importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.bindings")
    return "" if there else "cuda-bindings is not installed"


def cache_folder() -> Path:
    """Where compiled kernels are kept: recurlm/kernels in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recurlm" / "kernels"


def _checked(results: tuple[Any, ...], what: str) -> Any:
    """What a call of cuda-bindings gave beside its status; RuntimeError when that is not success."""
    status, *values = results
    if int(status):
        raise RuntimeError(f"{what}: {status.name if hasattr(status, 'name') else status}.")
    return values[0] if len(values) == 1 else values


def compiled(source: str, macros: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """The machine code of a CUDA C++ source with these macros for a GPU of the capability; from disk if it is there.

    RuntimeError when it does not compile, with the compiler's own words.
    """
    from cuda.bindings import nvrtc  # type: ignore[attr-defined]

    version = _checked(nvrtc.nvrtcVersion(), "NVRTC")
    arch = "sm_{}{}".format(*capability) + ("a" if capability == (9, 0) else "")  # wgmma is for this one alone
    options = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]
    key = hashlib.sha256("\0".join((source, str(version), *options)).encode()).hexdigest()[:32]
    place = cache_folder() / f"{key}.cubin"
    try:
        code = place.read_bytes()
        if code[:4] == b"\x7fELF":
            return code
    except OSError:
        pass
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []), "NVRTC")
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if int(status):
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program), "NVRTC")
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"A CUDA kernel does not compile for {arch}: {' '.join(log.decode().split())[:500]}")
        code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program), "NVRTC")
        _checked(nvrtc.nvrtcGetCUBIN(program, code), "NVRTC")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
            file.write(code)
        Path(file.name).replace(place)
    except OSError:
        pass  # it is compiled again next time
    return code


class Running:
    """That all blocks of a kernel have begun, for kernels of another stream to wait for; also in a CUDA graph.

    A best effort of the driver: what waits may have to wait for the kernel's end, and could come early on a stream of higher
    priority; then the kernel may not find its places until that has ended.
    """

    def __init__(self) -> None:
        from cuda.bindings import driver  # type: ignore[attr-defined]

        self.driver = driver
        self.event = _checked(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING), "CUDA")

    def attribute(self) -> Any:
        """Of a launch that brings it about."""
        attribute = self.driver.CUlaunchAttribute()
        attribute.id = self.driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_LAUNCH_COMPLETION_EVENT
        attribute.value.launchCompletionEvent.event, attribute.value.launchCompletionEvent.flags = self.event, 0
        return attribute

    def wait(self) -> None:
        """What comes next on torch's current stream waits for it."""
        _checked(self.driver.cuStreamWaitEvent(torch.cuda.current_stream().cuda_stream, self.event, 0), "CUDA")


class Kernel:
    """A function of compiled code on the current device, with `shared` bytes of shared memory for each block, which are
    launched in clusters of `cluster`, and all at once or not at all if they wait for each other (`together`)."""

    def __init__(self, code: bytes, name: str, shared: int, cluster: int = 1, together: bool = True):
        from cuda.bindings import driver  # type: ignore[attr-defined]

        torch.cuda.current_stream()  # torch makes the context
        torch.zeros(1, device="cuda")
        self.driver, self.shared, self.cluster, self.together = driver, shared, cluster, together
        self.configs: dict[tuple[int, int, Running | None], Any] = {}
        self.module = _checked(driver.cuModuleLoadData(code), "CUDA")
        self.function = _checked(driver.cuModuleGetFunction(self.module, name.encode()), "CUDA")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self.function, attribute, shared), "CUDA")
        if cluster > 8:  # which not every GPU has
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            _checked(driver.cuFuncSetAttribute(self.function, attribute, 1), "CUDA")

    def _configured(self, blocks: int, threads: int, launched: bool = True, running: Running | None = None) -> Any:
        """How so many blocks are launched, or are asked after."""
        driver, config = self.driver, self.driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self.shared
        together, cluster = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
        together.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        together.value.cooperative = 1
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = cluster.value.clusterDim
        size.x, size.y, size.z = self.cluster, 1, 1
        attributes = ([together] if launched and self.together else []) + ([cluster] if self.cluster > 1 else [])
        attributes += [running.attribute()] if running else []
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config

    def resident_blocks(self, threads: int) -> int:
        """How many blocks of so many threads the whole GPU holds at once."""
        if self.cluster > 1:
            config = self._configured(self.cluster, threads, launched=False)
            clusters = self.driver.cuOccupancyMaxActiveClusters(self.function, config)
            return _checked(clusters, "CUDA") * self.cluster
        occupancy = self.driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self.function, threads, self.shared)
        return _checked(occupancy, "CUDA") * torch.cuda.get_device_properties().multi_processor_count

    def __call__(
        self, blocks: int, threads: int, arguments: Sequence[Tensor | int], running: Running | None = None
    ) -> None:
        """Launches it on torch's current stream; RuntimeError, before anything runs, when it cannot be, as when blocks
        that wait for each other do not fit at once. `running` comes about when all blocks have begun."""
        if (blocks, threads, running) not in self.configs:
            config = self._configured(blocks, threads, running=running)
            if self.cluster > 1 and blocks > self.resident_blocks(threads):
                raise RuntimeError(
                    f"A kernel of {blocks} blocks cannot be launched: clusters of {self.cluster} do not fit at once."
                )
            self.configs[blocks, threads, running] = config
        config = self.configs[blocks, threads, running]
        config.hStream = torch.cuda.current_stream().cuda_stream
        values = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        types = tuple(ctypes.c_void_p if isinstance(a, Tensor) else ctypes.c_longlong for a in arguments)
        launch = self.driver.cuLaunchKernelEx(config, self.function, (values, types), 0)
        _checked(launch, f"A kernel of {blocks} blocks cannot be launched")


@functools.cache
def source(name: str) -> str:
    """The text of a source file beside this module."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
