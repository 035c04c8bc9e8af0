"""NovoGrad over all parameters at once: unscaling, norms, check for NaN, clipping, update, and the moving average.

For a parameter p with gradient g, first moment m, second moment v (one number a parameter) and moving average a:

    g = g / grad_scale * min(1, clip_norm / (|all g| + 1e-6))
    v = |g|^2 if v == 0 or beta2 == 0 else beta2*v + (1 - beta2)*|g|^2
    m = beta1*m + share*(g / (sqrt(v) + eps) + weight_decay*p)
    p = p - lr*m
    a = a + weight*(p - a)

A step that is not good changes no p, m and v; a is averaged with the p there is. Good is one with `found_inf` zero and,
where it is guarded, with a finite norm over all gradients. Each face exports `step`; `reference.py` is its definition.
Two passes: g is read for the norms, then g, m, p, a are read and m, p, a written: 32 bytes a parameter in fp32.
"""
