"""What Triton kernels launch and move, counted in the interpreter."""

from collections.abc import Callable, Iterable

from torch import Tensor


def launched(call: Callable[[], Tensor]) -> tuple[Tensor, list[str]]:
    """The result of a call, and its kernels, none out of bounds or in a race."""
    from benchmarks.traffic import count

    with count() as counter:
        result = call()
    assert counter.total.out_of_bounds == counter.total.races == 0
    return result, [launch.kernel for launch in counter.launches]


def assert_predicted(launches: Iterable, expected: Iterable) -> None:
    """Launches move what the model says, but for the ids, weights and blocks they read beside."""
    for counted, predicted in zip(launches, expected, strict=True):
        assert 0 <= counted.dram_bytes - predicted.dram <= 0.02 * predicted.dram
        assert 0 <= counted.l2_bytes - predicted.total <= 0.06 * predicted.total
        assert 0 <= counted.largest_program - predicted.largest <= 0.06 * predicted.largest
        assert counted.storing_programs == predicted.programs
