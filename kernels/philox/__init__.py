"""Counter-based random numbers: a value is a pure function of (seed, stream, index), whichever rank asks for it."""

from kernels.philox.reference import four_uniforms, normal, philox4x32, stream_id, uniform

__all__ = ["four_uniforms", "normal", "philox4x32", "stream_id", "uniform"]
