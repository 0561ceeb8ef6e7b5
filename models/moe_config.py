"""MoEConfig and RoutingConfig: a mixture of experts, and how its router is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from parallel.dims import divisors
from parallel.problem import Problem, multiples, shown, values

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
    moe: MoEConfig, routing: RoutingConfig, *, num_layers: int, dense_size: int, gated: bool, norm_first: bool
) -> list[str]:
    """Every reason why these experts cannot be built; one line each. dense_size: inner features of dense layers."""
    found: list[str] = []
    for name in ("aux_weight", "z_weight", "capacity_factor", "bias_update_rate"):
        field, value = f"model.routing.{name}", getattr(routing, name)
        off = values(field, [0.0])
        if not 0 <= value < math.inf:  # nor NaN, which is not below 0 either
            found.append(Problem(f"{field}={value} must be finite and not negative, and 0 switches it off", off))
        elif value > 0 and moe.num_experts == 0:
            found.append(Problem(f"{field}={value} without experts", off, words="set model.moe.num_experts"))
    if moe.num_experts == 0:
        return found
    wrong = _wrong_numbers(moe, dense_size)
    if moe.router not in ROUTERS:
        wrong.append(Problem(f"model.moe.router={moe.router} is unknown", values("model.moe.router", ROUTERS)))
    for name, right in (("gated_mlp", gated), ("norm_first", norm_first)):
        if not right:
            why = f"model.{name}=false does not work with model.moe.num_experts={moe.num_experts}"
            wrong.append(Problem(why, values(f"model.{name}", [True]), values("model.moe.num_experts", [0])))
    if wrong:
        return found + wrong
    return found + _router_problems(moe, routing) + _layer_problems(moe, num_layers)


def _wrong_numbers(moe: MoEConfig, dense_size: int) -> list[str]:
    minimums = {"num_experts": 0, "top_k": 1, "intermediate_size": 1, "every": 1, "num_groups": 1, "top_groups": 1}
    minimums |= {"num_shared": 0, "first_dense": 0}
    instead: dict[str, list[int]] = {name: [minimum] for name, minimum in minimums.items()}
    # A token's experts compute as much together as a dense layer, or each; or near that what more layouts divide.
    share = dense_size // max(moe.top_k, 1)
    sizes = [share, dense_size, *sorted(multiples(16, share), key=lambda size: abs(size - share))]
    instead["intermediate_size"] = [size for size in sizes if size > 0]
    return [
        Problem(
            f"model.moe.{name}={getattr(moe, name)} must be at least {minimum}",
            values(f"model.moe.{name}", instead[name]),
        )
        for name, minimum in minimums.items()
        if getattr(moe, name) < minimum
    ]


def _router_problems(moe: MoEConfig, routing: RoutingConfig) -> list[str]:
    return [
        *_unlike_router(moe, routing),
        *(_unlike_groups(moe) if moe.num_experts % moe.num_groups == 0 else [_no_equal_groups(moe)]),
    ]


def _unlike_router(moe: MoEConfig, routing: RoutingConfig) -> list[str]:
    """What one router in particular asks for."""
    found: list[str] = []
    router = moe.router
    fixed = {"switch": 1, "gshard": 2}.get(router)
    others = values("model.moe.router", [name for name in ROUTERS if name not in ("switch", "gshard")])
    if fixed is not None and moe.top_k != fixed:
        what = f"model.moe.top_k={moe.top_k} does not fit model.moe.router={router}"
        found.append(Problem(what, values("model.moe.top_k", [fixed]), others))
    if router == "switch" and moe.normalize:
        found.append(
            Problem(
                "model.moe.normalize=true makes the one weight of model.moe.router=switch 1, so that the router cannot "
                "learn",
                values("model.moe.normalize", [False]),
            )
        )
    if router == "gshard" and not moe.normalize:
        found.append(
            Problem(
                "model.moe.normalize=false does not fit model.moe.router=gshard, which draws by the normalised weight",
                values("model.moe.normalize", [True]),
                others,
            )
        )
    if routing.bias_update_rate > 0 and router != "sigmoid":
        found.append(
            Problem(
                f"model.routing.bias_update_rate={routing.bias_update_rate} moves the bias of "
                f"model.moe.router=sigmoid, and the router is {router}",
                values("model.routing.bias_update_rate", [0.0]),
                values("model.moe.router", ["sigmoid"]),
            )
        )
    return found


def _no_equal_groups(moe: MoEConfig) -> Problem:
    what = f"model.moe.num_groups={moe.num_groups} does not divide model.moe.num_experts={moe.num_experts}"
    return Problem(what, values("model.moe.num_groups", divisors(moe.num_experts), near=moe.num_groups))


def _unlike_groups(moe: MoEConfig) -> list[str]:
    """What groups of equal size ask for."""
    size = moe.num_experts // moe.num_groups
    of_groups = range(1, moe.num_groups + 1)
    found: list[str] = []
    if moe.top_groups > moe.num_groups:
        what = f"model.moe.top_groups={moe.top_groups} is above model.moe.num_groups={moe.num_groups}"
        found.append(Problem(what, values("model.moe.top_groups", of_groups, near=moe.top_groups)))
    elif moe.top_k > (room := moe.top_groups * size):
        found.append(
            Problem(
                f"model.moe.top_k={moe.top_k} is above the {room} experts of model.moe.top_groups={moe.top_groups} "
                "groups",
                values("model.moe.top_k", range(1, room + 1), near=moe.top_k),
                values("model.moe.top_groups", (n for n in of_groups if n * size >= moe.top_k), near=moe.top_groups),
            )
        )
    if moe.router == "sigmoid" and moe.top_groups < moe.num_groups and size < 2:
        larger = [n for n in divisors(moe.num_experts) if n < moe.num_experts]
        found.append(
            Problem(
                f"model.moe.num_groups={moe.num_groups} leaves one expert per group, and model.moe.router=sigmoid "
                "rates a group by its best two",
                values("model.moe.num_groups", larger, near=moe.num_groups),
            )
        )
    return found


def _layer_problems(moe: MoEConfig, num_layers: int) -> list[str]:
    outside = [layer for layer in moe.dense_layers or () if not 0 <= layer < num_layers]
    if outside:
        inside = tuple(layer for layer in moe.dense_layers or () if layer not in outside)
        what = f"model.moe.dense_layers={moe.dense_layers} names {outside}; layers are 0 to {num_layers - 1}"
        return [Problem(what, values("model.moe.dense_layers", [inside or None]))]

    def leaves_some(change: dict[str, int | None]) -> bool:
        changed = replace(moe, **change)  # type: ignore[arg-type]
        return any(changed.in_layer(layer) for layer in range(num_layers))

    if leaves_some({}):
        return []
    choices: dict[str, list[int | None]] = {
        "first_dense": [*range(min(moe.first_dense, num_layers))],
        "every": [*range(1, min(moe.every, num_layers + 1))],
        "dense_layers": [None],
    }
    what = f"model.moe.first_dense={moe.first_dense} and model.moe.every={moe.every}"
    what += "" if moe.dense_layers is None else f" and model.moe.dense_layers={shown(moe.dense_layers)}"
    return [
        Problem(
            f"{what} leave none of the {num_layers} layers with experts",
            *(
                values(f"model.moe.{name}", [value for value in reversed(some) if leaves_some({name: value})])
                for name, some in choices.items()
            ),
            values("model.moe.num_experts", [0]),
        )
    ]
