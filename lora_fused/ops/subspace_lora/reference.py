"""The definition of subspace_lora in plain torch: CPU fallback and oracle of every kernel.

    y[n] = base[n] + basis_b^T (sum_j weights[m,j] * scale[k] * M_k) (basis_a x[n])
           with m = row_mixture[n // (N // S)], k = adapter_ids[m,j], k = -1 adding nothing

Axes in names: n rows of one group of rows that share a mixture, s groups, j adapters of a mixture,
p and q directions of basis_a and basis_b, r rank, i input, o output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,
    basis_a: Tensor,
    basis_b: Tensor,
    core_a: Tensor,
    core_b: Tensor | None,
    row_start: Tensor | None,
    adapter_ids: Tensor,
    weights: Tensor,
    scale: Tensor | None,
    row_mixture: Tensor | None,
    base: Tensor | None,
    max_rank: int | None = None,
) -> Tensor:
    """Compute subspace_lora for x [N, I]; arguments as api.subspace_lora has normalised them."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if row_mixture is not None:
        adapter_ids, weights = adapter_ids[row_mixture], weights[row_mixture]
    cores = Cores(core_a, core_b, row_start, scale, max_rank)
    live_sj = cores.live(adapter_ids)
    weights = torch.where(live_sj, weights.to(compute), 0.0)  # even where it is NaN
    factor_sj = weights * cores.scale_of(adapter_ids, live_sj).to(compute)
    # A row without an adapter adds exactly nothing and has a zero gradient even where x is not
    # finite, so it is masked on its way into the basis and on its way out.
    used_s = live_sj.any(1)[:, None, None]
    groups = adapter_ids.shape[0]
    x_sni = x.to(compute).reshape(groups, x.shape[0] // max(groups, 1), x.shape[1])
    z_snp = torch.where(used_s, x_sni @ basis_a.to(compute).T, 0.0)
    t_snq = mix(cores, z_snp, adapter_ids, live_sj, factor_sj, basis_b.shape[0])
    update_sno = torch.where(used_s, t_snq @ basis_b.to(compute), 0.0)
    update = update_sno.reshape(x.shape[0], basis_b.shape[1])
    if base is None:
        return update.to(x.dtype)
    return (base.to(compute) + update).to(base.dtype)


def mix(
    cores: "Cores", z_snp: Tensor, ids_sj: Tensor, live_sj: Tensor, factor_sj: Tensor, q: int
) -> Tensor:
    """sum_j factor M_k z [s, n, q]: the middle stage, all of it in basis coordinates."""
    compute, n_j = z_snp.dtype, ids_sj.shape[1]
    t_snq = z_snp.new_zeros(*z_snp.shape[:2], q)
    if n_j and not cores.pairs and z_snp.shape[1] > n_j:
        # Enough rows share a mixture: its core is formed once. (Ranks side by side cost less.)
        parts = (cores.gather(ids_sj[:, j], live_sj[:, j], compute) for j in range(n_j))
        flat = (part.flatten(1) * factor_sj[:, j, None] for j, (part,) in enumerate(parts))
        core = sum(flat).reshape(len(ids_sj), *cores.core_a.shape[1:])
        return apply(z_snp, core)
    for j in range(n_j):
        core = cores.gather(ids_sj[:, j], live_sj[:, j], compute)
        u_snq = torch.where(live_sj[:, j, None, None], apply(z_snp, *core), 0.0)
        t_snq = t_snq + u_snq * factor_sj[:, j, None, None]
    return t_snq


def apply(z_snp: Tensor, core_a: Tensor, core_b: Tensor | None = None) -> Tensor:
    """M z for one core of each group: a pair [s, r, p] and [s, r, q], full or diagonal."""
    if core_b is not None:
        return (z_snp @ core_a.mT) @ core_b
    return z_snp * core_a[:, None] if core_a.dim() == 2 else z_snp @ core_a.mT


class Cores:
    """The three forms of cores under one addressing; what is not live gathers as zeros."""

    def __init__(self, core_a, core_b, row_start, scale, max_rank):
        self.pairs = core_b is not None
        self.count = row_start.shape[0] - 1 if self.pairs else core_a.shape[0]
        # Gathering needs something to point at, also where there are no adapters.
        pad = (0, 0) * (core_a.dim() - 1) + (0, int(core_a.shape[0] == 0))
        self.core_a = F.pad(core_a, pad) if pad[-1] else core_a
        self.scale = scale if scale is None or self.count else F.pad(scale, (0, 1))
        if self.pairs:
            self.core_b = F.pad(core_b, pad) if pad[-1] else core_b
            self.start, self.rank = F.pad(row_start, (0, 1)), F.pad(row_start.diff(), (0, 1))
            rows = max_rank if max_rank is not None else core_a.shape[0]
            self.offset_r = torch.arange(max(rows, 1), device=core_a.device)

    def live(self, ids: Tensor) -> Tensor:
        """Which ids name an adapter that is there: not -1 (or out of range), not empty."""
        live = (ids >= 0) & (ids < self.count)
        return live & (self.rank[torch.where(live, ids, 0)] > 0) if self.pairs else live

    def scale_of(self, ids: Tensor, live: Tensor) -> Tensor:
        """The scale of each id, zero for those not live."""
        if self.scale is None:
            return live
        return torch.where(live, self.scale[torch.where(live, ids, 0)], 0.0)

    def gather(self, ids_s: Tensor, live_s: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The core of each id, as ``apply`` takes it."""
        ids_s = torch.where(live_s, ids_s, 0)
        if not self.pairs:
            core = self.core_a[ids_s].to(dtype)
            return (torch.where(live_s.reshape(-1, *[1] * (core.dim() - 1)), core, 0.0),)
        own_sr = live_s[:, None] & (self.offset_r < self.rank[ids_s, None])
        row_sr = torch.where(own_sr, self.start[ids_s, None] + self.offset_r, 0)
        return tuple(
            torch.where(own_sr[..., None], t[row_sr].to(dtype), 0.0)
            for t in (self.core_a, self.core_b)
        )
