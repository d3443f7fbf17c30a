"""One shared basis for many adapters: EigenLoRAx, and what we hold to be better.

The paper (Kaushik et al., arXiv:2502.04700; Share, arXiv:2602.06043) makes each factor tall,
joins them over the adapters, centres, and keeps the top P principal directions of either side; a
task is then two small coefficient matrices. Compress-then-Serve (arXiv:2407.00066) minimises the
error of the products, by turns, with full or diagonal cores. **We compute** both: "eigenlorax",
"hooi" (their JD-Full) and "jd_diag", with stacked_svd on the stacked rows. **We differ**: the mean
is kept as one more basis vector, where the released code drops it; alpha / r counts; adapters weigh
by their updates, not by how A and B share the size; "hosvd" looks at the updates alone, so that no
(A, B) -> (M A, B M^-1) changes it: V_A are the top right singular directions of the stacked
R_k A_k s_k with R_k from B_k, V_B likewise.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from lora_fused.adapters import AdapterBank
from lora_fused.checks import check_whole, invalid
from lora_fused.methods import products
from lora_fused.methods.basis import Directions, SharedBasis, principal, take_out
from lora_fused.methods.clusters import SubspaceClusters, cluster
from lora_fused.methods.cores import cores_of_bank
from lora_fused.methods.jd_diag import diagonal_basis
from lora_fused.methods.products import Updates
from lora_fused.methods.progress import show
from lora_fused.methods.subspace import FitOptions, Subspace
from lora_fused.methods.subspace_errors import SubspaceErrors
from lora_fused.ops import stacked_svd

METHODS = ("eigenlorax", "hosvd", "hooi", "jd_diag")
WEIGHTINGS = ("updates", "factors", "equal")
_OP = "fit_subspace"
# Turns of "hooi" end when one adds less than this share of the energy held.
_GAIN, _MOST_TURNS = 1e-5, 30
_FEW_ROWS = 128  # where an exact SVD costs next to nothing


@torch.no_grad()
def fit_subspace(
    bank: AdapterBank,
    *,
    rank: int | None = None,
    energy: float | None = None,
    method: str = "eigenlorax",
    keep_mean: bool = True,
    center: bool = True,
    weighting: str = "updates",
    augment: int = 0,
    clusters: int | None = None,
    progress: bool | Callable[[int, int], None] = True,
    seed: int = 0,
) -> Subspace | SubspaceClusters:
    """Fit the basis that a bank's adapters share, per module, and every adapter's core in it.

    D_k is about basis_b^T M_k basis_a, M_k = s_k (B_k basis_b) (A_k basis_a^T). The bank stays as
    it is; adapters in training count as they are now. Turn ``rank`` (or ``energy``) first.

    Args:
        bank: Adapters of any ranks, scales and modules.
        rank: Principal directions P of either side; a module whose stack has fewer keeps them all.
            Either this or ``energy``.
        energy: In (0, 1], in place of rank: every module gets the P that its adapters need.
            "hosvd" and "hooi": the products keep at least this share of their energy.
            "eigenlorax": each side's principal directions do, of the factors. Not for "jd_diag".
        method: ``"eigenlorax"``: principal directions of the factors. ``"hosvd"``: of the updates.
            ``"hooi"``: hosvd, refined by turns until the products' error stops falling: the least
            error. ``"jd_diag"``: directions (not orthogonal) in which every core is diagonal: P
            numbers per adapter and module in place of 2 P r.
        keep_mean: "eigenlorax": the mean is one more basis vector, the first: P + 1 in all. The
            others are the principal directions of what it does not hold.
        center: "eigenlorax": subtract the mean first, as the paper does. False: principal
            directions of the factors as they are, which hold their mean without an extra vector.
            (The others look at the updates, not centred: nothing is subtracted.)
        weighting: ``"updates"``: an adapter weighs as much as it changes the weights, ||D_k||.
            ``"equal"``: all adapters the same (D_k / ||D_k||, as Compress-then-Serve). "eigenlorax"
            only, ``"factors"``: as the factors are stored, times sqrt(s_k), as the paper does.
        augment: Random directions behind the principal ones, orthogonal to them: for few adapters.
        clusters: Split the adapters into so many groups of similar ones, each with a basis of its
            own (worth it from some 100 adapters on); the result is a SubspaceClusters then.
        progress: True: a line on stderr where that is a terminal; or called as
            progress(done, total) after each module.
        seed: Of the sketches, random directions and clusters. The same call gives the same result.

    Returns:
        Subspace: ``bases`` and ``cores``; ``errors(bank)`` says how good it is.

    Raises:
        ValueError: a wrong argument, or a bank without adapters.

    Numerics:
        Factors are read as stored; products accumulate in float32, Gram matrices in float64; bases
        and cores are float32. Deterministic. "hosvd" and "hooi" change by rounding alone under a
        change of gauge.

    Cost:
        T the sum of the ranks: per module one stacked_svd of [T, I] and one of [T, O], and
        T P (I + O) multiply-adds for the cores; "hooi" a few times that, "jd_diag" some fifty
        times the cores'. No [O, I] matrix is formed.

    Example:
        >>> subspace = fit_subspace(bank, rank=32, method="hosvd")
        >>> print(subspace.errors(bank))
        >>> optimizer = torch.optim.AdamW(subspace.new_task("mine", rank=8))
    """
    _check(bank, rank, energy, method, keep_mean, center, weighting, augment)
    if not isinstance(seed, int):
        raise invalid(_OP, "seed", "be an integer", repr(seed))
    options = FitOptions(method, rank, energy, keep_mean, center, weighting, augment, seed)
    if clusters is not None:
        groups = cluster(bank, clusters, seed=seed)
        parts = [_fit(bank.subset(names), options, False) for names in _shown(groups, progress)]
        return SubspaceClusters(parts)
    return _fit(bank, options, progress)


@torch.no_grad()
def leave_one_out(
    bank: AdapterBank,
    options: FitOptions,
    *,
    names: Sequence[str] | None = None,
    at_once: int = 1,
    progress: bool | Callable[[int, int], None] = True,
) -> SubspaceErrors:
    """Errors of each adapter in a basis fitted to all the others: what a new one may expect.

    Args:
        bank: At least two adapters.
        options: Of the fits, such as ``subspace.options``.
        names: The adapters to leave out. Default: all, which is as many fits.
        at_once: How many to leave out of one fit. In a large bank a few of them hardly matter.
        progress: As in fit_subspace, per fit.
    """
    names = bank.names if names is None else list(names)
    groups = [names[i : i + at_once] for i in range(0, len(names), at_once)]
    if len(bank) <= max(map(len, groups), default=1):
        raise invalid("leave_one_out", "bank", "hold at least two adapters", len(bank))
    found = []
    for group in _shown(groups, progress, "leave_one_out"):
        others = bank.subset([name for name in bank.names if name not in group])
        found.append(_left_out(bank, group, _bases(others, options, False), options))
    gaps, norms = (torch.cat(parts) for parts in zip(*found, strict=True))
    return SubspaceErrors(tuple(names), bank.modules, gaps, norms)


def _left_out(bank: AdapterBank, names, bases, options) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaps and norms ``[n, L]`` of adapters in the bases of others."""
    ids, fitted = [bank.id(name) for name in names], Subspace(bases, AdapterBank(), options)
    norms = [products.norms(stack.selected(ids)) for stack in bank.stacks.values()]
    gaps = torch.stack(norms, 1).cpu()
    norms = gaps.clone()
    for k, adapter in enumerate(map(bank.adapter, names)):
        known = {m: part for m, part in adapter.modules.items() if m in bases}
        if known:  # what no other adapts is lost whole
            fitted.cores.add(fitted.project(dataclasses.replace(adapter, modules=known)))
            gaps[k] = fitted.errors(bank, [adapter.name]).gaps[0]
    return gaps, norms


