"""Compiles what a launcher launches, for GPUs that are not there, and reads the machine code.

A process that interprets kernels cannot compile them, so compile_launches() starts another one. It
calls the launcher on CPU tensors under a driver that knows only a target: each launch is compiled
with the types, alignments and constants that it was really given, and nothing runs.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Compiled:
    """One kernel of one case for one target; instruction counts are static.

    Attributes:
        spills: instructions that move registers to or from local memory (AMD: vector registers
            spilled).
        wide_loads: global loads of 16 bytes per lane, of all ``loads``.
        bulk_loads: loads through a tensor descriptor.
        mma: tensor-core instructions.
        occupancy: resident warps over the most that the target can hold, by registers, shared
            memory and threads.
    """

    kernel: str
    case: int
    target: str
    threads: int
    registers: int
    spills: int
    shared: int
    loads: int
    wide_loads: int
    bulk_loads: int
    stores: int
    wide_stores: int
    atomics: int
    mma: int
    instructions: int
    occupancy: float


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor of an NVIDIA target holds (CUDA C++ Programming Guide, table of
    technical specifications per compute capability)."""

    warps: int
    blocks: int
    shared: int
    registers: int = 65536

    def occupancy(self, *, warps: int, registers: int, shared: int) -> float:
        by_registers = self.registers // _up(max(registers, 1) * 32, 256) // 4 * 4
        by_shared = self.shared // _up(shared + 1024, 128)  # 1 KiB a block is the system's own
        blocks = min(self.blocks, self.warps // warps, by_registers // warps, by_shared)
        return blocks * warps / self.warps


LIMITS = {
    "sm_80": Limits(warps=64, blocks=32, shared=164 * 1024),
    "sm_90": Limits(warps=64, blocks=32, shared=228 * 1024),
    "sm_100": Limits(warps=64, blocks=32, shared=228 * 1024),
    "sm_120": Limits(warps=48, blocks=24, shared=100 * 1024),
}


def compile_launches(
    launcher: Callable[..., object],
    cases: Sequence[Mapping[str, object]] = ({},),
    *,
    targets: Sequence[str] = TARGETS,
) -> list[Compiled]:
    """Compile every Triton launch that ``launcher(**case)`` makes, for each case and target.

    Args:
        launcher: A function at the top of a module file. It makes CPU tensors and launches kernels
            on them as it would on a GPU; it must not depend on what they compute.
        cases: Keyword arguments, of types that JSON knows.
        targets: Of TARGETS.

    Returns:
        One for each distinct kernel of a case and target, in the order of the launches.
    """
    job = {
        "file": str(Path(launcher.__code__.co_filename).resolve()),
        "launcher": launcher.__name__,
        "cases": [dict(case) for case in cases],
        "targets": list(targets),
    }
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)])
    env.setdefault("TRITON_CACHE_DIR", str(ROOT / ".cache" / "triton"))
    command = [sys.executable, "-m", "support.aot"]
    done = subprocess.run(command, input=json.dumps(job), env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"compile_launches: {job['launcher']} failed\n{done.stderr}")
    return [Compiled(**row) for row in json.loads(done.stdout)]


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _compile_job(job: Mapping) -> Iterator[Compiled]:
    import importlib.util

    spec = importlib.util.spec_from_file_location("launchers_under_compilation", job["file"])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    launcher = getattr(module, job["launcher"])
    for target in job["targets"]:
        for number, case in enumerate(job["cases"]):
            for kernel in _kernels_of(lambda case=case: launcher(**case), target):
                yield _read(kernel, number, target)


def _kernels_of(launch: Callable[[], object], target: str) -> list:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_compile_only_driver(target))
    kernels, run = [], JITFunction.run

    def compile_instead(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if not any(kernel is known for known in kernels):
            kernels.append(kernel)
        return kernel

    JITFunction.run = compile_instead
    try:
        launch()
    finally:
        JITFunction.run = run
    return kernels


def _compile_only_driver(target: str):
    import torch
    from triton.backends.compiler import GPUTarget

    class CompileOnlyDriver:
        def get_current_target(self):
            if target.startswith("gfx"):
                return GPUTarget("hip", target, 64)
            return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)

        def get_current_device(self):
            return TARGETS.index(target)  # Triton keeps its compiled kernels by device

        def get_current_stream(self, device=0):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_benchmarker(self):  # an autotuner takes its first configuration
            return lambda call, quantiles=None, **options: (0.0, 0.0, 0.0)

    return CompileOnlyDriver()


def _read(kernel, case: int, target: str) -> Compiled:
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    return Compiled(
        kernel=kernel.metadata.name,
        case=case,
        target=target,
        shared=kernel.metadata.shared,
        **read(kernel, target),
    )


def _read_nvidia(kernel, target: str) -> dict:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no registers for {target}: {usage}")
    names = Counter(re.findall(_SASS, code, re.M))
    registers, warps = int(found[1]), kernel.metadata.num_warps
    return {
        "threads": warps * 32,
        "registers": registers,
        "spills": _count(names, r"LDL|STL"),
        "loads": _count(names, r"LDG"),
        "wide_loads": _count(names, r"LDG(STS)?\..*128"),
        "bulk_loads": _count(names, r"UTMALDG|UBLKCP"),
        "stores": _count(names, r"STG"),
        "wide_stores": _count(names, r"STG\..*128"),
        "atomics": _count(names, r"RED(G)?\b|ATOM(?!S)"),  # ATOMS: in shared memory
        "mma": _count(names, r"HMMA|HGMMA|UTC\w*MMA|IMMA|QMMA|OMMA"),
        "instructions": sum(names.values()),
        "occupancy": LIMITS[target].occupancy(
            warps=warps, registers=registers, shared=kernel.metadata.shared
        ),
    }


# An instruction's name behind its address and predicate: "/*0010*/ @!P0 LDG.E.128 R4, ..."
_SASS = r"^\s+(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)"


def _read_amd(kernel, target: str) -> dict:
    code = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        if found is None:
            raise RuntimeError(f"the assembly for {target} states no {name}")
        return int(found[1])

    names = Counter(re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", code, re.M))
    vectors, waves = field("vgpr_count"), kernel.metadata.num_warps
    # CDNA3: 512 vector registers a lane of each of 4 SIMDs, in units of 8, 8 waves; 64 KiB of LDS.
    per_simd = min(8, 512 // _up(max(vectors, 1), 8))
    by_shared = (64 * 1024) // max(kernel.metadata.shared, 1)
    resident = min(4 * per_simd // waves, by_shared) * waves
    return {
        "threads": waves * 64,
        "registers": vectors,
        # Scalar registers spill into lanes of vector registers, not into memory.
        "spills": field("vgpr_spill_count"),
        "loads": _count(names, r"(global|buffer|flat)_load_"),
        "wide_loads": _count(names, r"(global|buffer|flat)_load_dwordx4"),
        "bulk_loads": 0,
        "stores": _count(names, r"(global|buffer|flat)_store_"),
        "wide_stores": _count(names, r"(global|buffer|flat)_store_dwordx4"),
        "atomics": _count(names, r"(global|buffer|flat)_atomic_"),
        "mma": _count(names, r"v_s?mfma"),
        "instructions": sum(n for name, n in names.items() if re.match(r"[svgbdf]", name)),
        "occupancy": resident / 32,
    }


def _count(names: Counter, pattern: str) -> int:
    return sum(number for name, number in names.items() if re.match(pattern, name))


def _output(*command: object) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    rows = [asdict(compiled) for compiled in _compile_job(json.load(sys.stdin))]
    json.dump(rows, sys.stdout)
