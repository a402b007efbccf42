/* exp in float64 vectors. To be included once, after the vectors. */

/* exp(x) for x <= 0 as in exp_impl.h, by the Taylor polynomial of degree 13, whose next
 * term is below 2^-57. Within 1 ulp, never above 1; where exp(x) < DBL_MIN it is some
 * number in (0, DBL_MIN). NaN and x > 0 give anything. The two lowest terms are added
 * to the others, so that the rounding of these counts for little. */
INLINE vd vd_exp(vd x)
{
    static const double inverse_factorials[] = {
        1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
        1.0 / 40320,      1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,
        1.0 / 6,          1.0 / 2,
    };
    x = vd_max(x, vd_set(-708.4)); /* ln DBL_MIN = -708.396..., and n >= -1022 */
    const vd n = vd_round(vd_mul(x, vd_set(0x1.71547652b82fep+0)));
    vd r = vd_fma(n, vd_set(-0x1.62e42fefa39efp-1), x);
    r = vd_fma(n, vd_set(-0x1.abc9e3b39803fp-56), r);
    vd p = vd_set(inverse_factorials[0]);
    MP_UNROLL
    for (int i = 1; i < 12; i++)
        p = vd_fma(p, r, vd_set(inverse_factorials[i]));
    p = vd_add(vd_set(1), vd_fma(vd_mul(r, r), p, r));
    return vd_mul(p, vd_power_of_two(n));
}
