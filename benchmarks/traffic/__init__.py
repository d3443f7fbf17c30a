"""What Triton kernels ask of a GPU's memory, counted in Triton's interpreter on a CPU.

    with count() as counter:
        kernel[grid](...)
    counter.total.read.launch, counter.launches[0].arguments["x_ptr"]["read"].program

Bytes are counted at five levels of reuse, masked lanes left out:

    lane     what the active lanes ask for
    op       an element that one load or store asks for twice counts once
    sector   32-byte sectors touched by one load or store: what an uncoalesced access wastes
    program  distinct bytes of each program: L2 traffic, with perfect reuse within a program
    launch   distinct bytes of each launch: DRAM traffic, with perfect reuse in L2

Out-of-bounds lanes (outside the memory of every tensor argument) are counted and not performed. A
race is an element that one program stores and another stores or reads in the same launch; atomics
are no races. The interpreter's seconds say nothing about a GPU's.

Command: ``python -m benchmarks.traffic --help``
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from benchmarks.traffic.counter import Bytes, Counts, Launch, LaunchCounter, count

__all__ = ["Bytes", "Counts", "Launch", "LaunchCounter", "count"]
