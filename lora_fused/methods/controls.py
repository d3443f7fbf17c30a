"""Banks to compare a bank with: nothing shared, and the same updates in other factors."""

import torch
from torch import Tensor

from lora_fused.adapters import Adapter, AdapterBank, LoraFactors

# Singular values of a change of gauge lie within this factor of 1: far from singular.
_STRETCH = 2.0


@torch.no_grad()
def unrelated(bank: AdapterBank, *, seed: int = 0) -> AdapterBank:
    """The null: adapters of the same norms, ranks and spectra that share nothing.

    Each D_k becomes Q_out D_k Q_in with rotations of its own, drawn at random per module: B_k B_k^T
    and A_k A_k^T stay, and with them every singular value; common directions, a common mean and a
    common initialisation are gone. Random factors of equal norm would be no fair null: their
    spectra are flat, so real adapters would look the more compressible for that alone.
    """
    return _changed(bank, seed, lambda part, gen: [_turned(f, gen) for f in part])


@torch.no_grad()
def regauged(bank: AdapterBank, *, seed: int = 0) -> AdapterBank:
    """The same updates with every (A, B) as (M A, M^-T B), M random and well conditioned."""
    return _changed(bank, seed, _regauged)


def _changed(bank: AdapterBank, seed: int, change) -> AdapterBank:
    generator, adapters = torch.Generator().manual_seed(seed), []
    for name in bank.names:
        parts = {}
        for module, part in bank.adapter(name).modules.items():
            factors = [f.double().cpu() for f in (part.lora_a, part.lora_b)]
            lora_a, lora_b = (f.float() for f in change(factors, generator))
            parts[module] = LoraFactors(lora_a, lora_b, part.scale, part.embedding)
        adapters.append(Adapter(name, parts))
    made = AdapterBank(dtype=torch.float32, device=bank.device)
    made.add_many(adapters)
    return made


def _turned(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows ``[R, I]`` with the same Gram matrix in a random place."""
    r = torch.linalg.qr(rows.mT, mode="r").R
    drawn = torch.randn(rows.shape[1], len(r), generator=generator, dtype=rows.dtype)
    return r.mT @ torch.linalg.qr(drawn).Q.mT


def _regauged(factors: list[Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    lora_a, lora_b = factors
    size = (2, len(lora_a), len(lora_a))
    left, right = torch.linalg.qr(torch.randn(*size, generator=generator, dtype=lora_a.dtype)).Q
    stretch = _STRETCH ** (2 * torch.rand(len(lora_a), generator=generator) - 1).to(lora_a)
    return left @ (stretch[:, None] * (right @ lora_a)), left @ (
        (right @ lora_b) / stretch[:, None]
    )
