"""Print, as JSON, digests of native results: run in a process of its own for each instruction set.

Forward and backward, every pair of dtypes, all three storage forms, sizes that leave tails.
"""

import hashlib
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from lora_fused import _C
from support.mixture_lora import DTYPES, FORMS, LEAVES, gradients, name, problem, run

SHAPES = ((65, 3, (1, 3, 7, 8, 16, 33, 64, 0), 127, 33), (3, 2, (5, 20), 1000, 65))


def digest(t: torch.Tensor) -> str:
    data = t.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def digests() -> dict[str, str]:
    found = {}
    for shape, form, x_dtype, dtype in itertools.product(SHAPES, FORMS, DTYPES, DTYPES):
        p = problem(*shape, x_dtype=x_dtype, dtype=dtype, form=form)
        label = f"{shape[0]} {form} {name(x_dtype)} {name(dtype)}"
        found[label] = digest(run(p, "native"))
        for leaf, grad in gradients(p, "native", LEAVES[:-1]).items():
            found[f"{label} {leaf}"] = digest(grad)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"isa": _C.isa(), "digests": digests()}))
