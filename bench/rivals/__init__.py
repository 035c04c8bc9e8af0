"""The rivals: other ways to run the same model, with the same weights and inputs.

The builder of a rival takes an EagerJasper in training or evaluation mode. It returns a function with the signature
`(features (N, C, T), lengths (N,)) -> (log_probs (N, T', V), lengths)`, or raises `Absent`.
"""
