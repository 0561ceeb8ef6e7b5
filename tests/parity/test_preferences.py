"""recipe=dpo and recipe=reward: pairs, whatever the packing, the micro-batches and the layout; and TRL's losses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from data.config import parts
from data.preference import open_pairs
from data.tokenizer import load_tokenizer
from launch.open_model import LabModelConfig, open_model
from models.adapter_config import AdapterConfig
from models.config import ModelConfig
from models.init import initialize
from models.initializers import Normal
from parallel.groups import NO_GROUPS
from tests.data.preferring import pairs, preference_config
from tests.parity.harness import (
    Outcome,
    changed,
    gradient_deviation,
    loss_deviation,
    norm_deviation,
    run_on,
    tiny_config,
)
from tests.pool import RankError, RankPool
from trainer.config import ConfigError, RecipeConfig, TrainConfig
from trainer.convert import export_checkpoint
from trainer.pairs import Pairs
from trainer.trainer import Trainer
from trainer.validate import finalize, find_problems

SEQ_LEN = 192
ROWS = pairs()


def tiny_llama(folder: Path, seed: int) -> Path:
    """Weights of a model of 300 words in a folder."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=SEQ_LEN,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the weights of a policy and of another model, its reference."""
    path = tmp_path_factory.mktemp("preferences")
    tiny_llama(path / "policy", 0)
    tiny_llama(path / "reference", 1)
    return path


def preferring(
    base: Path, name: str, *, packing: bool = True, recipe: dict[str, Any] | None = None, **changes: Any
) -> TrainConfig:
    """A run over all pairs in every step; its folder is base / name."""
    data = preference_config(base / name, ROWS, packing=packing, too_long="error")
    samples = 3 if packing else len(ROWS)
    sizes = {
        "train__seq_len": SEQ_LEN,
        "train__global_batch_size": samples,
        "train__micro_batch_size": samples,
        "train__steps": 3,
        "schedule__warmup_steps": 0,
    }
    config = tiny_config(base / name / "run", data, **(sizes | changes))
    config.model = ModelConfig(family="hf", path=str(base / "policy"))
    settings = {"name": "dpo", "reference_path": str(base / "reference")}
    config.recipe = RecipeConfig(**(settings | (recipe or {})))
    return config


@pytest.fixture(scope="module")
def reference(ranks: RankPool, folder: Path) -> Outcome:
    """One process, one micro-batch, packed."""
    return run_on(ranks, 1, preferring(folder, "one"))


REPORTED = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "logp_chosen", "nll")


def same(found: Outcome, wanted: Outcome, names: tuple[str, ...] = REPORTED) -> None:
    assert loss_deviation(found, wanted) < 1e-6
    assert gradient_deviation(found, wanted) < 1e-5
    assert norm_deviation(found, wanted) < 1e-4
    for name in names:
        ours, theirs = ([line[name] for line in outcome.metrics] for outcome in (found, wanted))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(("packing", "micro"), [(False, 1), (False, 4), (True, 1), (True, 2)])
def test_packing_and_micro_batches_change_nothing(
    ranks: RankPool, folder: Path, reference: Outcome, packing: bool, micro: int
) -> None:
    """Weights of pairs that depend on what stands beside them; half a pair in a micro-batch."""
    config = preferring(folder, f"{packing}-{micro}", packing=packing, train__micro_batch_size=micro)
    same(run_on(ranks, 1, config), reference)


LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"parallel__zero_stage": 0},
    "zero3": {"parallel__zero_stage": 3},
    "tp": {"parallel__tp": 2, "parallel__sequence_parallel": True},
    "ring": {"parallel__cp": 2},
    "ulysses": {"parallel__cp": 2, "parallel__cp_method": "ulysses"},
    "pp": {"parallel__pp": 2, "train__micro_batch_size": 2},
    "zero_bubble": {"parallel__pp": 2, "parallel__pp_schedule": "zero_bubble", "train__micro_batch_size": 1},
}


@pytest.mark.some(3)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_two_ranks_train_as_one(ranks: RankPool, folder: Path, reference: Outcome, layout: str) -> None:
    """A pair counted by each rank that has some of its tokens, or by none; a reference of some words only."""
    changes = LAYOUTS[layout]
    if layout in ("ddp", "zero3"):  # three samples are not for two ranks: each pair alone, and one more
        changes = changes | {"train__global_batch_size": len(ROWS) - 1}
        config = preferring(folder, f"{layout}-alone", packing=False, **changes)
        alone = run_on(ranks, 1, changed(config, folder / f"{layout}-alone" / "single"))
        same(run_on(ranks, 2, config), alone)
        return
    config = preferring(folder, layout)
    same(run_on(ranks, 2, changed(config, folder / layout / "run", **changes)), reference)


