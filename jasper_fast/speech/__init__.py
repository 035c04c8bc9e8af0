"""Audio, features, augmentation, vocabularies, greedy decoding, error rates."""
