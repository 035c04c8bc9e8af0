"""Sound and text: audio, features, augmentation, vocabularies, greedy decoding, error rates."""
