"""A causal neural language model: Transformer-XL over words or characters, its training, and its scores of texts."""
