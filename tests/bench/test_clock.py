"""The clocks: what a sample is, and how kernel times become calls."""

import time

import pytest

from bench import clock


def test_wall_clock_times_each_call():
    taken = clock.WallClock().sample(lambda i: time.sleep(0.01), 3)
    assert len(taken) == 3 and all(0.01 <= t < 1 for t in taken)


def test_short_programs_are_timed_several_at_once():
    seen = []
    assert len(clock.WallClock().sample(seen.append, 2)) == 2
    assert len(seen) > 10


def test_kernels_are_summed_by_call():
    kernels = [("dot", 2.0), ("add", 1.0), ("dot", 4.0), ("add", 3.0)]
    assert clock.per_call(kernels, 2) == pytest.approx([3e-3, 7e-3])


@pytest.mark.parametrize("kernels", [[], [("dot", 1.0)] * 3], ids=["none", "three in two calls"])
def test_kernels_that_cannot_be_split_are_an_error(kernels):
    with pytest.raises(ValueError, match=f"{len(kernels)} kernels were seen in 2 calls"):
        clock.per_call(kernels, 2)


class FakeCupti:
    """What the driver would say of a program of two kernels."""

    def __init__(self) -> None:
        self.open, self.calls = False, 0

    def _cupti_init(self) -> None:
        self.open = True

    def _cupti_get_timings(self, finalize: bool) -> list[tuple[str, float]]:
        self.open = False
        return [("a", 1.0), ("b", 0.5)] * self.calls


def test_the_kernel_clock_closes_the_profiler_even_when_the_program_fails():
    kernels = clock.KernelClock.__new__(clock.KernelClock)
    kernels._cupti = fake = FakeCupti()

    def call(i):
        assert fake.open
        fake.calls += 1
        return ()

    assert kernels.sample(call, 2) == pytest.approx([1.5e-3, 1.5e-3])

    assert kernels.sample(call, 1, "b") == pytest.approx([3 * 0.5e-3])

    def broken(i):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        kernels.sample(broken, 1)
    assert not fake.open


def test_without_a_gpu_the_report_says_wall_clock():
    assert "wall clock" in clock.clock().name
