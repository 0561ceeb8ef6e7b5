"""Tokens per second, MFU and the table of peaks."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from trainer.throughput import DTYPES, StepClock, Throughput, mfu_peak, peak_flops


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
    ],
)
def test_a_device_name_finds_its_own_peak(name: str, bf16: float | None) -> None:
    """Catches A10 found in A100, L4 in L40S, and a slice or a slower variant given a full chip's peak."""
    assert peak_flops(name, "bf16") == bf16


def test_the_peaks_of_a_device_stand_in_the_ratios_of_its_hardware() -> None:
    """Catches a sparse number among dense ones: fp16 runs as bf16 does, fp8 twice as fast, fp32 far slower."""
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA B200", "NVIDIA L40S", "NVIDIA GeForce RTX 4090"):
        fp32, bf16, fp16, fp8 = (peak_flops(name, dtype) for dtype in DTYPES)
        assert fp32 is not None
        assert bf16 is not None
        assert fp8 is not None
        assert bf16 == fp16
        assert fp8 / bf16 == pytest.approx(2, rel=0.02)
        assert 1.9 < bf16 / fp32 < 32


def test_a_dtype_the_chip_has_no_units_for_has_no_peak_and_a_wrong_one_is_an_error() -> None:
    """Catches an fp8 rate on Ampere, and a typo that is answered with None."""
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp8") is None
    with pytest.raises(ValueError, match=r"dtype='bfloat16'.*fp32, bf16, fp16, fp8"):
        peak_flops("NVIDIA H200", "bfloat16")


def test_the_peak_of_mfu_is_the_setting_then_the_table_and_else_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Catches an unknown GPU whose missing mfu nobody explains, and a warning on every CPU run."""
    assert mfu_peak("NVIDIA H200", None) == 989e12
    assert mfu_peak("NVIDIA H200", 500.0) == 500e12
    assert mfu_peak("cpu", 0.5) == 0.5e12
    with caplog.at_level(logging.WARNING):
        assert mfu_peak("cpu", None) is None
        assert caplog.records == []
        assert mfu_peak("NVIDIA X1000", None) is None
        assert "logging.peak_tflops" in caplog.text
    with pytest.raises(ValueError, match=r"logging\.peak_tflops=0"):
        mfu_peak("cpu", 0)


def test_speed_of_a_step_is_the_definition_by_hand() -> None:
    """Catches a rate that forgets the number of ranks, and MFU against the wrong peak."""
    speed = Throughput(world_size=4, flops_per_token=6e9, peak=100e12)
    # 80,000 tokens / 2 s / 4 ranks; 6e9 x 1e4 / 1e14
    expected = {"step_seconds": 2.0, "tokens_per_second_per_gpu": 10_000.0, "mfu": pytest.approx(0.6)}
    assert speed.of_step(80_000, 2.0) == expected
    assert Throughput(world_size=1, flops_per_token=6e9, peak=None).of_step(1, 1.0)["mfu"] is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_lasts_from_the_end_of_the_last_one(device: str) -> None:
    """Catches a validation counted into a step, and a step timed by when the host happened to look."""
    clock = StepClock(torch.device(device))
    marks = [clock.mark(), clock.mark()]
    time.sleep(0.05)
    marks.append(clock.mark())
    time.sleep(0.05)  # the host looks late
    durations = [clock.seconds_to(mark) for mark in marks]
    assert durations[1] < 0.02
    assert 0.05 <= durations[2] < 0.09
    time.sleep(0.05)
    clock.start()
    assert clock.seconds_to(clock.mark()) < 0.02
