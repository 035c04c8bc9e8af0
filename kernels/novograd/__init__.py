"""NovoGrad for all parameters together: unscaling, norms, check for NaN, clipping, update, and the moving average.

For a parameter p with gradient g, first moment m, second moment v (one number per parameter tensor) and average a:

    g = g / grad_scale * min(1, clip_norm / (|all g| + 1e-6))
    v = |g|^2 if v == 0 or beta2 == 0 else beta2*v + (1 - beta2)*|g|^2
    m = beta1*m + share*(g / (sqrt(v) + eps) + weight_decay*p)
    p = p - lr*m
    a = a + weight*(p - a)

|all g| is the norm of all gradients after the division by grad_scale. With clip_norm = 0 nothing is clipped. `share` is
1 or, with gradient averaging, 1 - beta1. A step is skipped if `found_inf` is not zero, or if `guard` is set and |all g|
is not finite. A skipped step changes no p, m or v, but still updates a with the present p. Except in `reference.py` a
step makes two passes. The first reads g for the norms; the second reads g, m, p and a and writes m, p and a: in all 32
bytes per element in fp32. Each face (an implementation: reference, cpu, triton, cuda) exports `step`; `reference.py` is
its definition.
"""
