"""Cases of GeGLU."""

from __future__ import annotations

from functools import partial

from kernels.geglu import geglu, geglu_fused
from kernels.geglu.reference import geglu_fused_reference, geglu_reference
from tests.kernels.ops.case import Case
from tests.kernels.ops.swiglu import _inputs, _inputs_fused

CASES = [
    Case(
        name=f"geglu_{name}",
        op=partial(geglu, approximate=approximate),
        reference=partial(geglu_reference, approximate=approximate),
        inputs=_inputs,
        shapes=[(5, 123), (2, 3, 7), (0, 5)],
        differentiable=(0, 1),
        batched=(0, 1),
        extremes=(0.0, 1e2, -1e2),
    )
    for name, approximate in (("tanh", "tanh"), ("erf", "none"))
] + [
    Case(
        name="geglu_fused",
        op=geglu_fused,
        reference=geglu_fused_reference,
        inputs=_inputs_fused,
        shapes=[(5, 123), (2, 3, 7)],
        differentiable=(0,),
        extremes=(0.0,),
    )
]
