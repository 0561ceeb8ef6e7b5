"""The decoder: what a token may see, what dropout depends on, and what FSDP, compile and meta need of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from kernels.attention.alibi import slopes
from kernels.backend import interpreted
from models.config import ModelConfig
from models.decoder import Decoder
from models.init import initialize
from models.initializers import Constant, Normal
from models.layers.attention import build_context, choose_attention
from models.registry import build_model
from tests.models.on_ranks import sharded_logits_and_grads
from tests.models.small import random_decoder, sample_tokens, tiny
from tests.pool import RankPool

LENGTHS = (7, 1, 11)


def documents_and_positions(rows: int) -> tuple[Tensor, Tensor]:
    """Three documents of LENGTHS in each row."""
    documents = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(LENGTHS)])
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    return documents.expand(rows, -1), positions.expand(rows, -1)


@pytest.mark.parametrize("attention", ["reference", "sdpa"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"sliding_window": 4, "sliding_window_layers": [1]}, {"positions": "learned"}, {"positions": "alibi"}],
    ids=["rope", "windows", "learned", "alibi"],
)
def test_documents_in_a_row_compute_what_each_computes_alone(changes: dict[str, Any], attention: str) -> None:
    """Attention, or positions, that leak from one document into the next; in the logits or in the gradients."""
    model = random_decoder(tiny(attention=attention, **changes))
    tokens = sample_tokens(2)
    documents, positions = documents_and_positions(2)
    packed = model(tokens, positions=positions, documents=documents)
    packed.square().sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    alone = torch.cat([model(piece) for piece in tokens.split(LENGTHS, dim=1)], dim=1)
    alone.square().sum().backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (grads[name] - parameter.grad).abs().max() < 2e-5 * parameter.grad.abs().max().clamp(min=1.0), name
    assert not torch.allclose(model(tokens), alone, rtol=1e-3), "negative control: without documents they do mix"


def test_no_token_sees_a_later_one() -> None:
    """A mask off by one, or a shortcut around it."""
    for attention in ("reference", "sdpa"):
        model = random_decoder(tiny(attention=attention, positions="alibi", sliding_window=6))
        tokens = sample_tokens(1)
        changed = tokens.clone()
        changed[0, 9] = (changed[0, 9] + 1) % 61
        difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
        assert difference[:9].max() == 0
        assert (difference[9:12] > 1e-4).all(), "negative control: the token and those after it do change"


def test_alibi_slopes_are_those_of_bloom() -> None:
    """Slopes of a number of heads that is no power of two. Oracle: Bloom in transformers."""
    for num_heads in (1, 2, 6, 8, 12):
        theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)  # slope * position, [H, 1, 2]
        torch.testing.assert_close(slopes(num_heads, torch.device("cpu")), theirs[:, 0, 1])


def dropout_model(**changes: Any) -> Decoder:
    options = {"dropout": 0.3, "attention_dropout": 0.2, "attention": "reference"}
    return random_decoder(tiny(**options, **changes), seed=11).train()


def test_dropout_of_a_sample_does_not_depend_on_its_batch() -> None:
    """Masks drawn by place in the batch: losses would depend on micro-batch and number of ranks."""
    model = dropout_model()
    tokens, samples = sample_tokens(4), torch.tensor([5, 900_000_000_000, 0, 3])
    whole = model(tokens, samples=samples)
    rows = [model(tokens[i : i + 1], samples=samples[i : i + 1]) for i in (2, 0, 3, 1)]
    torch.testing.assert_close(whole[[2, 0, 3, 1]], torch.cat(rows), rtol=1e-5, atol=1e-5)
    same_tokens = model(tokens[:1].expand(2, -1), samples=torch.tensor([1, 2]))
    assert not torch.allclose(same_tokens[0], same_tokens[1]), "negative control: another sample, another mask"
    assert not torch.allclose(same_tokens[0], model.eval()(tokens[:1])[0])


def test_dropout_keeps_the_expected_share_and_scale_and_differs_by_site_and_seed() -> None:
    """A probability used for keeping, a missing scale, or one mask for all layers."""
    model = dropout_model()
    x, samples = torch.ones(4, 19, 24), torch.arange(4)
    block = model.blocks[0]
    kept = block.mlp_dropout(x, samples)
    assert kept.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    assert abs((kept == 0).float().mean().item() - 0.3) < 0.04
    others = [block.attention_dropout, model.blocks[1].mlp_dropout, model.dropout]
    for other in others:
        assert not torch.equal(kept, other(x, samples))
    assert not torch.equal(kept, build_model(model.config, seed=12).blocks[0].mlp_dropout(x, samples))
    assert torch.equal(kept, build_model(model.config, seed=11).blocks[0].mlp_dropout(x, samples))
    p = block.attention.dropout.on_probabilities(torch.ones(4, 6, 19, 19), samples)
    assert abs((p == 0).float().mean().item() - 0.2) < 0.03
    assert len(p.flatten(0, 1).flatten(1).unique(dim=0)) == 4 * 6, "every head of every sample has its own mask"


def test_a_checkpointed_block_drops_the_same_elements_again() -> None:
    """Recomputation with another mask gives gradients of another function."""
    model = dropout_model()
    x, samples = torch.randn(2, 19, 24, requires_grad=True), torch.tensor([4, 9])
    context = context_of(model, x, samples=samples)
    model.blocks[0](x, context=context).square().sum().backward()
    expected = x.grad
    x.grad = None
    checkpoint(model.blocks[0], x, context=context, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_dropout_without_samples_or_beyond_its_numbers_is_refused() -> None:
    """Silently equal masks for all samples, or for two places of one."""
    with pytest.raises(ValueError, match="needs samples"):
        dropout_model()(sample_tokens())
    with pytest.raises(ValueError, match=r"model\.max_seq_len=10"):
        dropout_model(max_seq_len=10)(sample_tokens(), samples=torch.arange(2))


def context_of(model: Decoder, x: Tensor, **given: Any) -> Any:
    fields: dict[str, Any] = {"positions": None, "documents": None, "samples": None, **given}
    return build_context(model.config, seq_len=x.shape[1], device=x.device, dtype=x.dtype, **fields)


@pytest.mark.some(2)
@pytest.mark.parametrize("attention", ["sdpa", "reference", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_a_block_compiles_without_a_graph_break(attention: str) -> None:
    """Python that the tracer cannot follow, with windows, documents and dropout all on."""
    probabilities = 0.1 if attention == "reference" else 0.0
    config = tiny(
        attention=attention, dropout=0.1, attention_dropout=probabilities, sliding_window=5, sliding_window_layers=[0]
    )
    model = random_decoder(config).train()
    x, samples = torch.randn(2, 19, 24), torch.tensor([4, 9])
    documents, positions = documents_and_positions(2)
    with interpreted():
        context = context_of(model, x, positions=positions, documents=documents, samples=samples)
        for block in model.blocks if attention == "sdpa" else model.blocks[:1]:
            compiled = torch.compile(block, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(x, context=context), block(x, context=context))


@pytest.mark.interpreter
def test_a_compiled_block_takes_a_batch_of_other_shapes() -> None:
    """A check of sizes that raises once dynamo traces the batch as a symbol: a shorter last batch ended such runs."""
    model = random_decoder(tiny(attention="triton", sliding_window=5, sliding_window_layers=[0])).train()
    compiled = torch.compile(model.blocks[0], fullgraph=True, backend="eager")
    with interpreted():
        for rows, packed in ((3, False), (2, False), (2, True), (4, True)):
            x = torch.randn(rows, 19, 24)
            documents, positions = documents_and_positions(rows) if packed else (None, None)
            context = context_of(model, x, positions=positions, documents=documents)
            torch.testing.assert_close(compiled(x, context=context), model.blocks[0](x, context=context))


def test_the_head_that_is_passed_in_gets_hidden_states_and_the_right_weight() -> None:
    """A fused loss that multiplies by the wrong table."""
    for tied in (True, False):
        model = random_decoder(tiny(tie_embeddings=tied))
        names = [name for name, _ in model.named_parameters()]
        assert ("head.weight" in names) is not tied
        weight = model.embedding.weight if tied else model.head.weight
        assert model(sample_tokens(), head=lambda hidden, given: given) is weight
        hidden = model(sample_tokens(), head=lambda hidden, given: hidden)
        torch.testing.assert_close(hidden @ weight.T, model(sample_tokens()))


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_filling_the_parameters_after_to_empty_completes_a_model_built_on_meta(norm: str) -> None:
    """A buffer or table that only the constructor fills: garbage after to_empty, and only there."""
    config = tiny(norm=norm, qk_norm=True, qkv_bias=True, mlp_bias=True, dropout=0.1)
    model = random_decoder(config)
    with torch.device("meta"):
        other = build_model(config)
    assert not list(other.buffers())
    other.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            other.get_parameter(name).copy_(parameter)
    assert torch.equal(model(sample_tokens()), other.eval()(sample_tokens()))


def test_every_parameter_has_an_initializer_and_residual_outputs_are_scaled_down() -> None:
    """A parameter of a new option that nobody initialises, or GPT-2's scale on the wrong matrix."""
    config = tiny(qkv_bias=True, attention_bias=True, mlp_bias=True, qk_norm=True, positions="learned", init_std=0.03)
    model = build_model(config)
    wanted = model.initializers()
    initialize(model.state_dict(), wanted, seed=1)
    assert wanted["blocks.1.attention.o.weight"] == wanted["blocks.0.mlp.down.weight"] == Normal(0.03 / 2)
    assert wanted["embedding.weight"] == wanted["positions.weight"] == wanted["head.weight"] == Normal(0.03)
    assert wanted["blocks.0.attention.q.weight"] == wanted["blocks.0.mlp.gate.weight"] == Normal(0.03)
    assert wanted["blocks.0.attention.k_norm.weight"] == wanted["final_norm.weight"] == Constant(1.0)
    assert wanted["blocks.0.attention.o.bias"] == wanted["blocks.0.mlp.up.bias"] == Constant(0.0)
    logits = model.eval()(sample_tokens())
    assert logits.std() < 1.0, "a fresh model predicts almost evenly"


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_sharded_by_fsdp_block_by_block_computes_the_same(tied: bool, ranks: RankPool) -> None:
    """A context FSDP cannot take apart, or a tied table used where it is not gathered."""
    config = tiny(dropout=0.2, sliding_window=5, sliding_window_layers=[0], tie_embeddings=tied)
    tokens, samples = sample_tokens(), torch.tensor([8, 1])
    model = random_decoder(config).train()
    expected = model(tokens, samples=samples)
    expected.square().sum().backward()
    for logits, grads in ranks.run(2, sharded_logits_and_grads, config, tokens, samples):
        torch.testing.assert_close(logits, expected.detach())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_rope_refuses_tables_that_something_cast_to_bf16() -> None:
    """FSDP's default casts them with the other inputs of a block; positions above 256 then coincide."""
    model = random_decoder(tiny()).bfloat16()
    x = torch.randn(1, 5, 24, dtype=torch.bfloat16)
    context = context_of(model, x)
    assert model.blocks[0](x, context=context).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="cast_forward_inputs=False"):
        model.blocks[0](x, context=context._replace(cos=context.cos.bfloat16()))


