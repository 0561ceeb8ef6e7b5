"""ModelConfig: the shape of a decoder, and what can be wrong with it.

One dataclass for every family; a family is a setting of it (configs/model/).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from models.mla_config import MLAConfig, mla_problems
from models.moe_config import MoEConfig, RoutingConfig, moe_problems
from models.mtp_config import MTPConfig, mtp_problems
from models.speculator_config import SpeculatorConfig, speculator_problems
from parallel.problem import Advice, Problem, values

FAMILY_NAMES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "opt",
    "mixtral",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
)
NORMS = ("rmsnorm", "layernorm")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
POSITIONS = ("rope", "learned", "alibi", "none")
ROPE_SCALINGS = {  # and the fields of RopeConfig that each reads, besides theta
    "none": (),
    "linear": ("factor",),
    "ntk": ("factor", "original_max_seq_len"),
    "yarn": (
        "factor",
        "original_max_seq_len",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor"),
}
ACTIVATION_CHECKPOINTS = ("none", "full", "selective", "offload", "budget")
WITHOUT_BUDGET = Advice(
    tuple(
        {"model.activation_checkpoint": mode, "model.activation_memory_gib": None}
        for mode in ACTIVATION_CHECKPOINTS
        if mode != "budget"
    )
)
"""What to use where model.activation_checkpoint=budget cannot be."""
ATTENTION_IMPLEMENTATIONS = ("auto", "reference", "sdpa", "flex", "triton")


@dataclass
class RopeConfig:
    """Rotary position embedding (Su et al., 2104.09864) and how it is stretched beyond the trained length."""

    theta: float = 10000.0
    scaling: str = "none"  # one of ROPE_SCALINGS
    factor: float = 1.0  # how many times longer than original_max_seq_len
    original_max_seq_len: int = 8192  # length the frequencies were trained for
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn (DeepSeek)
    mscale_all_dim: float | None = None  # yarn (DeepSeek)
    truncate: bool = True  # yarn: round the correction range to whole dimensions

    def resolve(self) -> RopeConfig:
        """The same rope with the fields that its scaling does not read at their defaults."""
        read = {name: getattr(self, name) for name in ROPE_SCALINGS[self.scaling]}
        return RopeConfig(theta=self.theta, scaling=self.scaling, **read)


@dataclass
class ModelConfig:
    """Shape and options of a decoder. Sizes count elements; `None` sizes are derived in `resolve()`."""

    family: str = "llama"  # one of FAMILY_NAMES, or hf: the one the folder in `path` belongs to
    path: str | None = None  # Hugging Face folder: shape and weights come from there (model=hf)
    vocab_size: int = 32000
    hidden_size: int = 256
    intermediate_size: int = 688
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None  # None: num_heads (MHA); 1: MQA
    head_dim: int | None = None  # None: hidden_size / num_heads
    max_seq_len: int = 2048
    norm: str = "rmsnorm"  # one of NORMS
    norm_eps: float = 1e-5
    activation: str = "silu"  # one of ACTIVATIONS
    gated_mlp: bool = True  # act(gate(x)) * up(x) against act(up(x))
    positions: str = "rope"  # one of POSITIONS
    rope: RopeConfig = field(default_factory=RopeConfig)
    qkv_bias: bool = False
    attention_bias: bool = False  # bias of the attention output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over head_dim of queries and keys (Qwen3)
    attention_sinks: bool = False  # a learned logit per head in every softmax, without a value (gpt-oss)
    sliding_window: int | None = None  # a query sees this many last keys, itself included
    sliding_window_layers: list[int] | None = None  # layers that use the window; None: all
    mla: MLAConfig = field(default_factory=MLAConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    tie_embeddings: bool = False
    score: bool = False  # a reward model: one number of each token in place of logits, from a head of its own
    norm_first: bool = True  # pre-norm; False: post-norm (OPT-350m)
    final_norm: bool = True
    dropout: float = 0.0  # of embeddings and of the output of each residual branch, in training
    attention_dropout: float = 0.0  # of attention probabilities (reference attention only)
    init_std: float = 0.02
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    attention: str = "auto"  # one of ATTENTION_IMPLEMENTATIONS
    fused_projections: bool = True  # q, k and v as one product, gate and up as one; false: as several, to compare
    speculator: SpeculatorConfig = field(default_factory=SpeculatorConfig)
    activation_checkpoint: str = "none"  # one of ACTIVATION_CHECKPOINTS
    activation_memory_gib: float | None = None  # budget: of what all blocks of a GPU keep of one micro-batch
    activation_checkpoint_save: list[str] = field(
        # selective: outputs of these ops are kept (aten.mm#2: of its third call alone), all else is recomputed
        default_factory=lambda: [
            "aten.mm",
            "aten.addmm",
            "aten._scaled_dot_product_flash_attention",
            "aten._scaled_dot_product_efficient_attention",
            "aten._scaled_dot_product_cudnn_attention",
            "aten._scaled_dot_product_flash_attention_for_cpu",
            "lattice.attention",
        ]
    )

    def resolve(self) -> ModelConfig:
        """The same model with every derived size filled in (num_kv_heads, head_dim) and one way to say each thing.

        Call it on a config without `problems` (`check` raises them). A folder in `path` is read by
        models.registry.resolve_model.
        """
        window, layers = self.sliding_window, self.sliding_window_layers
        if layers is not None:
            layers = sorted(set(layers))
            window = window if layers else None
            if len(layers) in (0, self.num_layers):
                layers = None
        return replace(
            self,
            num_kv_heads=self.num_heads if self.num_kv_heads is None else self.num_kv_heads,
            head_dim=self._score_dim() if self.head_dim is None else self.head_dim,
            rope=self.rope.resolve() if self.positions == "rope" else RopeConfig(),
            mla=self.mla if self.mla.kv_rank else MLAConfig(),
            moe=self.moe.resolve(self.num_layers),
            tie_embeddings=self.tie_embeddings and not self.score,
            mtp=self.mtp if self.mtp.depth else MTPConfig(),
            sliding_window=window,
            sliding_window_layers=layers,
        )

    def _score_dim(self) -> int:
        """Features of a head's query and key."""
        return self.mla.nope_dim + self.mla.rope_dim if self.mla.kv_rank else self.hidden_size // self.num_heads

    @property
    def rotary_dim(self) -> int | None:
        """Features of a head that rope turns (None before `resolve`)."""
        return self.mla.rope_dim if self.mla.kv_rank else self.head_dim

    @property
    def value_dim(self) -> int | None:
        """Features of a head's value (None before `resolve`)."""
        return self.mla.value_dim if self.mla.kv_rank else self.head_dim

    @property
    def num_blocks(self) -> int:
        """Layers, and behind them the blocks of multi-token prediction, which are numbered on."""
        return self.num_layers + self.mtp.depth

    @property
    def num_outputs(self) -> int:
        """Of the head, for each token."""
        return 1 if self.score else self.vocab_size

    @property
    def embeds_last(self) -> bool:
        """Whether the end of the model needs the embedding table too: as its head, or to embed later tokens."""
        return self.tie_embeddings or self.mtp.depth > 0

    def window_of(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens; None: it attends to the whole sequence."""
        in_window = self.sliding_window_layers is None or layer in self.sliding_window_layers
        return self.sliding_window if in_window else None


def problems(config: ModelConfig, seq_len: int | None = None) -> list[str]:
    """Every reason why `config` cannot be built, or trained on sequences of `seq_len` tokens; one line each.

    With family=hf the shape is still in the folder, so only the run-time fields are checked: ask again about what
    models.registry.resolve_model returns.
    """
    found = _run_time_problems(config) + speculator_problems(config.speculator, seq_len=seq_len)
    if config.family == "hf":
        if config.path is None:
            found.append("model.path is missing; model=hf needs model.path=DIR, a Hugging Face folder")
        return found
    sizes = _size_problems(config)
    found += sizes
    found += _choice("family", config.family, (*FAMILY_NAMES, "hf"))
    found += _choice("norm", config.norm, NORMS)
    found += _choice("activation", config.activation, ACTIVATIONS)
    found += _choice("positions", config.positions, POSITIONS)
    if not sizes:  # the rest divides by them
        found += _head_problems(config) if config.mla.kv_rank == 0 else []
        found += mla_problems(
            config.mla,
            positions=config.positions,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            plain=not (config.qkv_bias or config.qk_norm),
        )
        found += _window_problems(config)
    if config.positions == "rope":
        found += _rope_problems(config.rope)
    found += moe_problems(
        config.moe,
        config.routing,
        num_layers=config.num_layers,
        dense_size=config.intermediate_size,
        gated=config.gated_mlp,
        norm_first=config.norm_first,
    )
    found += mtp_problems(config.mtp, seq_len=seq_len)
    if seq_len is not None:
        found += _length_problems(config, seq_len)
    return found


def check(config: ModelConfig) -> None:
    """Raise one ValueError with all `problems`."""
    found = problems(config)
    if found:
        raise ValueError("; ".join(found))


def _choice(name: str, value: str, allowed: Collection[str]) -> list[str]:
    return [] if value in allowed else [Problem(f"model.{name}={value} is unknown", values(f"model.{name}", allowed))]


def _run_time_problems(config: ModelConfig) -> list[str]:
    found = _choice("attention", config.attention, ATTENTION_IMPLEMENTATIONS)
    found += _choice("activation_checkpoint", config.activation_checkpoint, ACTIVATION_CHECKPOINTS)
    found += _budget_problems(config)
    for name in ("dropout", "attention_dropout"):
        value = getattr(config, name)
        if not 0.0 <= value < 1.0:
            found.append(f"model.{name}={value} is not a probability below 1; use 0 <= {name} < 1")
    if config.attention_dropout > 0 and config.attention != "reference":
        found.append(
            f"model.attention_dropout={config.attention_dropout} does not work with model.attention="
            f"{config.attention}, which never forms the probabilities; use attention=reference or attention_dropout=0"
        )
    if config.attention_sinks and config.attention == "sdpa":
        found.append(
            "model.attention_sinks=true does not work with model.attention=sdpa, which does not return the log-sum-exp "
            "that sinks need; use attention=auto, reference or (on CUDA) triton or flex"
        )
    return found


def _budget_problems(config: ModelConfig) -> list[str]:
    budget, mode = config.activation_memory_gib, config.activation_checkpoint
    if mode != "budget":
        unused = f"model.activation_memory_gib={budget} has no effect with model.activation_checkpoint={mode}"
        return [] if budget is None else [f"{unused}; use activation_checkpoint=budget, or leave it out"]
    if budget is None or not 0 < budget < math.inf:
        return [
            f"model.activation_memory_gib={'null' if budget is None else budget} must be positive: "
            "model.activation_checkpoint=budget needs the GiB that all blocks of a GPU may keep of a micro-batch"
        ]
    found: list[str] = []
    if config.moe.num_experts:
        found.append(
            Problem(
                f"model.activation_checkpoint=budget does not work with model.moe.num_experts={config.moe.num_experts}"
                ": what experts keep depends on the routing",
                WITHOUT_BUDGET,
            )
        )
    if config.attention == "flex":
        found.append(
            Problem(
                "model.activation_checkpoint=budget cannot measure model.attention=flex, which is no single operation",
                values("model.attention", ["auto", "triton", "sdpa"]),
                WITHOUT_BUDGET,
            )
        )
    return found


def _size_problems(config: ModelConfig) -> list[str]:
    found = []
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "max_seq_len"):
        if getattr(config, name) < 1:
            found.append(f"model.{name}={getattr(config, name)} must be at least 1")
    for name in ("num_kv_heads", "head_dim", "sliding_window"):
        value = getattr(config, name)
        if value is not None and value < 1:
            found.append(f"model.{name}={value} must be at least 1, or null")
    for name in ("norm_eps", "init_std"):
        if getattr(config, name) <= 0:
            found.append(f"model.{name}={getattr(config, name)} must be positive")
    return found


def _head_problems(config: ModelConfig) -> list[str]:
    head_dim = config.head_dim
    if head_dim is None:
        if config.hidden_size % config.num_heads:
            fitting = [n for n in range(1, config.hidden_size + 1) if config.hidden_size % n == 0]
            return [
                Problem(
                    f"model.num_heads={config.num_heads} does not divide model.hidden_size={config.hidden_size}",
                    values("model.num_heads", fitting, near=config.num_heads),
                    words="set model.head_dim",
                )
            ]
        head_dim = config.hidden_size // config.num_heads
    found: list[str] = []
    if config.positions == "rope" and head_dim % 2:
        found.append(
            Problem(
                f"model.head_dim={head_dim} is odd, and model.positions=rope turns pairs of dimensions",
                values("model.head_dim", [head_dim - 1, head_dim + 1][head_dim == 1 :]),
            )
        )
    if config.positions == "rope" and config.rope.scaling == "ntk" and head_dim == 2:
        found.append("model.head_dim=2 leaves model.rope.scaling=ntk no second frequency to stretch; use 4 or more")
    if config.num_kv_heads is not None and config.num_heads % config.num_kv_heads:
        legal = [d for d in range(1, config.num_heads + 1) if config.num_heads % d == 0]
        found.append(
            Problem(
                f"model.num_kv_heads={config.num_kv_heads} does not divide model.num_heads={config.num_heads}",
                values("model.num_kv_heads", legal, near=config.num_kv_heads),
            )
        )
    return found


def _window_problems(config: ModelConfig) -> list[str]:
    layers = config.sliding_window_layers
    if layers is None:
        return []
    if config.sliding_window is None and layers:
        return [f"model.sliding_window_layers={layers} without model.sliding_window; set the window or drop the layers"]
    outside = [layer for layer in layers if not 0 <= layer < config.num_layers]
    if outside:
        return [f"model.sliding_window_layers={layers} names {outside}; layers are 0 to {config.num_layers - 1}"]
    return []


def _rope_problems(rope: RopeConfig) -> list[str]:
    found = _choice("rope.scaling", rope.scaling, ROPE_SCALINGS)
    if rope.theta <= 1:
        found.append(f"model.rope.theta={rope.theta} must be above 1; 10000 is usual")
    if rope.original_max_seq_len < 1:
        found.append(f"model.rope.original_max_seq_len={rope.original_max_seq_len} must be at least 1")
    if rope.scaling == "none" and rope.factor != 1:
        found.append(f"model.rope.factor={rope.factor} has no effect with model.rope.scaling=none; choose a scaling")
    if rope.factor < 1:
        found.append(f"model.rope.factor={rope.factor} must be at least 1: scaling lengthens the context")
    if rope.scaling == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        found.append(
            f"model.rope.high_freq_factor={rope.high_freq_factor} must be above "
            f"model.rope.low_freq_factor={rope.low_freq_factor}; Llama 3 has 4 and 1"
        )
    if rope.scaling == "yarn" and rope.beta_fast < rope.beta_slow:
        found.append(
            f"model.rope.beta_fast={rope.beta_fast} must not be below model.rope.beta_slow={rope.beta_slow}; "
            "the paper has 32 and 1"
        )
    return found


def _length_problems(config: ModelConfig, seq_len: int) -> list[str]:
    if seq_len <= config.max_seq_len:
        return []
    too_long = f"train.seq_len={seq_len} is above model.max_seq_len={config.max_seq_len}"
    shorter = values("train.seq_len", [config.max_seq_len])
    longer = values("model.max_seq_len", [seq_len])
    if config.positions == "learned":
        return [Problem(f"{too_long}, the rows of the learned position table", shorter, longer)]
    if config.dropout > 0 or config.attention_dropout > 0:
        return [Problem(f"{too_long}, which numbers the dropout draws", shorter, longer, words="switch dropout off")]
    if config.moe.num_experts and config.moe.router == "gshard":
        other = values("model.moe.router", ["softmax"])
        return [Problem(f"{too_long}, which numbers the draws of model.moe.router=gshard", shorter, longer, other)]
    return []
