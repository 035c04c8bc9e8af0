"""Language models: n-grams, beam search with them, and decoders for a recogniser."""