def chosen(*arguments: Any, **others: Any) -> str:
    """The name alone."""
    return choose_attention(*arguments, **others).name


def test_what_auto_means_is_said_and_kernels_are_refused_where_they_do_not_run() -> None:
    """A run that reports another kernel than it used."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    plain, windowed = tiny(head_dim=16), tiny(head_dim=16, sliding_window=5)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert chosen(plain, cuda, bf16) == chosen(windowed, cpu, fp32, documents=True) == "sdpa"
    assert chosen(windowed, cuda, bf16) == chosen(plain, cuda, bf16, documents=True) == "triton"
    for kernel in ("flex", "triton"):
        assert chosen(replace(plain, attention=kernel), cuda, bf16) == kernel
    assert chosen(plain, cuda, torch.float64) == "reference"
    assert chosen(replace(windowed, attention="reference"), cuda, bf16) == "reference"
    sinks = tiny(head_dim=16, attention_sinks=True)
    assert [chosen(sinks, device, bf16) for device in (cpu, cuda)] == ["reference", "triton"]
    assert chosen(sinks, cpu, fp32, cp_method="ulysses") == "reference"
    for method in ("ring", "allgather"):
        for device, expected in ((cpu, "reference"), (cuda, "triton")):
            assert chosen(plain, device, bf16, cp_method=method) == expected
        assert chosen(replace(plain, attention="triton"), cuda, bf16, cp_method=method) == "triton"
        with pytest.raises(ValueError, match=r"model\.attention=triton does not run on cpu"):
            chosen(replace(plain, attention="triton"), cpu, fp32, cp_method=method)
    assert chosen(plain, cuda, bf16, cp_method="ulysses") == "sdpa"
    assert chosen(windowed, cuda, bf16, cp_method="ulysses") == "triton"
    with pytest.raises(ValueError, match=r"runs on triton or reference with model\.attention_sinks=true"):
        chosen(replace(sinks, attention="sdpa"), cpu, fp32, cp_method="ulysses")
    for kernel in ("flex", "triton"):
        with pytest.raises(ValueError, match=rf"model\.attention={kernel} does not run on cpu"):
            random_decoder(replace(plain, attention=kernel))(sample_tokens())


def test_what_auto_chose_is_said_with_its_reason() -> None:
    """A mask or heads for which another kernel runs than a reader of run.json expects."""
    cpu, cuda, bf16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16

    def said(config: ModelConfig, device: torch.device = cuda, **others: Any) -> str:
        return str(choose_attention(config, device, bf16, **others))

    assert said(tiny(attention="triton")) == "triton"
    assert said(tiny(head_dim=16)) == "sdpa (auto: plain causal attention, cuDNN's where it can)"
    assert said(tiny(head_dim=16), device=cpu) == "sdpa (auto: on cpu)"
    masked = tiny(head_dim=16, sliding_window=5)
    why = "auto: documents, a sliding window, for which cuDNN has no kernel"
    assert said(masked, documents=True) == f"triton ({why})"
    large = "triton has no kernel for heads of 320 features, more than 256"
    assert said(replace(masked, head_dim=320), documents=True) == f"flex ({why}; {large})"
    split = tiny(head_dim=320)
    assert said(split, cp_method="ring") == (
        f"reference (auto: keys of other ranks, for which cuDNN has no kernel; {large}; "
        "flex does not run under parallel.cp_method=ring; sdpa does not run under parallel.cp_method=ring)"
    )


@pytest.mark.some(1)
@pytest.mark.interpreter
@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 3, "sliding_window_layers": [0]},
        {"attention_sinks": True},
        {"positions": "alibi"},
    ],
    ids=str,
)
def test_a_decoder_on_the_triton_kernels_is_the_one_on_the_reference(changes: dict[str, Any]) -> None:
    """Masks of another layer, slopes or sinks that do not arrive: in Triton's interpreter."""
    tokens = sample_tokens()
    documents = (torch.arange(tokens.shape[1]) * 2 // tokens.shape[1]).expand(tokens.shape).int()
    results = []
    for attention in ("reference", "triton"):
        model = random_decoder(tiny(attention=attention, **changes))
        with interpreted():
            logits = model(tokens, documents=documents)
            (logits * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_attention_that_only_a_slow_kernel_could_do_is_not_chosen_silently() -> None:
    """torch falls back to the kernel that stores all scores; flex fails in the depths of the compiler."""
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    small = tiny(head_dim=8, sliding_window=4)  # heads of 8
    odd = tiny(head_dim=6)  # heads of 6
    assert chosen(small, cuda, bf16) == "triton"
    assert chosen(small, cuda, torch.float64) == "reference"
    assert chosen(odd, cuda, bf16) == "reference"
    with pytest.raises(ValueError, match=r"model\.attention=flex has no kernel for heads of 8 features"):
        chosen(replace(small, attention="flex"), cuda, bf16)
    with pytest.raises(ValueError, match=r"model\.attention=sdpa has no CUDA kernel for heads of 6 features"):
        chosen(replace(odd, attention="sdpa"), cuda, bf16)


def test_a_sequence_beyond_the_learned_positions_is_refused() -> None:
    """An index error from a device, far from its cause."""
    with pytest.raises(ValueError, match=r"model\.max_seq_len=10"):
        random_decoder(tiny(positions="learned", max_seq_len=10))(sample_tokens())
