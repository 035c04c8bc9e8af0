"""The rivals: what people use today, on the same weights and inputs.

Each builder of a model takes an EagerJasper in the wanted mode and returns a callable of the same signature,
`(features (N, C, T), lengths (N,)) -> (log_probs (N, T', V), lengths)`, or raises `Absent`.
"""
