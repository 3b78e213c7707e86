"""FuzzyRoE: layer skipping for Hugging Face decoders, routed by a fuzzy rule base."""
