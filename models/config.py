"""ModelConfig: the shape of a decoder. One dataclass for every family; a family is a setting of it (configs/model/)."""

from __future__ import annotations

from dataclasses import dataclass, field

NORMS = ("rmsnorm", "layernorm")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
POSITIONS = ("rope", "learned", "alibi", "none")
ROPE_SCALINGS = ("none", "linear", "ntk", "yarn", "llama3")
ACTIVATION_CHECKPOINTS = ("none", "full", "selective", "offload")
ATTENTION_IMPLEMENTATIONS = ("auto", "reference", "sdpa", "flex")


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


@dataclass
class ModelConfig:
    """Shape and options of a decoder. Sizes count elements; `None` sizes are derived in `resolve()`."""

    family: str = "llama"  # a key of models.registry.FAMILIES
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
    sliding_window: int | None = None  # a query sees this many last keys, itself included
    sliding_window_layers: list[int] | None = None  # layers that use the window; None: all
    tie_embeddings: bool = False
    norm_first: bool = True  # pre-norm; False: post-norm (OPT-350m)
    final_norm: bool = True
    dropout: float = 0.0  # of embeddings and of each residual branch
    attention_dropout: float = 0.0  # of attention probabilities (reference attention only)
    init_std: float = 0.02
    attention: str = "auto"  # one of ATTENTION_IMPLEMENTATIONS
    activation_checkpoint: str = "none"  # one of ACTIVATION_CHECKPOINTS
    activation_checkpoint_save: list[str] = field(
        # selective: outputs of these aten ops are kept, all else is recomputed
        default_factory=lambda: [
            "aten.mm",
            "aten.addmm",
            "aten._scaled_dot_product_flash_attention",
            "aten._scaled_dot_product_efficient_attention",
            "aten._scaled_dot_product_cudnn_attention",
            "aten._scaled_dot_product_flash_attention_for_cpu",
        ]
    )
