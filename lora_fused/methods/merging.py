"""Several adapters merged into one, by every rule that PEFT's users know.

Exact: "cat", "svd" and task arithmetic (either with weights of any sign) come from the factors
alone. PEFT's ``add_weighted_adapter`` says: "cat" joins the factors, "svd" factorises the dense
sum, "linear" adds the factors, each times sqrt(|w_k s_k|), and the entrywise rules treat factors
("ties") or dense updates ("ties_svd"). **We compute** the same. **We differ**: "svd" never forms
the sum (two thin orthogonalisations and an SVD as small as the sum of the ranks); "*_svd" holds one
dense update at a time and finds only the singular vectors it keeps; "*_core" and "*_knots" apply
the same rules in small lossless spaces; every result says how far it is from the exact sum; the
default is exact; draws have a seed; one adapter alone is not silently merged by "linear".
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from lora_fused.adapters import Adapter, AdapterBank, LoraFactors, peft_config, pointwise_of
from lora_fused.checks import invalid
from lora_fused.methods import exact_sums
from lora_fused.methods.core_space import merge_cores, merge_knots
from lora_fused.methods.dense_space import merge_updates
from lora_fused.methods.exact_sums import Part, Used
from lora_fused.methods.factor_space import layer_of, merge_factors
from lora_fused.methods.merge_report import Merged, MergeReport, ModuleReport, relative
from lora_fused.methods.merge_request import OP, Request, checked

_SPACES = {"svd": merge_updates, "core": merge_cores, "knots": merge_knots}
Parts = tuple[list[str], Part]


@torch.no_grad()
def merge(
    bank: AdapterBank,
    weights: Mapping[str, float],
    *,
    combination_type: str = "cat",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
    name: str = "merged",
    dtype: torch.dtype | None = None,
    saved_modules: str = "error",
    progress: Callable[[int, int], None] | None = None,
) -> Merged:
    """Merge adapters of a bank into one adapter; the bank stays as it is.

    D = sum_k weights[k] * scale[k] * B_k A_k for each module that any of them adapts; an adapter
    without the module adds nothing to it. Weights may be negative and need not sum to one; one of
    weight 0 is left out, except that it has a vote where signs are elected, as in PEFT.

    Args:
        bank: The adapters, also those in training. Ranks, scales and modules may differ.
        weights: Adapter name -> weight; nothing is normalised.
        combination_type: ``"cat"``: D exactly, of the sum of the ranks. ``"svd"``: the best
            approximation of D of a given rank. ``"linear"``: PEFT's sum of the factors, for parity;
            cross terms make it another update than D (read its error), and ranks must agree.
            Entrywise, ``"ties"``, ``"dare_linear"``, ``"dare_ties"`` and ``"magnitude_prune"``,
            each in four spaces with results of their own:
            no suffix: on A and on B, as PEFT does; ranks must agree, and cross terms as above.
            ``_svd``: on the dense updates, as PEFT does, then the best approximation of a rank.
            ``_core``: on the cores of Core Space, ``_knots``: on the right singular vectors of
            KnOTS, then the best approximation of a rank; far cheaper than "_svd" while the ranks
            together stay below the layer's sides.
        rank: Of the result, for "svd", "_svd", "_core" and "_knots". A module whose result has less
            gets all of it. Default: the largest rank merged, as in PEFT.
        energy: In place of rank: each module gets the smallest rank that keeps this share of the
            squared norm of what the rule gives, such as 0.95.
        density: Entrywise only, and needed there: share of the entries that is kept, in (0, 1].
        majority_sign_method: "ties" and "dare_ties" only: the sign elected is that of the
            ``"total"`` or the one of higher ``"frequency"``.
        seed: "dare" only: what is dropped depends on (seed, module, adapter) alone.
        name: Name of the result; not one of the bank's.
        dtype: Of the result: float32, float16 or bfloat16. Default: the bank's.
        saved_modules: What fully trained modules (modules_to_save) do, which have no weighted sum
            here: ``"error"``, or ``"ignore"`` to leave them out.
        progress: Called as progress(done, total) with numbers of modules.

    Returns:
        ``adapter`` and ``report``: for each module and overall the rank, the energy kept and
        ``error_to_exact`` = ||merged - D||_F / ||D||_F, rounding to dtype included.

    Raises:
        ValueError: a wrong argument, an unknown or taken name, ranks that differ ("linear" and
            rules on factors), saved modules, NaN in an adapter in training, or values that dtype
            cannot hold.

    Numerics:
        Float64 from the stored factors up to the final rounding; dense updates and KnOTS' vectors
        in float32, the former's singular vectors to the accuracy of a full SVD in float32. Cut to a
        rank, each singular value is split evenly, sqrt(s) to either factor, and the scale is 1: of
        all splits this has the smallest ||A||^2 + ||B||^2, so neither factor is near the edge of a
        narrow dtype and further training moves both alike. "cat" puts the largest |weight * scale|
        in the scale and the ratios to it, with the signs, in B: adapters of one weight and scale
        are kept bit for bit. Deterministic.

    Cost:
        T the sum of the ranks: T^2 (I + O) multiply-adds a module, modules of equal shapes batched;
        entrywise rules go over each adapter's matrix twice more. "_svd" forms [O, I] matrices, of
        one adapter at a time: beside the factors, memory does not grow with the adapters; with
        ``energy``, or a rank of a quarter of a side, it decomposes them in full. All others form
        one only to measure the error, where T (I + O) > I O makes that the cheaper way.

    Example:
        >>> adapter, report = merge(bank, {"math": 0.7, "code": -0.2}, combination_type="svd")
        >>> print(report)
        >>> write_adapter(adapter, "math_without_code")
    """
    request = checked(
        bank,
        weights,
        combination_type=combination_type,
        rank=rank,
        energy=energy,
        density=density,
        majority_sign_method=majority_sign_method,
        seed=seed,
        name=name,
        dtype=dtype,
        saved_modules=saved_modules,
    )
    return finished(request, _told(request, _parts(request), progress))


def _told(request: Request, found: Iterable[Parts], progress) -> Iterator[Parts]:
    """The parts, and after each the progress."""
    done, total = 0, len(exact_sums.modules_of(request.bank, request.used))
    for modules, part in found:
        done += len(modules)
        if progress is not None:
            progress(done, total)
        yield modules, part


def _parts(request: Request) -> Iterator[Parts]:
    """The merged factors, a few modules at a time: one, where a rule is applied."""
    bank, used, kind, rule, dtype = (
        getattr(request, field) for field in ("bank", "used", "combination_type", "rule", "dtype")
    )
    cut = (request.rank, request.energy, dtype)
    for modules in exact_sums.batches(bank, used, values=0 if rule is None else 1):
        total = exact_sums.gather(bank, modules, used)
        if kind == "cat":
            yield modules, exact_sums.cat(total, dtype)
        elif kind == "svd":
            yield modules, exact_sums.svd(total, *cut)
        elif kind == "linear":
            held = sum(bank.stacks[modules[0]].ranks[one.id] > 0 for one in used)
            yield modules, exact_sums.linear(total, held, dtype)
        elif request.space is None:
            yield modules, merge_factors(layer_of(bank, modules[0], used), total, rule, dtype)
        else:
            layer = layer_of(bank, modules[0], used)
            yield modules, _SPACES[request.space](layer, total, rule, *cut)


def finished(request: Request, found: Iterable[Parts]) -> Merged:
    """The adapter of merged factors, with its config and report."""
    merged: dict[str, tuple[LoraFactors, ModuleReport]] = {}
    for modules, part in found:
        merged.update(_results(part, modules, request.bank))
    order = [module for module in request.bank.modules if module in merged]
    parts = {module: merged[module][0] for module in order}
    facts = (request.combination_type, request.weights)
    report = MergeReport(*facts, {m: merged[m][1] for m in order}, request.options)
    metadata = {
        "config": _config(request.bank, request.used, parts),
        **pointwise_of(request.bank, parts),
        "merge": {
            "weights": request.weights,
            "combination_type": request.combination_type,
            "options": request.options,
            "energy": report.energy,
            "error_to_exact": report.error_to_exact,
        },
    }
    return Merged(Adapter(request.name, parts, metadata=metadata), report)


def _results(
    part: Part, modules: Sequence[str], bank: AdapterBank
) -> Iterator[tuple[str, tuple[LoraFactors, ModuleReport]]]:
    finite = part.lora_a.isfinite().all(-1).all(-1) & part.lora_b.isfinite().all(-1).all(-1)
    finite &= part.scale.isfinite() & (part.scale != 0)
    finite = finite.tolist()
    kept = [(None, None)] * len(modules)
    if part.energy is not None:
        kept = list(zip(part.energy.tolist(), part.rule_norm.tolist(), strict=True))
    facts = zip(part.scale.tolist(), part.norm.tolist(), part.error.tolist(), strict=True)
    for i, (scale, norm, error) in enumerate(facts):
        module, rank = modules[i], part.ranks[i]
        if not finite[i]:
            rule = f"keep the merged factors of {module} within {part.lora_a.dtype}"
            raise invalid(OP, "weights and dtype", rule, "values beyond it")
        factors = (part.lora_a[i, :rank], part.lora_b[i, :rank])
        energy, rule_norm = kept[i]
        report = ModuleReport(rank, norm, energy, relative(error, norm), rule_norm)
        yield module, (LoraFactors(*factors, scale, bank.stacks[module].embedding), report)


def _config(bank: AdapterBank, used: Sequence[Used], parts: dict[str, LoraFactors]) -> dict:
    """A PEFT config for the result."""
    configs = [bank.metadata[one.name].get("config") or {} for one in used]
    kinds = {config.get("task_type") for config in configs}
    saved = any(one.name in bank.saved for one in used)
    rank = Counter(part.lora_a.shape[0] for part in parts.values()).most_common(1)[0][0]
    scale = Counter(part.scale for part in parts.values()).most_common(1)[0][0]
    bases = (config.get("base_model_name_or_path") for config in configs)
    return peft_config(
        sorted(parts),
        rank,
        rank if scale == 1 else scale * rank,
        base=next((path for path in bases if path), None),
        fan_in_fan_out=any(config.get("fan_in_fan_out") for config in configs),
        # A task type would make PEFT look for the head that was left out.
        task_type=kinds.pop() if len(kinds) == 1 and not saved else None,
    )