def _fit(bank: AdapterBank, options: FitOptions, progress) -> Subspace:
    bases = _bases(bank, options, progress)
    return Subspace(bases, cores_of_bank(bank, bases, options.method == "jd_diag"), options)


def _bases(bank: AdapterBank, options: FitOptions, progress) -> dict[str, SharedBasis]:
    generator = torch.Generator().manual_seed(options.seed)
    live = [module for module, stack in bank.stacks.items() if any(stack.ranks)]
    return {m: _basis(bank, m, options, generator) for m in _shown(live, progress)}


def _basis(bank: AdapterBank, module: str, options: FitOptions, generator) -> SharedBasis:
    updates = Updates(bank.stacks[module], equal=options.weighting == "equal")
    for name in bank.names:
        if not updates.finite[bank.id(name)]:
            raise invalid(_OP, f"adapter {name!r} at {module!r}", "be finite", "non-finite values")
    if options.method == "eigenlorax":
        sides = [_of_factors(updates, side, options, generator) for side in "ab"]
    else:
        sides = [_of_updates(updates, side, options, generator) for side in "ab"]
    if options.method == "hooi":
        sides = _by_turns(updates, sides, generator)
    if options.method == "jd_diag":
        sides = diagonal_basis(updates, sides)
    if options.augment:
        sides = [side.augment(options.augment, generator) for side in sides]
    return SharedBasis(*sides, embedding=bank.stacks[module].embedding)


def _of_factors(updates: Updates, side: str, options: FitOptions, generator) -> Directions:
    """Principal directions of a factor's weighted rows, beside the mean's where it is kept."""
    rows = updates.weighted_rows(side, options.weighting)
    mean = rows.mean(0) if options.center else None
    keeps_mean = options.center and options.keep_mean
    pull = take_out(mean, rows) if keeps_mean else None
    most = max(1, min(rows.shape) - keeps_mean)
    size = _size(options, rows.shape, most)
    center = options.center and not keeps_mean
    found = stacked_svd(rows, **size, center=center, generator=generator)
    first, share = float(found.s[0]), float(found.energy[0])
    total = first**2 / share if share else 0.0
    if keeps_mean:
        total += float(pull @ mean / mean.norm().clamp_min(1e-30))
    facts = {"mean": mean, "count": len(rows), "pull": pull}
    return principal(found.vh[:most], found.s[:most], total, **facts)


