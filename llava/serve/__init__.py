"""Talking with a checkpoint about an image."""
