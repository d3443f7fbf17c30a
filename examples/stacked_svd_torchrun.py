"""The principal directions of rows that are spread over processes, and the same in one process.

    torchrun --standalone --nproc-per-node 2 examples/stacked_svd_torchrun.py

Each rank holds its own rows of a [4000, 512] stack in bfloat16; what travels are sketches and small
Gram matrices. Then the first rank is given all rows, and both results are held side by side.
"""

import argparse
import sys

import torch
import torch.distributed as dist

from lora_fused.ops import StackedSvd, stacked_svd

ROWS, COLUMNS = 4000, 512
TOLERANCE = 1e-4  # float32 sums in another order


def rows_of(rank: int, ranks: int) -> torch.Tensor:
    """The rows of one rank, from a stack with singular values like 1/j and some noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=generator)).Q
    x = torch.randn(ROWS, COLUMNS, generator=generator) / torch.arange(1, COLUMNS + 1)
    return (x @ directions.mT).bfloat16().tensor_split(ranks)[rank]


def differences(sharded: StackedSvd, alone: StackedSvd) -> dict[str, float]:
    """How far the two results are apart, each relative to its own size."""
    p, q = (found.vh.double() * found.s.double()[:, None] for found in (sharded, alone))
    return {
        "singular values": float(((sharded.s - alone.s) / alone.s).abs().max()),
        "M^T M of what was found": float((p.mT @ p - q.mT @ q).norm() / (q.mT @ q).norm()),
        "residual": float((sharded.residual / alone.residual - 1).abs()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16, help="components")
    rank_asked = parser.parse_args().rank
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        here, ranks = dist.get_rank(), dist.get_world_size()
        mine = rows_of(here, ranks)
        found = stacked_svd(mine, rank=rank_asked, group=dist.group.WORLD)
        parts = [None] * ranks
        dist.all_gather_object(parts, found.u)
        return _compare(found, parts) if here == 0 else 0
    finally:
        dist.destroy_process_group()


def _compare(found: StackedSvd, parts: list[torch.Tensor]) -> int:
    """Print the result of all ranks beside that of one process; 0 where they are equal."""
    ranks = len(parts)
    for rank, part in enumerate(parts):
        print(f"rank {rank} of {ranks} held {len(part)} rows and found u {list(part.shape)}")
    m = torch.cat([rows_of(rank, ranks) for rank in range(ranks)])
    alone = stacked_svd(m, rank=len(found.s), method=found.method)
    u, s, vh = (t.double() for t in (torch.cat(parts), found.s, found.vh))
    true_error = float((m.double() - (u * s) @ vh).norm())
    share = float(found.energy.sum())
    print(f"method {found.method}: {len(found.s)} components hold {share:.2%} of ||M||^2")
    print(f"error {true_error:.6g}, certified to be at most {float(found.residual):.6g}")
    apart = differences(found, alone)
    for name, value in apart.items():
        print(f"{name}: {value:.1e} from one process with all rows")
    sound = max(apart.values()) < TOLERANCE and true_error <= float(found.residual)
    print("equal" if sound else f"NOT EQUAL within {TOLERANCE:g}")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
