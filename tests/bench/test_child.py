"""The benchmark's other processes: the raw socket, the kernel, and how a failure reaches the caller."""

from __future__ import annotations

import pytest

from headwater_bench.child import Child, ChildFailed
from headwater_bench.kernel import KernelAlone
from headwater_bench.sockets import RawSocket


@pytest.mark.parametrize("transport", ["local", "tcp"])
def test_the_raw_socket_bounces_every_byte(transport: str) -> None:
    raw = RawSocket(transport, 300_000)
    try:
        assert len(raw.round_trips(3)) == 3
    finally:
        raw.close()


def test_a_childs_failure_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with Child("echo", port=1) as child, pytest.raises(ChildFailed, match="echo process ended with code 1"):
        child.ask("bounce", size=1, times=1)
    assert "ConnectionRefusedError" in capfd.readouterr().err


def test_the_kernel_steps_each_optimizer() -> None:
    kernel = KernelAlone([64, 64], ["SGD", "AdamW"])
    assert len(kernel.step("SGD", times=2)) == 2
    assert all(seconds > 0 for seconds in kernel.step("AdamW", times=2))
