"""A linear layer per group of rows, with the groups' sizes known only to the device: the experts of a mixture."""

from kernels.grouped_linear.op import (
    choose_grouped_linear,
    grouped_linear,
    grouped_linear_pair,
    input_gradient,
    pair_input_gradient,
    weight_gradient,
)

__all__ = [
    "choose_grouped_linear",
    "grouped_linear",
    "grouped_linear_pair",
    "input_gradient",
    "pair_input_gradient",
    "weight_gradient",
]
