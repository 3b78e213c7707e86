"""Answering prompts with a loaded checkpoint: one batch, a queue, or one prompt without loss."""
