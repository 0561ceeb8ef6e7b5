"""Whose device is the current one.

Kernels of Triton, streams, events and pinned memory belong to the thread's current CUDA device, wherever a tensor lies.
It is a thread's own setting: an engine may be made in one thread and stepped in another, as a server does, and several
engines may be in one process. So it is not set once; what works on a device is done inside `on_device`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Inside, a CUDA device is the thread's current one. Of any other device: nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
