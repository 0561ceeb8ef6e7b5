"""What the routers of a mixture of experts did in a step: metrics, and the balancing bias, from global counts."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from models.config import ModelConfig
from models.decoder import Decoder, MoEBlock
from models.layers.router import REPORT

LEFT_OVER = "moe_left_over"
"""The metric of choices that found no room: above 0, the step's update was not made and the run must stop."""


class RoutingMonitor:
    """Adds the reports of all routers up over micro-batches and ranks, once per step.

    With a pipeline a rank has the routers of its own stages. It moves their biases, and the metrics of all ranks are
    those of the whole model.
    """

    def __init__(
        self,
        model: Decoder,
        config: ModelConfig,
        *,
        num_sequences: int | None,
        group: dist.ProcessGroup,
        stages: dist.ProcessGroup | None,
        buffered: bool,
        device: torch.device,
    ) -> None:
        """config: resolved. num_sequences: of a global batch; None: not known, and there are no
        auxiliary losses. group: ranks with different tokens of the global batch.
        stages: ranks with the model's other layers; None: all of them are here. buffered: whether choices may find no
        room on their way to another rank (parallel.ep_buffer).
        """
        sparse = [layer for layer in range(config.num_blocks) if config.moe.in_layer(layer)]
        found = {layer: block for layer, block in model.blocks.named_children() if isinstance(block, MoEBlock)}
        self.blocks = {sparse.index(int(layer)): block for layer, block in found.items()}  # by row of the reports
        self.num_rows = len(sparse)
        self.config, self.num_sequences, self.group, self.stages = config, num_sequences, group, stages
        self.buffered, self.device = buffered, device

    def aux_scale(self, loss_scale: Tensor) -> Tensor | None:
        """Gradient of the scaled training loss by the auxiliary losses of a sequence: their mean is part of it. 0-d."""
        return None if self.num_sequences is None else loss_scale / self.num_sequences

    @torch.no_grad()
    def collect(self) -> Tensor:
        """After the last backward: the reports of the step, fp64 [layers with experts, E + len(REPORT)], of all ranks.

        Collective over both groups.
        """
        shape = (self.num_rows, self.config.moe.num_experts + len(REPORT))
        found = {row: block.routing for row, block in self.blocks.items() if block.routing is not None}
        assert len(found) == len(self.blocks), "a step without a forward pass"
        report_LR = torch.zeros(shape, dtype=torch.float64, device=self.device)  # 0: layers of other stages
        for row, report in found.items():
            report_LR[row] = report
            self.blocks[row].routing = None
        dist.all_reduce(report_LR, group=self.group)
        if self.stages is not None:
            dist.all_reduce(report_LR, group=self.stages)
        return report_LR

    def all_computed(self, report_LR: Tensor) -> Tensor:
        """0-d bool: no choice was left over for want of room. Else this step's gradients are not to be used."""
        return report_LR[:, self.config.moe.num_experts + REPORT.index("left_over")].sum() == 0

    @torch.no_grad()
    def finish(self, report_LR: Tensor, skipped: Tensor) -> dict[str, Tensor]:
        """After the update: move the biases, unless it was skipped; metrics by name, 0-d. report_LR: of `collect`."""
        num_experts = self.config.moe.num_experts
        load_LE = report_LR[:, :num_experts]
        rate = self.config.routing.bias_update_rate
        if rate > 0:
            for row, block in self.blocks.items():
                load_E, bias = load_LE[row], cast(Tensor, block.mlp.router.bias)
                bias += (rate * torch.sign(load_E.mean() - load_E) * (1.0 - skipped)).to(bias.dtype)
        return self._metrics(load_LE, dict(zip(REPORT, report_LR[:, num_experts:].unbind(1), strict=True)))

    def _metrics(self, load_LE: Tensor, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fields of metrics.jsonl (docs/METRICS.md). sums: of each layer, by the names of REPORT."""
        share_LE = load_LE / load_LE.mean(1, keepdim=True)
        tokens_L = sums["choices"] / self.config.moe.top_k
        losses: dict[str, Tensor] = {}
        if self.num_sequences is not None:
            losses = {f"moe_{name}": sums[name].sum() / self.num_sequences for name in ("aux_loss", "z_loss")}
        found = losses | {
            "moe_drop_rate": sums["dropped"].sum() / sums["choices"].sum(),
            "moe_router_entropy": (sums["entropy"] / tokens_L).mean(),
            "moe_load_max": share_LE.max(),
            "moe_load_min": share_LE.min(),
        }
        if self.buffered:
            found[LEFT_OVER] = sums["left_over"].sum()
        return found | {f"moe_load_{e}": share_LE[:, e].mean() for e in range(share_LE.shape[1])}
