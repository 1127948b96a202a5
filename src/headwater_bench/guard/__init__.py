"""``make bench-guard``: counts of what does not depend on the machine, against those in ``benchmarks/guard.json``.

A small push over real sockets, a bulk step of two workers and a lease, each after its warm-up: how many calls of
functions, how many of C functions, how many system calls on sockets, how much of Python's memory at once. ``lockstep``
makes them the same in every run: one thread at a time, and no time passes. ``workloads`` says what is counted,
``counting`` counts it, ``compare`` judges.

Instructions (``perf stat``) are not compared: they differ between processors and builds of torch, so figures in the
repository would hold for one machine.
"""
