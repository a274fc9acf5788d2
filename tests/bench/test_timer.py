"""The timers: what one sample is, and how kernel times are summed per call."""

import time

import pytest

from bench.operations import timer


def test_wall_clock_times_each_call():
    taken = timer.WallClock().sample(lambda i: time.sleep(0.01), 3)
    assert len(taken) == 3 and all(0.01 <= t < 1 for t in taken)


def test_short_programs_are_timed_in_groups():
    seen = []
    assert len(timer.WallClock().sample(seen.append, 2)) == 2
    assert len(seen) > 10


def test_kernel_times_are_summed_per_call():
    kernels = [("dot", 2.0), ("add", 1.0), ("dot", 4.0), ("add", 3.0)]
    assert timer.per_call(kernels, 2) == pytest.approx([3e-3, 7e-3])


@pytest.mark.parametrize("kernels", [[], [("dot", 1.0)] * 3], ids=["none", "three in two calls"])
def test_kernels_not_divisible_by_calls_raise(kernels):
    with pytest.raises(ValueError, match=f"{len(kernels)} kernels were seen in 2 calls"):
        timer.per_call(kernels, 2)


class FakeCupti:
    """What the driver would say of a program of two kernels."""

    def __init__(self) -> None:
        self.subscribed, self.detached, self.recorded = False, 0, 0

    def _cupti_init(self) -> None:
        self.subscribed, self.recorded = True, 0

    def _cupti_get_timings(self, finalize: bool) -> list[tuple[str, float]]:
        self.subscribed = False
        self.detached += finalize
        return [("a", 1.0), ("b", 0.5)] * self.recorded


def test_kernel_clock_warms_up_untimed_and_stays_attached():
    fake = FakeCupti()
    kernels, seen = timer.KernelClock(fake), []

    def call(i):
        seen.append((i, fake.subscribed))
        fake.recorded += fake.subscribed
        return ()

    assert kernels.sample(call, 2) == pytest.approx([1.5e-3, 1.5e-3])
    assert seen == [(-2, False), (-1, False), (0, True), (1, True)]
    assert kernels.sample(call, 1, "b") == pytest.approx([0.5e-3])
    assert not fake.subscribed and not fake.detached, "attaching again would take a second and slow the next launches"


def test_kernel_clock_unsubscribes_when_the_program_fails():
    fake = FakeCupti()

    def broken(i):
        if i >= 0:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        timer.KernelClock(fake).sample(broken, 1)
    assert not fake.subscribed


def test_report_says_wall_clock_without_a_gpu():
    assert "wall clock" in timer.clock().name
