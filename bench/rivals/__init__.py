"""The rivals: other ways to run the same model, with the same weights and inputs.

Each builder of a model takes an EagerJasper in training or evaluation mode. It returns a function with the signature
`(features (N, C, T), lengths (N,)) -> (log_probs (N, T', V), lengths)`, or raises `Absent`.
"""
