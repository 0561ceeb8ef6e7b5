"""MoEConfig and RoutingConfig: a mixture of experts, and how its router is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from parallel.problem import Problem, values

ROUTERS = ("softmax", "switch", "gshard", "sigmoid")


@dataclass
class MoEConfig:
    """`model.moe`: what the weights of the experts mean. num_experts=0 is a dense model."""

    num_experts: int = 0
    top_k: int = 2  # experts per token
    intermediate_size: int = 0  # features inside an expert
    num_shared: int = 0  # experts that every token goes to, as one network of num_shared * intermediate_size features
    first_dense: int = 0  # this many first layers are dense
    every: int = 1  # of the others, layer i has experts if i + 1 is a multiple of this
    dense_layers: list[int] | None = None  # more layers without experts
    router: str = "softmax"  # one of ROUTERS (models/layers/router.py)
    normalize: bool = True  # weights of a token's experts are divided by their sum
    scaling: float = 1.0  # and multiplied by this
    num_groups: int = 1  # experts are divided into groups, of which a token may use top_groups
    top_groups: int = 1

    def in_layer(self, layer: int) -> bool:
        """Whether a layer has experts."""
        if self.num_experts == 0 or layer < self.first_dense or layer in (self.dense_layers or ()):
            return False
        return (layer + 1) % self.every == 0

    def resolve(self, num_layers: int) -> MoEConfig:
        """The same mixture with one way to say each thing: the layers as first_dense and dense_layers."""
        sparse = [layer for layer in range(num_layers) if self.in_layer(layer)]
        if not sparse:
            return MoEConfig()
        dense = [layer for layer in range(sparse[0], num_layers) if layer not in sparse]
        groups = (1, 1) if self.num_groups == self.top_groups else (self.num_groups, self.top_groups)
        return replace(
            self,
            first_dense=sparse[0],
            every=1,
            dense_layers=dense or None,
            num_groups=groups[0],
            top_groups=groups[1],
        )


@dataclass
class RoutingConfig:
    """`model.routing`: how routers are trained. A run may change it; weights do not depend on it."""

    aux_weight: float = 0.0  # of the load-balance loss, mean over sequences, summed over layers
    z_weight: float = 0.0  # of the mean squared log-sum-exp of router logits (ST-MoE, 2202.08906, eq. 5), likewise
    capacity_factor: float = 0.0  # in training, an expert takes this times its share of a sequence; 0: no limit
    bias_update_rate: float = 0.0  # sigmoid: step of the balancing bias, against the load of the global batch


def moe_problems(
    moe: MoEConfig, routing: RoutingConfig, *, num_layers: int, gated: bool, norm_first: bool
) -> list[str]:
    """Every reason why these experts cannot be built; one line each."""
    found = []
    for name in ("aux_weight", "z_weight", "capacity_factor", "bias_update_rate"):
        if getattr(routing, name) < 0:
            found.append(f"model.routing.{name}={getattr(routing, name)} must not be negative; 0 switches it off")
        elif getattr(routing, name) > 0 and moe.num_experts == 0:
            found.append(f"model.routing.{name}={getattr(routing, name)} without experts; set model.moe.num_experts")
    if moe.num_experts == 0:
        return found
    minimums = {"num_experts": 1, "top_k": 1, "intermediate_size": 1, "every": 1, "num_groups": 1, "top_groups": 1}
    minimums |= {"num_shared": 0, "first_dense": 0}
    wrong: list[str] = [
        f"model.moe.{name}={getattr(moe, name)} must be at least {minimum}"
        for name, minimum in minimums.items()
        if getattr(moe, name) < minimum
    ]
    if moe.router not in ROUTERS:
        wrong.append(Problem(f"model.moe.router={moe.router} is unknown", values("model.moe.router", ROUTERS)))
    if not gated:
        wrong.append("model.gated_mlp=false does not work with model.moe.num_experts > 0: experts are gated; use true")
    if not norm_first:
        wrong.append("model.norm_first=false does not work with model.moe.num_experts > 0; use true")
    if wrong:
        return found + wrong
    return found + _router_problems(moe, routing) + _layer_problems(moe, num_layers)


def _router_problems(moe: MoEConfig, routing: RoutingConfig) -> list[str]:
    found = []
    fixed = {"switch": 1, "gshard": 2}.get(moe.router)
    if fixed is not None and moe.top_k != fixed:
        found.append(f"model.moe.top_k={moe.top_k} does not fit model.moe.router={moe.router}; use {fixed}")
    if moe.router == "switch" and moe.normalize:
        found.append(
            "model.moe.normalize=true makes the one weight of model.moe.router=switch 1, so that the router cannot "
            "learn; use false"
        )
    if moe.router == "gshard" and not moe.normalize:
        found.append("model.moe.normalize=false does not fit model.moe.router=gshard, which draws by the normalised "
                     "weight; use true")  # fmt: skip
    if moe.num_experts % moe.num_groups:
        legal = [d for d in range(1, moe.num_experts + 1) if moe.num_experts % d == 0]
        what = f"model.moe.num_groups={moe.num_groups} does not divide model.moe.num_experts={moe.num_experts}"
        return [*found, Problem(what, values("model.moe.num_groups", legal, near=moe.num_groups))]
    size = moe.num_experts // moe.num_groups
    if moe.top_groups > moe.num_groups:
        found.append(f"model.moe.top_groups={moe.top_groups} is above model.moe.num_groups={moe.num_groups}; lower it")
    elif moe.top_k > moe.top_groups * size:
        found.append(
            f"model.moe.top_k={moe.top_k} is above the {moe.top_groups * size} experts of model.moe.top_groups="
            f"{moe.top_groups} groups; use at most {moe.top_groups * size}"
        )
    if moe.router == "sigmoid" and moe.top_groups < moe.num_groups and size < 2:
        found.append(f"model.moe.num_groups={moe.num_groups} leaves one expert per group, and model.moe.router=sigmoid "
                     f"rates a group by its best two; use at most {moe.num_experts // 2}")  # fmt: skip
    if routing.bias_update_rate > 0 and moe.router != "sigmoid":
        found.append(
            f"model.routing.bias_update_rate={routing.bias_update_rate} moves the bias of model.moe.router=sigmoid, "
            f"and the router is {moe.router}; use 0"
        )
    return found


def _layer_problems(moe: MoEConfig, num_layers: int) -> list[str]:
    outside = [layer for layer in moe.dense_layers or () if not 0 <= layer < num_layers]
    if outside:
        return [f"model.moe.dense_layers={moe.dense_layers} names {outside}; layers are 0 to {num_layers - 1}"]
    if not any(moe.in_layer(layer) for layer in range(num_layers)):
        return [
            f"model.moe leaves none of the {num_layers} layers with experts; lower first_dense={moe.first_dense} or "
            f"every={moe.every}, or use num_experts=0"
        ]
    return []
