"""Prompts, labels and rollout shards."""
