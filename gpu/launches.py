"""The launches of a step as a graph: one after another, or overlapped where that is measured to be faster.

Overlapped, the first blocks of a kernel come as the last ones before it leave, and ask for their first weights while
those end (kernels/ptx.cuh, after_earlier_launches). Whether that pays depends on card, driver and kernels, so the first
step of a kind is replayed both ways.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from neox.gpu.device import Array, Device, Graph

TRIES = 5  # replays of either graph, after one that is not timed


@dataclass(frozen=True)
class Trial:
    """How launches can be tried: a replay changes nothing but what it computes anew, and `state`."""

    kind: str  # of step: the outcome holds for all of it on a device
    state: tuple[Array, ...]


@dataclass
class Launches:
    """Those of a step: the first time as they are, since a capture can compile nothing, then as a graph.

    trial: None where other devices wait for this one, and would have to try as often.
    """

    device: Device
    launch: Callable[[], None]
    trial: Trial | None = None
    graph: Graph | None = None
    compiled: bool = False

    def run(self) -> None:
        if not self.compiled:
            self.launch()
            self.compiled = True
            return
        self.graph = self.graph or captured(self.device, self.launch, self.trial)
        self.graph.replay()


def captured(device: Device, launch: Callable[[], None], trial: Trial | None) -> Graph:
    """The faster graph of these launches, whose kernels are compiled."""
    plain = device.capture(launch)
    if trial is None or not (device.may_overlap and device.can_overlap):
        return plain
    try:
        overlapped = device.capture(launch, overlapped=True)
    except RuntimeError as error:  # of the driver; without it the step is slower, but right
        warnings.warn(f"launches cannot overlap on this device: {error}", RuntimeWarning, stacklevel=2)
        device.may_overlap = False
        return plain
    pays = device.kept(f"overlap of {trial.kind}", lambda: is_faster(device, overlapped, plain, trial.state))
    return overlapped if pays else plain


def is_faster(device: Device, one: Graph, other: Graph, state: Sequence[Array]) -> bool:
    """By the medians of replays in turns, each from the same state, which is there again afterwards."""
    before = [array.get() for array in state]
    seconds: dict[Graph, list[float]] = {one: [], other: []}
    for _ in range(TRIES + 1):
        for graph, taken in seconds.items():
            start = device.mark()
            graph.replay()
            taken.append(device.seconds(start, device.mark()))
            for array, values in zip(state, before, strict=True):
                array.set(values)
    return statistics.median(seconds[one][1:]) < statistics.median(seconds[other][1:])
