"""Audio, features, augmentation, vocabularies, greedy decoding and error rates."""
