"""Evaluation: the lmms-eval plug-in, and reports of what its runs wrote."""