@pytest.mark.thorough
def test_four_ranks_of_mixed_axes_train_as_one(ranks: RankPool, folder: Path, reference: Outcome) -> None:
    """Sums over the wrong group where two axes meet."""
    for name, axes in (("tp-pp", ("tp", "pp")), ("tp-cp", ("tp", "cp")), ("pp-cp", ("pp", "cp"))):
        changes: dict[str, Any] = {f"parallel__{axis}": 2 for axis in axes}
        same(run_on(ranks, 4, preferring(folder, name, train__micro_batch_size=2, **changes)), reference)


@pytest.mark.parametrize("settings", [{"loss": "orpo", "beta": 0.5}, {"loss": "simpo", "beta": 2.0, "gamma": 0.3}])
def test_losses_without_a_reference_depend_on_no_split(ranks: RankPool, folder: Path, settings: dict[str, Any]) -> None:
    """A mean over the tokens that one rank has of an answer; a likelihood divided by pairs."""
    recipe, name = {"reference_path": None, **settings}, settings["loss"]
    wanted = run_on(ranks, 1, preferring(folder, name, recipe=recipe))
    same(run_on(ranks, 1, preferring(folder, f"{name}-alone", packing=False, recipe=recipe)), wanted)
    config = preferring(folder, f"{name}-ring", recipe=recipe, train__micro_batch_size=1)
    same(run_on(ranks, 2, changed(config, folder / f"{name}-ring" / "run", parallel__cp=2)), wanted)


def test_a_pair_counted_twice_would_be_seen(ranks: RankPool, folder: Path, reference: Outcome) -> None:
    """The negative control: another number of pairs is far outside of the tolerances."""
    other = run_on(ranks, 1, preferring(folder, "eight", packing=False, train__global_batch_size=len(ROWS) - 1))
    assert loss_deviation(other, reference) > 1e-3
    assert gradient_deviation(other, reference) > 1e-3


