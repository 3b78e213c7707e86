"""LLaVA-1.5 on transformers' own classes, with decoder layers that can be skipped."""
