"""How long a call took: on a CPU by the host's clock, on another device by its own events."""

from time import perf_counter_ns

import torch
from torch import Tensor


class Span:
    """From when it is made until `stop`, on the device of a tensor.

    A device works behind the host: its events are put among its work, and only `nanoseconds`
    waits for them.
    """

    def __init__(self, tensor: Tensor):
        self.start = perf_counter_ns()  # of the host
        self._device = None if tensor.is_cpu else tensor.device
        self._began = self._event()

    def stop(self) -> "Span":
        self._end = perf_counter_ns()
        self._ended = self._event()
        return self

    def _event(self) -> torch.Event | None:
        if self._device is None:
            return None
        event = torch.Event(self._device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._device))
        return event

    @property
    def nanoseconds(self) -> int:
        if self._began is None or self._ended is None:
            return self._end - self.start
        self._ended.synchronize()
        return round(self._began.elapsed_time(self._ended) * 1e6)