def their_losses(folder: Path, config: TrainConfig, kinds: dict[str, Any]) -> dict[str, tuple[float, dict[str, Any]]]:
    """TRL's loss and its gradients by name, of each kind: loss_type and more of its settings."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    tokens = Path(str(config.data.tokenizer.path))
    file = tokens / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokens, pad_token="<|endoftext|>")
    policy, frozen = (transformers.AutoModelForCausalLM.from_pretrained(folder / n) for n in ("policy", "reference"))
    rows = []  # of one kind: a data set has one type per column
    for row in ROWS:
        if isinstance(row["chosen"], str):
            rows.append(row)
            continue
        asked = row["prompt"] if "prompt" in row else row["chosen"][:1]
        before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        answers = [
            tokenizer.apply_chat_template([*asked, row[name][-1]], tokenize=False)[len(before) :]
            for name in ("chosen", "rejected")
        ]
        rows.append({"prompt": before, "chosen": answers[0], "rejected": answers[1]})
    args = trl.DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        per_device_train_batch_size=len(rows),
        report_to=[],
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        disable_dropout=True,
    )
    data = datasets.Dataset.from_list(rows)
    theirs = trl.DPOTrainer(policy, frozen, args=args, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(theirs.get_train_dataloader()))
    found = {}
    for name, settings in kinds.items():
        theirs.loss_types, theirs.label_smoothing = [settings["loss"]], settings.get("label_smoothing", 0.0)
        policy.zero_grad()
        loss = theirs.compute_loss(policy, dict(batch))
        loss.backward()
        found[name] = loss.item(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    return found


# Not sigmoid with label smoothing (cDPO): TRL's DPO reads none there. tests/trainer/test_preference_losses.py has it.
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": "sigmoid"},
    "robust": {"loss": "robust", "label_smoothing": 0.2},
    "ipo": {"loss": "ipo"},
    "hinge": {"loss": "hinge"},
}


def test_losses_and_gradients_are_those_of_trl(ranks: RankPool, folder: Path) -> None:
    """Another definition under the same name; a token more or less in an answer."""
    config = preferring(folder, "trl", train__steps=1)
    # TRL ends a text with eos, which a rendered conversation does not have: compare what the texts alone are.
    rows = [row for row in ROWS if isinstance(row["chosen"], str)]
    data = preference_config(folder / "trl", rows, too_long="error")
    config.data = data
    config.train.global_batch_size = config.train.micro_batch_size = 1
    ROWS[:], kept = rows, list(ROWS)
    try:
        theirs = their_losses(folder, config, KINDS)
    finally:
        ROWS[:] = kept
    for name, settings in KINDS.items():
        config.recipe = RecipeConfig(name="dpo", reference_path=str(folder / "reference"), **settings)
        ours = run_on(ranks, 1, changed(config, folder / "trl" / name))
        loss, gradients = theirs[name]
        assert ours.losses[0] == pytest.approx(loss, rel=1e-5), name
        for mine, hf in (
            ("embedding.weight", "model.embed_tokens.weight"),
            ("head.weight", "lm_head.weight"),
            ("blocks.0.mlp.down.weight", "model.layers.0.mlp.down_proj.weight"),
            ("blocks.1.attention.o.weight", "model.layers.1.self_attn.o_proj.weight"),
        ):
            wanted = gradients[hf]
            deviation = (ours.first_gradients[mine] - wanted).abs().max() / wanted.abs().max()
            assert deviation < 2e-5, (name, mine)


def test_the_likelihood_of_chosen_answers_is_weighed_by_token(ranks: RankPool, folder: Path) -> None:
    """A mean over pairs, or the tokens of prompts and of rejected answers: against transformers' own."""
    rows = [row for row in ROWS if isinstance(row["chosen"], str)]
    found = []
    for weight in (0.0, 0.7):
        config = preferring(folder, f"nll-{weight}", recipe={"nll_weight": weight}, train__steps=1)
        config.data = preference_config(folder / f"nll-{weight}", rows, too_long="error")
        config.train.global_batch_size = config.train.micro_batch_size = 1
        found.append(run_on(ranks, 1, config))
    tokenizer = load_tokenizer(config.data)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "policy")
    total, count = torch.zeros(()), 0
    for row in rows:
        asked = len(tokenizer.encode(row["prompt"]))
        ids = torch.tensor([*tokenizer.encode(row["prompt"] + row["chosen"]), tokenizer.eos_id])
        logits = model(ids[None]).logits[0, asked - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[asked:], reduction="sum")
        count += len(ids) - asked
    (total / count).backward()
    assert found[1].losses == found[0].losses  # which do not contain it
    assert found[1].metrics[0]["nll"] == pytest.approx(total.item() / count, rel=1e-5)
    for ours, theirs in (
        ("head.weight", model.lm_head.weight),
        ("blocks.0.attention.o.weight", model.model.layers[0].self_attn.o_proj.weight),
    ):
        of_weight = found[1].first_gradients[ours] - found[0].first_gradients[ours]
        deviation = (of_weight - 0.7 * theirs.grad).abs().max() / theirs.grad.abs().max()
        assert deviation < 2e-5, ours


def test_a_policy_that_is_its_reference_has_the_losses_of_theory(ranks: RankPool, folder: Path) -> None:
    """A reference with dropout, rounding or weights of its own."""
    for loss, settings, wanted in (
        ("sigmoid", {}, 0.693147),
        ("sigmoid", {"label_smoothing": 0.1}, 0.693147),
        ("robust", {"label_smoothing": 0.1}, 0.693147),
        ("hinge", {}, 1.0),
        ("ipo", {}, 25.0),
    ):
        recipe = {"loss": loss, "reference_path": None, **settings}
        found = run_on(ranks, 1, preferring(folder, f"same-{loss}-{len(settings)}", recipe=recipe, train__steps=1))
        assert found.losses[0] == pytest.approx(wanted, rel=1e-6)
        assert found.metrics[0]["reward_margin"] == found.metrics[0]["reward_accuracy"] == 0.0
        assert found.grad_norms[0] > 0


def test_numbers_in_the_rows_stand_for_the_reference(ranks: RankPool, folder: Path, reference: Outcome) -> None:
    """A number of another answer; one that a rank of cp does not see."""
    config = preferring(folder, "asked", packing=False, train__global_batch_size=len(ROWS), data__shuffle=False)
    answers = ranks.run(1, reference_sums, config)[0]
    rows = [
        row | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        for row, (chosen, rejected) in zip(ROWS, answers, strict=True)
    ]
    settings = {"reference": "precomputed", "reference_path": None}
    config = preferring(folder, "precomputed", recipe=settings)
    config.data = preference_config(folder / "precomputed", rows, too_long="error")
    same(run_on(ranks, 1, config), reference)
    same(run_on(ranks, 2, changed(config, folder / "precomputed" / "cp", parallel__cp=2)), reference)
    config.data = preference_config(folder / "unknown", ROWS, too_long="error")
    with pytest.raises(RankError, match="a pair of the train split has no number in ref_chosen_logps"):
        run_on(ranks, 1, changed(config, folder / "unknown" / "run"))


