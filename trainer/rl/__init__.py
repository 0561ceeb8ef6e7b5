"""Reinforcement learning: rollouts by the engine, rewards, advantages and losses; recipes put them together."""