def _of_updates(updates: Updates, side: str, options: FitOptions, generator) -> Directions:
    """Principal directions of the updates, stacked along the other side."""
    rows = updates.seen_rows(side)
    # Two sides lose at most the sum of what each loses.
    size = _size(options, rows.shape, min(rows.shape), lambda energy: (1 + energy) / 2)
    found = stacked_svd(rows, **size, generator=generator)
    return principal(found.vh, found.s, updates.energy)


def _by_turns(updates: Updates, sides: list[Directions], generator) -> list[Directions]:
    """Each side anew from the updates as the other side keeps them, until little is gained."""
    sides, held = list(sides), 0.0
    for _ in range(_MOST_TURNS):
        for i, side in ((1, "b"), (0, "a")):
            seen = sides[1 - i].coordinates(updates.side(side)[1])
            rows, size = updates.seen_rows(side, seen), _ranked(len(sides[i]))
            found = stacked_svd(rows, **size, generator=generator)
            sides[i] = principal(found.vh, found.s, updates.energy)
        before, held = held, float(found.s.double().square().sum())
        if held - before <= _GAIN * held:
            break
    return sides


def _size(options: FitOptions, shape, most: int, needed: Callable[[float], float] = float) -> dict:
    """How large a stacked_svd of a stack of this shape shall be, and by which way."""
    if options.energy is not None:
        return {"energy": needed(options.energy)}
    exact = {"method": "exact"} if min(shape) <= _FEW_ROWS else {}
    return {**_ranked(min(options.rank, most)), **exact}


def _ranked(rank: int) -> dict:
    """A wide sketch and one power iteration: within 3e-5 of the least error at 3/4 of the time."""
    # 2 rank directions: of 32, 65 took a quarter longer than the 64 that are whole vectors.
    return {"rank": rank, "oversampling": max(rank, 8), "power_iterations": 1}


def _shown(items: list, progress, what: str = _OP) -> Iterator:
    """The items; after each the caller, or a line on a terminal, hears how many are done."""
    for done, item in enumerate(items, 1):
        yield item
        show(progress, done, len(items), f"{what}: {done} of {len(items)}")


def _check(bank, rank, energy, method, keep_mean, center, weighting, augment) -> None:
    if not isinstance(bank, AdapterBank):
        raise invalid(_OP, "bank", "be an AdapterBank", type(bank).__name__)
    if not len(bank):
        raise invalid(_OP, "bank", "hold at least one adapter", "none")
    if method not in METHODS:
        raise invalid(_OP, "method", f"be one of {METHODS}", repr(method))
    if (rank is None) == (energy is None):
        raise invalid(_OP, "rank and energy", "be given one of the two", f"{rank} and {energy}")
    for label, value, least in (("rank", rank, 1), ("augment", augment, 0)):
        if value is not None:
            check_whole(_OP, label, value, least)
    if energy is not None and (not isinstance(energy, (int, float)) or not 0 < energy <= 1):
        raise invalid(_OP, "energy", "be a number in (0, 1]", repr(energy))
    if energy is not None and method == "jd_diag":
        raise invalid(_OP, "energy", "be left out for method 'jd_diag' (give rank)", energy)
    allowed = WEIGHTINGS if method == "eigenlorax" else ("updates", "equal")
    if weighting not in allowed:
        raise invalid(_OP, "weighting", f"be one of {allowed} for {method!r}", repr(weighting))
    if method != "eigenlorax" and not (keep_mean and center):
        rule = f"be left at True for {method!r}, which subtracts no mean"
        raise invalid(_OP, "keep_mean and center", rule, f"{keep_mean} and {center}")
    if rank is not None:
        _check_rank(bank, rank)


def _check_rank(bank: AdapterBank, rank: int) -> None:
    """Refuse more directions than any module has, saying what limits them."""
    widths = [max(stack.in_features, stack.out_features) for stack in bank.stacks.values()]
    every = [[rank for rank in stack.ranks if rank] for stack in bank.stacks.values()]
    most, width, ranks = max((min(w, sum(r)), w, r) for w, r in zip(widths, every, strict=True))
    if rank <= most:
        return
    why = f"its wider side is {width}"
    if sum(ranks) <= width:
        low, high = min(ranks), max(ranks)
        of = f"rank {low}" if low == high else f"ranks {low} to {high}"
        why = f"{len(ranks)} adapters of {of} have {most} in all"
    rule = f"be at most {most}, the most directions that a module has ({why})"
    raise invalid(_OP, "rank", rule, rank)
