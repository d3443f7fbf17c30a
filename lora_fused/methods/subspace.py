"""A subspace: one basis per layer that many adapters share, and each adapter's core in it.

D_k is about basis_b^T M_k basis_a with M_k = s_k core_b^T core_a: an adapter of the coordinates.
So the cores are an AdapterBank as any other, with names, ids, mixtures, addition, removal and
training; only its stacks are P wide. ``fit_subspace`` makes subspaces.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lora_fused.adapters import (
    Adapter,
    AdapterBank,
    AdapterStack,
    LoraFactors,
    peft_config,
    pointwise_of,
)
from lora_fused.checks import check_whole, invalid, shape
from lora_fused.methods.basis import SharedBasis, extended_basis
from lora_fused.methods.cores import core_of, diagonals, pair_of, resized
from lora_fused.methods.subspace_errors import SubspaceErrors, reconstruction_errors


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """How a subspace was fitted; what ``add`` goes on with. See ``fit_subspace``."""

    method: str = "eigenlorax"
    rank: int | None = None
    energy: float | None = None
    keep_mean: bool = True
    center: bool = True
    weighting: str = "updates"
    augment: int = 0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Base:
    """What a subspace knows of the model that it is for; lora_fused.io compares it.

    Attributes:
        names: of the model; none: those in the adapters' configs count alone.
        weights: module name -> some of its weights, a fingerprint.
    """

    names: tuple[str, ...] = ()
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)


class Subspace:
    """The shared bases of a model's layers and the cores of all adapters in them.

    Attributes:
        bases: module name -> SharedBasis (basis_a ``[P, I]``, basis_b ``[P, O]``, frozen).
        cores: the AdapterBank of the cores: per module lora_a ``[T, P]``, lora_b ``[T, P]``.
            Mixtures resolve against it; ``cores.trainable(names)`` trains coefficients.
        options: how it was fitted.
        base: what a file said of the model.

    With ``options.method == "jd_diag"`` a core is the diagonal of its pair, see ``diagonals``.
    """

    def __init__(
        self,
        bases: dict[str, SharedBasis],
        cores: AdapterBank,
        options: FitOptions,
        base: Base | None = None,
    ):
        self.bases, self.cores, self.options = bases, cores, options
        self.base = Base() if base is None else base

    @property
    def names(self) -> list[str]:
        return self.cores.names

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.bases)

    @property
    def base_names(self) -> list[str]:
        """What the adapters' configs call the model, and what it calls itself; may be empty."""
        configs = (self.cores.metadata[name].get("config") or {} for name in self.cores)
        found = [config.get("base_model_name_or_path") for config in configs]
        return [name for name in dict.fromkeys([*found, *self.base.names]) if name]

    @property
    def diagonal(self) -> bool:
        return self.options.method == "jd_diag"

    def __len__(self) -> int:
        return len(self.cores)

    def __contains__(self, name: str) -> bool:
        return name in self.cores

    def __repr__(self) -> str:
        ranks = sorted({len(side) for basis in self.bases.values() for side in (basis.a, basis.b)})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        size = f"{len(self)} adapters, {len(self.bases)} modules, {span} directions"
        return f"Subspace({size}, {self.options.method})"

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Subspace":
        """Move or convert bases and cores in place."""
        self.cores.to(device, dtype)
        for basis in self.bases.values():
            basis.to(device=device, dtype=dtype)
        return self

    def diagonals(self, module: str) -> Tensor:
        """Diagonal cores of a module ``[K, P]``, scale folded in: s_k sum_r core_a * core_b."""
        if not self.diagonal:
            rule = "be 'jd_diag' for diagonal cores"
            raise invalid("Subspace.diagonals", "method", rule, repr(self.options.method))
        stack = self.cores.stacks[module]
        return diagonals(stack) * stack.scale[:, None]

    @torch.no_grad()
    def project(self, adapter: Adapter) -> Adapter:
        """The core of an adapter: the nearest that the bases allow; scale and the rest are kept.

        Nothing is stored: ``subspace.cores.add(subspace.project(adapter))`` does, and leaves the
        bases as they are (``add`` adapts them).

        Raises:
            ValueError: the adapter adapts a module that the subspace lacks, or of other sizes.
        """
        self._check_fits("Subspace.project", [adapter])
        return _core(adapter, self.bases, self.diagonal)

    @torch.no_grad()
    def reconstruct(self, name: str, *, rank: int | None = None) -> Adapter:
        """An adapter of the model's own layers again, for ``bank.add`` and ``write_adapter``.

        Args:
            name: Of an adapter of the subspace.
            rank: Of the result. Less than a core's: its best approximation; more: the same update
                with directions to spare, whose B is zero. Default: the cores' own. alpha is kept:
                the scale follows the rank.
        """
        core = self.cores.adapter(name)
        config = core.metadata.get("config") or {}
        parts = {}
        for module, part in core.modules.items():
            basis = self.bases[module]
            sides = basis.basis_a, basis.basis_b
            if self.diagonal:
                part, sides = pair_of(part, basis)
            if rank is not None and rank != part.lora_a.shape[0]:
                part = resized(part, rank, rslora=bool(config.get("use_rslora")))
            lora_a, lora_b = (
                part.lora_a.to(sides[0]) @ sides[0],
                part.lora_b.to(sides[1]) @ sides[1],
            )
            parts[module] = LoraFactors(lora_a, lora_b, part.scale, basis.embedding)
        metadata = core.metadata
        if config and rank is not None:
            metadata = {**metadata, "config": {**config, "r": rank, "rank_pattern": {}}}
        return Adapter(name, parts, core.saved, metadata)

    @torch.no_grad()
    def errors(self, bank: AdapterBank, names: Sequence[str] | None = None) -> SubspaceErrors:
        """How far the reconstructions are from a bank's adapters (default: all in both).

        From the factors and the cores as they are stored, in float64; nothing dense is formed.
        """
        return reconstruction_errors(self.bases, self.cores, bank, names, self.diagonal)

    def distance(self, adapter: Adapter) -> float:
        """The relative error of an adapter's projection, over all its modules."""
        own, core = AdapterBank(), AdapterBank()
        own.add(adapter)
        core.add(self.project(adapter))
        return reconstruction_errors(self.bases, core, own, None, self.diagonal).overall

    def add(self, adapter: Adapter) -> int:
        """Add one adapter and adapt the bases to it; see ``add_many``."""
        return self.add_many([adapter])[0]

    @torch.no_grad()
    def add_many(self, adapters: Iterable[Adapter]) -> list[int]:
        """Add adapters, adapt the bases to them and turn all stored cores; return their ids.

        Per module and side an SVD of [V S | new rows], as a fit would have weighted them: no old
        adapter is needed. What the old bases had left out stays lost: 20 adapters and 60 more ended
        within 1.5 % of a fit of all 80, added one by one within 3.5 %; nearly noiseless ones, of
        more directions than the basis has, within 4 and 9 %. Let more directions grow than are
        served (``truncated``; a third more: within 0.7 %). Ids and mixtures stay valid. "jd_diag":
        the bases stay as they are.

        Raises:
            ValueError: as ``project``; a name that is taken; cores in training. Nothing has
                changed then.
        """
        adapters = list(adapters)
        self._check_fits("Subspace.add", adapters)
        self._check_frozen("Subspace.add")
        added = AdapterBank(dtype=torch.float32, device=self.cores.device)
        added.add_many(adapters)
        bases = dict(self.bases)
        if not self.diagonal:
            for module, stack in added.stacks.items():
                bases[module] = extended_basis(self.bases[module], stack, self.options)
        changed = {
            m: b for m, b in bases.items() if b is not self.bases[m] and m in self.cores.stacks
        }
        held = {m: _state(self.cores.stacks[m]) for m in changed}
        for module, basis in changed.items():
            _turn(self.cores.stacks[module], self.bases[module], basis)
        try:
            ids = self.cores.add_many(
                [_core(adapter, bases, self.diagonal) for adapter in adapters]
            )
        except BaseException:  # also of an interrupt: turned cores fit no old basis
            for module, state in held.items():
                self.cores.stacks[module]._commit(*state)
            raise
        for module, basis in bases.items():  # layers hold the SharedBasis: it stays the same object
            self.bases[module].a, self.bases[module].b = basis.a, basis.b
        return ids

    @torch.no_grad()
    def truncated(self, rank: int) -> "Subspace":
        """A copy with the first ``rank`` principal directions of either side, to be served.

        What bases leave out, ``add`` cannot bring back: let a subspace with a third more directions
        grow, and serve what this makes of it. Nothing links the two afterwards.

        Args:
            rank: A module that has fewer directions keeps them all. The mean's direction and random
                ones stay.

        Raises:
            ValueError: cores in training, or "jd_diag", whose directions have no order.
        """
        check_whole("Subspace.truncated", "rank", rank)
        self._check_frozen("Subspace.truncated")
        if self.diagonal:
            rule = "have directions in order of their energy"
            raise invalid("Subspace.truncated", "subspace", rule, "'jd_diag'")
        cores, bases = copy.deepcopy(self.cores), {}
        for module, basis in self.bases.items():
            (a, rows_a), (b, rows_b) = basis.a.truncated(rank), basis.b.truncated(rank)
            bases[module] = SharedBasis(a, b, embedding=basis.embedding)
            if module in cores.stacks:
                stack = cores.stacks[module]
                sides = stack.lora_a[:, rows_a], stack.lora_b[:, rows_b]
                stack._commit(*sides, stack.scale, stack.ranks, 0)
        options = dataclasses.replace(self.options, rank=rank, energy=None)
        return Subspace(bases, cores, options, self.base)

    def new_task(
        self,
        name: str,
        *,
        rank: int = 8,
        alpha: float | None = None,
        modules: Iterable[str] | None = None,
        start: str | Adapter = "zero",
        std: float = 0.02,
        seed: int = 0,
    ) -> list[torch.nn.Parameter]:
        """Add a task of coefficients alone, 2 P rank per module, and return them to train.

        Args:
            name: What mixtures call it.
            rank: Of its core; with diagonal cores it is 1.
            alpha: The scale is alpha / rank. Default: rank.
            modules: Which layers it adapts. Default: all of the subspace.
            start: ``"zero"``: A's coefficients normal, 1 / sqrt(P), and B's zero: nothing changes
                yet. ``"random"``: both normal with ``std``, the paper's. An Adapter: its
                projection, whose ranks, scales and modules it keeps.
            std: See start.
            seed: Of the coefficients.

        Returns:
            The Parameters, of exactly this task (others are frozen): for the optimiser. They live
            in ``cores``; ``cores.freeze()`` ends training.
        """
        if name in self.cores:  # said before freeze() ends the training of another task
            raise invalid("Subspace.new_task", "name", "be new to the subspace", repr(name))
        if isinstance(start, Adapter):
            core = dataclasses.replace(self.project(start), name=name)
        else:
            core = self._fresh(name, rank, alpha, modules, start, std, seed)
        AdapterBank().add(core)  # what it refuses must not end the training of another task either
        self.cores.freeze()
        self.cores.add(core)
        return self.cores.trainable([name])

    def report(
        self,
        bank: AdapterBank,
        *,
        null_draws: int = 3,
        sample: int = 100,
        names: Sequence[str] | None = None,
        seed: int = 0,
        progress: bool | Callable[[int, int], None] = True,
    ):
        """Whether the adapters share anything: a SubspaceReport, see ``subspace_report``."""
        from lora_fused.methods.subspace_report import subspace_report  # which imports this module

        drawn = {"null_draws": null_draws, "sample": sample, "names": names, "seed": seed}
        return subspace_report(self, bank, **drawn, progress=progress)

    @torch.no_grad()
    def initial_adapter(
        self, name: str, *, rank: int = 8, alpha: float | None = None, strength: float = 0.0
    ) -> Adapter:
        """An ordinary adapter that begins in the principal directions: EigenLoRAx^INIT.

        A is the first ``rank`` rows of basis_a (the mean's direction, where kept, among them) and
        B ``strength`` times those of basis_b; 0: the update begins at zero, as LoRA's. All of A and
        B train. A layer whose basis is smaller has the rank that it gives.
        """
        check_whole("Subspace.initial_adapter", "rank", rank)
        alpha = rank if alpha is None else alpha
        parts = {}
        for module, basis in self.bases.items():
            found = min(rank, len(basis.a), len(basis.b))
            factors = basis.basis_a[:found].clone(), basis.basis_b[:found] * strength
            parts[module] = LoraFactors(*factors, alpha / found, basis.embedding)
        return Adapter(name, parts, metadata=self._metadata(parts, rank, alpha))

    def _fresh(self, name, rank, alpha, modules, start, std, seed) -> Adapter:
        if start not in ("zero", "random"):
            rule = "be 'zero', 'random' or an Adapter"
            raise invalid("Subspace.new_task", "start", rule, repr(start))
        check_whole("Subspace.new_task", "rank", rank)
        rank = 1 if self.diagonal else rank
        alpha = rank if alpha is None else alpha
        modules = list(self.bases if modules is None else modules)
        unknown = [module for module in modules if module not in self.bases]
        if unknown:
            raise invalid("Subspace.new_task", "modules", "be of the subspace", unknown)
        generator = torch.Generator().manual_seed(seed)
        parts = {}
        for module in modules:
            basis = self.bases[module]
            lora_a = torch.randn(rank, len(basis.a), generator=generator)
            lora_b = torch.randn(rank, len(basis.b), generator=generator) * std
            lora_a *= len(basis.a) ** -0.5 if start == "zero" else std
            lora_b = torch.zeros_like(lora_b) if start == "zero" else lora_b
            parts[module] = LoraFactors(lora_a, lora_b, alpha / rank)
        return Adapter(name, parts, metadata=self._metadata(parts, rank, alpha))

    def _metadata(self, parts: dict[str, LoraFactors], rank: int, alpha: float) -> dict:
        """Of a new adapter: a PEFT config, and which modules are convolutions."""
        config = peft_config(sorted(parts), rank, alpha, base=next(iter(self.base_names), None))
        return {"config": config, **pointwise_of(self.cores, parts)}

    def _check_frozen(self, op: str) -> None:
        if any(stack.trained for stack in self.cores.stacks.values()):
            rule = "be frozen while the bases change (call cores.freeze())"
            raise invalid(op, "cores", rule, "a task in training")

    def _check_fits(self, op: str, adapters: Sequence[Adapter]) -> None:
        for adapter in adapters:
            for module, part in adapter.modules.items():
                where = f"adapter {adapter.name!r} at {module!r}"
                if module not in self.bases:
                    raise invalid(op, where, "adapt modules of the subspace", "a module it lacks")
                basis = self.bases[module]
                sizes = [basis.basis_a.shape[1], basis.basis_b.shape[1]]
                if [part.lora_a.shape[1], part.lora_b.shape[1]] != sizes:
                    got = f"{shape(part.lora_a)} and {shape(part.lora_b)}"
                    raise invalid(op, where, f"have sizes (I, O) = {tuple(sizes)}", got)


def _core(adapter: Adapter, bases: dict[str, SharedBasis], diagonal: bool) -> Adapter:
    parts = {m: core_of(part, bases[m], diagonal) for m, part in adapter.modules.items()}
    return Adapter(adapter.name, parts, adapter.saved, adapter.metadata)


def _state(stack: AdapterStack) -> tuple:
    """What a stack's ``_commit`` takes to be again as it is."""
    return stack.lora_a, stack.lora_b, stack.scale, stack.ranks, stack._spare


def _turn(stack: AdapterStack, old: SharedBasis, new: SharedBasis) -> None:
    """Write a stack's cores in the coordinates of another basis."""
    lora_a = stack.lora_a @ (old.basis_a @ new.basis_a.mT).to(stack.lora_a)
    lora_b = stack.lora_b @ (old.basis_b @ new.basis_b.mT).to(stack.lora_b)
    stack._commit(lora_a, lora_b, stack.scale, stack.ranks, 0)
