"""Which CPU measured: its model name, its cores and the load average, in the head of every document.

All CPUs share the folder profiles/cpu/, so results count as comparable only if their heads name the same CPU.
"""

import functools
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict


class CPU(TypedDict):
    """A CPU and how busy it was.

    Attributes:
        model: name of the model, as in /proc/cpuinfo.
        cores: number of cores that the process may use.
        load_average: processes that wanted to run in the last 1, 5 and 15 minutes, when the run began.
    """

    model: str
    cores: int
    load_average: list[float]


@functools.cache
def this_cpu() -> CPU:
    """Describe this machine's CPU; the load average is that of the first call."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else []
    return {"model": _model(Path("/proc/cpuinfo")), "cores": cores, "load_average": load}


def _model(cpuinfo: Path) -> str:
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return " ".join(next(names, "").split()) or platform.processor() or platform.machine()


def name(document: Mapping[str, Any]) -> str:
    """Name the CPU of a document, as in "AMD EPYC, 2 cores"; "" if the document is older than this head."""
    cpu = document.get("cpu")
    return f"{cpu['model']}, {cpu['cores']} core{'s' * (cpu['cores'] != 1)}" if cpu else ""


def describe(document: Mapping[str, Any]) -> str:
    """Describe the CPU of a document and its load in one line; "" if the document does not say."""
    load = ", ".join(f"{value:g}" for value in (document.get("cpu") or {}).get("load_average", []))
    return name(document) + (f", load average {load}" if load else "")


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two documents may be compared: measured on an accelerator, or on the same CPU."""
    if one["platform"] != "cpu" and other["platform"] != "cpu":
        return True
    return name(one) == name(other)