def reference_sums(config: TrainConfig) -> list[list[float]]:
    """Of each pair, in order, by the reference beside the policy."""
    trainer = Trainer(finalize(config, world_size=1))
    try:
        (batch,) = [b for b in trainer.recipe.prepare(trainer.train_data.next_step())]
        sums = Pairs.of(batch, NO_GROUPS).answers(batch.columns["reference"])
        return sums[:, 0].tolist()
    finally:
        trainer.close()


def test_a_reference_in_host_memory_is_the_same(ranks: RankPool, folder: Path, reference: Outcome) -> None:
    config = preferring(folder, "offload", recipe={"reference_offload": True})
    same(run_on(ranks, 1, config), reference)


def test_a_run_resumes_to_the_same_bits(ranks: RankPool, folder: Path) -> None:
    """A reference that is what the policy has become."""
    setting = {"packing": False, "train__global_batch_size": 2, "train__micro_batch_size": 1}
    recipe = {"reference_path": None}
    half = preferring(folder, "half", recipe=recipe, **setting, train__steps=2)
    half.schedule.name = "constant"
    half.checkpoint.at_end = True
    whole = preferring(folder, "whole-constant", recipe=recipe, **setting, train__steps=4)
    whole.schedule.name = "constant"
    wanted = run_on(ranks, 1, whole)
    run_on(ranks, 1, half)
    half.train.steps = 4
    found = run_on(ranks, 1, half)
    assert found.losses == wanted.losses
    assert wanted.losses[2] != wanted.losses[0]


def test_a_validation_reports_what_training_does(ranks: RankPool, folder: Path) -> None:
    """A validation without the reference, or that counts the filling."""
    config = preferring(folder, "validated", packing=False, train__global_batch_size=2, train__steps=1)
    config.data.validation_fraction, config.train.eval_interval = 0.4, 1
    (line,) = run_on(ranks, 1, config).metrics
    assert {f"validation_{name}" for name in ("loss", *REPORTED)} <= line.keys()
    assert "validation_perplexity" not in line
    config = preferring(folder, "validated-tp", packing=False, train__global_batch_size=2, train__steps=1)
    config.data.validation_fraction, config.train.eval_interval, config.parallel.pp = 0.4, 1, 2
    (other,) = run_on(ranks, 2, config).metrics
    for name in ("loss", *REPORTED):
        assert other[f"validation_{name}"] == pytest.approx(line[f"validation_{name}"], rel=1e-4, abs=1e-6), name


def rewarding(base: Path, name: str, **changes: Any) -> TrainConfig:
    """`preferring` with recipe=reward, a margin in some rows and centring."""
    config = preferring(base, name, recipe={"name": "reward", "reference_path": None, "centering": 0.05}, **changes)
    config.model.score = True
    return config


@pytest.fixture(scope="module")
def rewarded(ranks: RankPool, folder: Path) -> Outcome:
    return run_on(ranks, 1, rewarding(folder, "rewarded"))


def their_loss(model: Any, config: TrainConfig) -> torch.Tensor:
    """Loss of all pairs, each example alone in transformers' model."""
    data = config.data
    found = open_pairs(parts(data)[0], data.conversations, load_tokenizer(data), data.cache_dir)
    tokens, starts = found.examples.corpus.tokens.astype("int64"), found.examples.corpus.starts
    total = torch.zeros(())
    for start, end, (length, *_), (margin, *_) in zip(
        starts, found.examples.corpus.ends, found.halves, found.numbers, strict=True
    ):
        halves = tokens[start : start + length], tokens[start + length : end]
        good, bad = (model(torch.tensor(half)[None]).logits[0, 0] for half in halves)
        margin = 0.0 if math.isnan(margin) else margin
        total = (
            total - torch.nn.functional.logsigmoid(good - bad - margin) + config.recipe.centering * (good + bad) ** 2
        )
    assert len(starts) == len(ROWS)
    return total / len(starts)


