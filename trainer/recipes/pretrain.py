"""Pretraining: every token is predicted from those before it."""

from __future__ import annotations

from data.config import has_conversations
from trainer.config import TrainConfig
from trainer.recipes.recipe import Recipe


class Pretrain(Recipe):
    """The default recipe."""

    def problems(self, config: TrainConfig) -> list[str]:
        if has_conversations(config.data):
            recipes = {"preferences": "dpo", "unpaired_preferences": "kto"}
            source = config.data.source if config.data.source in recipes else "conversations"
            return [f"recipe.name=pretrain does not read data.source={source}; use recipe={recipes.get(source, 'sft')}"]
        if config.data.source == "prompts":
            return ["recipe.name=pretrain does not read data.source=prompts; use recipe=grpo"]
        return []
