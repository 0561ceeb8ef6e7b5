"""Measuring a machine: every rate is there, and the file can be planned with."""

from __future__ import annotations

from pathlib import Path

import torch

from launch.calibrate import _this_machine
from planner.calibrate import Measured, Sizes, measure
from planner.hardware_files import as_yaml, hardware_of, read_hardware
from tests.pool import RankPool

TINY = Sizes((16, 32), (1, 32), (16, 32), (16, 32), (2, 8, 16), 2**16, 2**10, [2**12, 2**14], 2**12)


def _measure() -> Measured:
    device = torch.device("cpu")
    found = measure(device, local_world_size=2, sizes=TINY)
    _this_machine(found, device, 2)
    return found


def test_a_measured_file_is_complete_and_says_what_was_not_measured(ranks: RankPool, tmp_path: Path) -> None:
    """A rate that is missing, or of another machine without a word."""
    found = ranks.run(2, _measure)[0]
    like, wrong = read_hardware("h200")
    assert wrong == []
    path = tmp_path / "mine.yaml"
    path.write_text(text := as_yaml(found.rates, found.tables, found.why, like, "h200"))
    mine, wrong = read_hardware(str(path))
    assert wrong == []
    assert (mine.name, mine.gpus_per_node) == ("cpu", 2)
    assert mine.network_gbps == like.network_gbps
    assert "network_gbps: 40.0 # of h200, not measured: there is one node" in text
    assert mine.node_gbps != like.node_gbps
    assert [size for size, _ in mine.tables["all_reduce_node_gbps"]] == [2**12, 2**14]
    assert [row[:2] for row in mine.attention_tflops] == [[16, 16], [16, 32], [32, 16], [32, 32]]
    assert 0 < mine.eager_share <= 1
    assert "kernel_us: 5.0 # of h200, not measured" in text
    assert mine.matmul_tflops["bf16"] == mine.tables["matmul_bf16"][-1][1]


def test_a_device_is_known_by_its_whole_name() -> None:
    """A slice of a GPU, or another model of it, planned with the rates of the whole one."""
    known = hardware_of("NVIDIA H200")
    assert known is not None
    assert known.peak_tflops == 989.0
    assert hardware_of("NVIDIA H200 MIG 1g.18gb") is None
