"""Checkpoints of LLaVA-1.5 in every layout: what they hold, read, put together, converted."""
