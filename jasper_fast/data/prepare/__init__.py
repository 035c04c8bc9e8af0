"""Data preparation: fetches and unpacks corpora, makes and checks manifests, and writes shards."""
