"""LLaVA models: loading, and how routing reaches their decoder."""
