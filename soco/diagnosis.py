"""What ``soco info`` says: versions, devices, ops, and what is missing and how to get it."""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from soco import core, ops

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "numpy")
_OPTIONAL = {  # package to what it is for
    "matplotlib": "plots",
    "datasets": "calibration on a dataset of the hub",
    "peft": "adapters on compressed layers",
}


@dataclass(frozen=True)
class Device:
    """One device that torch can compute on."""

    name: str  # as torch writes it: "cpu", "cuda:0"
    description: str
    bytes: int | None  # memory; None where torch does not say
    kernels: str  # what the compiled core runs there; "none" where it cannot


@dataclass(frozen=True)
class Diagnosis:
    """Everything there is to know about an installation, as data; :meth:`render` makes it text."""

    versions: dict[str, str]  # package to version
    optional: dict[str, str | None]  # package to version, None when it is not installed
    build: dict[str, str]  # how the compiled core was built
    threads: int  # that torch and the compiled core use on the CPU
    devices: tuple[Device, ...]
    ops: dict[str, tuple[str, ...]]  # op to the kinds of device that have a kernel for it
    problems: tuple[str, ...]  # one sentence each: what is wrong, and what to do

    def render(self) -> str:
        """A page of text."""
        cuda = self.build["cuda"]
        kernels = f"CUDA {cuda} for {self.build['cuda_architectures']}" if cuda else "no CUDA"
        lines = ["Versions"]
        lines += [f"  {name:<13} {version}" for name, version in self.versions.items()]
        for name, version in self.optional.items():
            absent = f"not installed; for {_OPTIONAL[name]}: `pip install {name}`"
            lines.append(f"  {name:<13} {version or absent}")
        lines += [
            "Compiled core",
            f"  built by      {self.build['compiler']}, {self.build['type']}; {kernels}",
            f"  SIMD          {self.build['simd_level']} (compiled: {self.build['simd']})",
            f"  threads       {self.threads}, {self.build['threads']}",
            "Devices",
        ]
        for device in self.devices:
            memory = "" if device.bytes is None else f", {device.bytes / 2**30:.0f} GiB"
            lines.append(f"  {device.name:<13} {device.description}{memory}; {device.kernels}")
        lines.append("Ops")
        lines += [f"  {op:<26} {', '.join(kinds)}" for op, kinds in self.ops.items()]
        lines.append("Problems" if self.problems else "Problems: none")
        lines += [f"  - {problem}" for problem in self.problems]
        return "\n".join(lines)


def diagnose() -> Diagnosis:
    """Look at this installation and machine. Nothing is computed, and no model is read."""
    build = core.build_record()
    versions = {
        "soco-llm": _version("soco-llm") or "not installed",
        "python": platform.python_version(),
    }
    versions |= {name: _version(name) or "not installed" for name in _PACKAGES}
    versions["torch"] = f"{torch.__version__} ({_torch_build()})"
    devices = _cpu(build), *(_cuda(index, build) for index in range(_cuda_devices()))
    return Diagnosis(
        versions=versions,
        optional={name: _version(name) for name in _OPTIONAL},
        build=build,
        threads=torch.get_num_threads(),
        devices=devices,
        ops={op: core.kernels[op] for op in ops.__all__},
        problems=tuple(_problems(build, devices)),
    )


def describe_machine(device: str = "cpu") -> dict[str, str | int]:
    """What measurements were made on: processors, threads and versions, as plain JSON data.

    Args:
        device: "cpu", or "cuda", whose name is told, too.
    """
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    found: dict[str, str | int] = {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions(),
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def versions() -> dict[str, str]:
    """Of soco and of what its results depend on most."""
    return {name: metadata.version(name) for name in ("torch", "transformers", "soco-llm")}


def commit_of(folder: Path) -> str | None:
    """The commit of the clone whose root ``folder`` is, marked when files were changed since.

    None: it is no such root, as that of an installed package.
    """
    if not (folder / ".git").exists():
        return None
    described = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(described, cwd=folder, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def kernels_for(capability: tuple[int, int], architectures: str) -> str | None:
    """What of a build for ``architectures`` (as CMake writes them) a GPU can run, None for nothing.

    Machine code runs on its own major version from its own minor version on; PTX is compiled by
    the driver for everything newer than it.

    >>> kernels_for((8, 6), "80-real;90")
    'sm_80'
    >>> kernels_for((12, 0), "80-real;90")
    'PTX of sm_90'
    >>> kernels_for((7, 5), "80-real;90") is None
    True
    """
    wanted = 10 * capability[0] + capability[1]
    real, virtual = [], []
    for name in architectures.split(";"):
        number, _, kind = name.partition("-")
        digits = number.rstrip("af")  # 90a and 100f are for one family only: take them as exact
        if not digits.isdigit():
            continue
        built = int(digits)
        exact = digits != number
        same_major = built // 10 == wanted // 10 and built <= wanted
        if kind != "virtual" and same_major and (built == wanted or not exact):
            real.append(built)
        if kind != "real" and built <= wanted and not exact:
            virtual.append(built)
    if real:
        return f"sm_{max(real)}"
    return f"PTX of sm_{max(virtual)}" if virtual else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch_build() -> str:
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip is not None else "CPU only"


def _cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _cpu(build: dict[str, str]) -> Device:
    description = f"{platform.machine()}, {os.cpu_count()} cores"
    return Device("cpu", description, None, f"kernels: {build['simd_level']}")


def _cuda(index: int, build: dict[str, str]) -> Device:
    properties = torch.cuda.get_device_properties(index)
    major, minor = properties.major, properties.minor
    runs = kernels_for((major, minor), build["cuda_architectures"]) if build["cuda"] else None
    return Device(
        f"cuda:{index}",
        f"{properties.name}, compute capability {major}.{minor}",
        properties.total_memory,
        f"kernels: {runs or 'none'}",
    )


def _problems(build: dict[str, str], devices: tuple[Device, ...]) -> list[str]:
    """What is wrong or missing, most important first."""
    found = []
    audio = _version("soco")
    if audio is not None:
        found.append(
            f"the home-audio library soco {audio} is installed beside soco-llm and owns a package "
            "of the same name: put the two into separate environments, or run `pip uninstall soco "
            "soco-llm` and then `pip install` the one you want"
        )
    installed = _version("soco-llm")
    if installed != build["version"]:
        found.append(
            f"the compiled core is of version {build['version']}, but soco-llm {installed} is "
            "installed: install it again to rebuild the core"
        )
    gpus = devices[1:]
    if gpus and not build["cuda"]:
        found.append(
            f"there is a GPU, but soco has no CUDA kernels ({build['cuda_absent']}): install a "
            "CUDA toolkit, put its nvcc on the PATH and reinstall soco from source"
        )
    found += [
        f"{gpu.name} ({gpu.description}) cannot run the kernels, built for "
        f"{build['cuda_architectures']}: reinstall soco from source with "
        "CMAKE_CUDA_ARCHITECTURES in the environment naming it"
        for gpu in gpus
        if build["cuda"] and gpu.kernels.endswith("none")
    ]
    if not gpus and shutil.which("nvidia-smi") is not None:
        found.append(
            f"there is an NVIDIA driver, but torch ({_torch_build()}) sees no GPU: "
            + (
                "look at what `nvidia-smi` and `python -m torch.utils.collect_env` say"
                if torch.version.cuda is not None
                else "install a CUDA build of torch to use it"
            )
        )
    mismatch = core.cuda_mismatch(build["cuda"], torch.version.cuda)
    if mismatch is not None:
        found.append(mismatch)
    return found