def test_the_reward_is_that_of_transformers(ranks: RankPool, folder: Path, rewarded: Outcome) -> None:
    """The reward of another token, of a packed neighbour, or without its margin."""
    config = rewarding(folder, "rewarded")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
    name = "head.weight"
    initialize({name: model.score.weight.detach()}, {name: Normal(0.2)}, config.train.seed)
    loss = their_loss(model, config)
    loss.backward()
    assert rewarded.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in (
        (name, model.score.weight),
        ("embedding.weight", model.model.embed_tokens.weight),
        ("blocks.0.attention.o.weight", model.model.layers[0].self_attn.o_proj.weight),
    ):
        deviation = (rewarded.first_gradients[ours] - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert deviation < 2e-5, ours


@pytest.mark.some(2)
@pytest.mark.parametrize("layout", ["tp", "tp-whole", "ring", "pp"])
def test_a_reward_model_trains_alike_on_two_ranks(
    ranks: RankPool, folder: Path, rewarded: Outcome, layout: str
) -> None:
    """The gradient of a head that all ranks of tp have, summed over them."""
    layouts = LAYOUTS | {"tp-whole": {"parallel__tp": 2, "parallel__sequence_parallel": False}}
    config = rewarding(folder, f"reward-{layout}")
    found = run_on(ranks, 2, changed(config, folder / f"reward-{layout}" / "run", **layouts[layout]))
    same(found, rewarded, REPORTED[:4])


def test_an_exported_reward_model_is_transformers_own(ranks: RankPool, folder: Path) -> None:
    """A head under another name, or a language model's left in."""
    config = rewarding(folder, "exported", train__steps=2)
    config.checkpoint.at_end = True
    outcome = run_on(ranks, 1, config)
    out = folder / "exported" / "hf"
    checkpoint = Path(config.run.dir) / "checkpoints" / "step_2"
    with pytest.raises(ConfigError, match="is a reward model, which says no words"):
        open_model(LabModelConfig(path=str(checkpoint)), torch.device("cpu"))
    ranks.run(1, export_checkpoint, checkpoint, out)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_labels == 1
    torch.testing.assert_close(model.score.weight.detach(), outcome.weights["head.weight"])
    # And ours goes on from it.
    config = rewarding(folder, "again", train__steps=1)
    config.model.path = str(out)
    again = run_on(ranks, 1, config)
    assert again.losses[0] == pytest.approx(their_loss(model, config).item(), rel=1e-5)


def test_adapters_learn_from_pairs_as_one_process_on_every_layout(ranks: RankPool, folder: Path) -> None:
    """A reference that has the adapters too, or a frozen weight that the reference takes for its own."""

    def adapted(name: str, **changes: Any) -> TrainConfig:
        changes |= {"train__global_batch_size": len(ROWS) - 1, "optim__lr": 0.02}
        config = preferring(folder, name, packing=False, recipe={"reference_path": None}, **changes)
        config.adapter = AdapterConfig(name="lora", rank=2)
        return config

    one = run_on(ranks, 1, adapted("lora-one"))
    assert one.losses[0] == pytest.approx(math.log(2), rel=1e-6)  # B is 0: the policy is its reference
    assert one.losses[2] < 0.68
    for name, changes in (("zero3", {"parallel__zero_stage": 3}), ("tp", {"parallel__tp": 2})):
        found = run_on(ranks, 2, adapted(f"lora-{name}", **changes))
        assert loss_deviation(found, one) < 1e-6
        assert norm_deviation(found, one) < 1e-4


def test_bad_settings_are_one_line_each(folder: Path) -> None:
    config = preferring(folder, "bad", recipe={"loss": "simpo"})
    (line,) = find_problems(config, world_size=1)
    assert line.startswith("recipe.reference_path=")
    assert "has no effect with recipe.loss=simpo" in line
    config = preferring(folder, "bad", recipe={"beta": 0.0, "label_smoothing": 0.5})
    beta, smoothing = find_problems(config, world_size=1)
    assert beta.startswith("recipe.beta=0.0 must be positive")
    assert smoothing.startswith("recipe.label_smoothing=0.5 must be at least 0 and below 0.5")
    config = preferring(folder, "bad", recipe={"loss": "dop"})
    (line,) = find_problems(config, world_size=1)
    assert line.startswith("recipe.loss=dop is unknown")
    config = preferring(folder, "bad", recipe={"reference": "adapter"})
    line, _ = find_problems(config, world_size=1)
    assert line.startswith("recipe.reference_path=")
    assert "has no effect with recipe.reference=adapter" in line
    config.recipe.reference_path = None
    (line,) = find_problems(config, world_size=1)
    assert line.startswith("recipe.reference=adapter is the policy with its adapters switched off, and adapter.name=no")
    config = preferring(folder, "bad")
    config.data.mask_documents = False
    (line,) = find_problems(config, world_size=1)
    assert "lets an answer see the other one of its pair" in line
