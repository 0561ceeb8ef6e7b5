"""Initializer: what a parameter holds before training. Each model family maps its parameter names to these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Normal:
    """Independent normal values of mean 0."""

    std: float


@dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float


Initializer = Normal | Constant
