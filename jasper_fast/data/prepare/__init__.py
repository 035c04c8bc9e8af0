"""Data preparation: corpora fetched and unpacked, manifests made from other forms, checked, and written as shards."""
