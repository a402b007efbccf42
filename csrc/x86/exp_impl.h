/* exp in fp32 vectors. To be included once, after the vectors. */

/* exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2, exp(r) by its Taylor
 * polynomial of degree 7, whose next term is below 2^-27 there. ln 2 comes in two parts,
 * the first with zeros at its end: n times it is exact. Within 2 ulp; 0 below -104, inf
 * above 89, NaN of NaN. */
INLINE vf vf_exp(vf x)
{
    const vf low = vf_set(-104.0f), high = vf_set(89.0f);
    x = vf_min(vf_max(x, low), high); /* NaN passes both */
    const vf n = vf_round(vf_mul(x, vf_set(0x1.715476p+0f)));
    vf r = vf_fma(n, vf_set(-0x1.62e400p-1f), x);
    r = vf_fma(n, vf_set(-0x1.7f7d1cp-20f), r);
    vf p = vf_set(1.0f / 5040);
    p = vf_fma(p, r, vf_set(1.0f / 720));
    p = vf_fma(p, r, vf_set(1.0f / 120));
    p = vf_fma(p, r, vf_set(1.0f / 24));
    p = vf_fma(p, r, vf_set(1.0f / 6));
    p = vf_fma(p, r, vf_set(0.5f));
    p = vf_fma(p, r, vf_set(1));
    p = vf_fma(p, r, vf_set(1));
    return vf_scale(p, n);
}
