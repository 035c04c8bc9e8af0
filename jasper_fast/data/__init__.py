"""Manifests, perturbation, datasets and batches."""
