/* NAdam (Dozat 2016): Adam whose momentum looks ahead by Nesterov, and warms up.
 *
 *     m = beta1*m + (1-beta1)*g
 *     v = beta2*v + (1-beta2)*(g*g)
 *     p = p - (into*g + out*m) / (sqrt(v) + eps')
 *
 * With mu_t = beta1*(1 - 0.96^(t*psi)/2), the product P_t = P_t-1 * mu_t, c2 = 1 - beta2^t and
 * rate = lr*sqrt(c2): into = rate*(1-mu_t)/(1-P_t), out = rate*mu_t+1/(1-P_t*mu_t+1), and
 * eps' = eps*sqrt(c2). In torch psi is momentum_decay, in keras it is 1. */
#ifndef T

#define nadam_hyper_list(X)                                                                        \
    FO_COMMON_HYPERS(X, 2e-3)                                                                      \
    X(beta1, 0.9, 0, FO_BELOW_1)                                                                   \
    X(beta2, 0.999, 0, FO_BELOW_1)                                                                 \
    X(eps, 1e-8, 0, INFINITY)                                                                      \
    X(momentum_decay, 4e-3, 0, INFINITY)
#define nadam_slot_list(X)                                                                         \
    X(exp_avg, ALWAYS) X(exp_avg_sq, ALWAYS | UNSIGNED) X(mu_product, ALWAYS | EXACT | NUMBER)
enum {
    NADAM_BETA1 = FO_COMMON_CONSTS,
    NADAM_ONE_MINUS_BETA1,
    NADAM_BETA2,
    NADAM_ONE_MINUS_BETA2,
    NADAM_INTO,
    NADAM_OUT,
    NADAM_EPS,
    nadam_const_count
};

typedef struct {
    nadam_hyper_list(FO_FIELD)
} nadam_hypers;

static inline int nadam_variant(const double *hypers)
{
    (void)hypers;
    return 0;
}

/* The halves of a double, whose products with other halves are exact. */
static inline double nadam_upper_half(double x)
{
    const double scaled = 134217729.0 * x; /* 2^27 + 1 */
    return scaled - (scaled - x);
}

/* 0.96^(t*psi), without pow: 2^(n + f) with a whole n and |f| <= 1/2, by the Taylor series of e^x. The
 * exponent is a sum of two doubles, since its error would count as often as it is large: of t*psi, and
 * of the logarithm of 0.96 to base 2, each is exact or nearly so in two. */
static inline double nadam_power(double psi, int64_t t)
{
    static const double log_upper = -0x1.e275048da0ba1p-5, log_rest = 0x1.6ab55ad07cc86p-59;
    const double times = (double)t, x = times * psi;
    if (!(x < 20000)) /* the power is below all doubles */
        return 0;
    const double a = nadam_upper_half(times), b = nadam_upper_half(psi), a_rest = times - a,
                 b_rest = psi - b;
    const double x_rest = ((a * b - x) + a * b_rest + a_rest * b) + a_rest * b_rest;
    const double c = nadam_upper_half(x), d = nadam_upper_half(log_upper), c_rest = x - c,
                 d_rest = log_upper - d, y = x * log_upper;
    const double y_rest = ((c * d - y) + c * d_rest + c_rest * d) + c_rest * d_rest +
                          (x * log_rest + x_rest * log_upper);
    const int n = (int)(y - 0.5);
    const double z = ((y - n) + y_rest) * 0x1.62e42fefa39efp-1; /* ln 2 */
    double e = 1;
    for (int k = 16; k > 0; k--)
        e = 1 + z / k * e;
    return ldexp(e, n);
}

static inline double nadam_momentum(double beta1, double psi, int64_t t)
{
    return beta1 * (1 - 0.5 * nadam_power(psi, t));
}

static inline void nadam_consts(const double *hypers, fo_semantics semantics, int64_t t,
                                unsigned fresh, double *k)
{
    const nadam_hypers *h = (const nadam_hypers *)hypers;
    (void)fresh;
    const double psi = semantics == FO_KERAS ? 1 : h->momentum_decay;
    const double mu = nadam_momentum(h->beta1, psi, t);
    const double next = nadam_momentum(h->beta1, psi, t + 1);
    const double root = sqrt(fo_one_minus_power(h->beta2, t)), rate = h->lr * root;
    k[NUMBER_KEPT] = k[NUMBER_KEPT] * mu;
    k[NADAM_BETA1] = h->beta1;
    k[NADAM_ONE_MINUS_BETA1] = 1 - h->beta1;
    k[NADAM_BETA2] = h->beta2;
    k[NADAM_ONE_MINUS_BETA2] = 1 - h->beta2;
    k[NADAM_INTO] = rate * (1 - mu) / (1 - k[NUMBER_KEPT]);
    k[NADAM_OUT] = rate * next / (1 - k[NUMBER_KEPT] * next);
    k[NADAM_EPS] = h->eps * root;
}

#else

FO_INLINE T FO_T(nadam)(T p, T g, T *slot, const T *k, int variant)
{
    (void)variant;
    slot[0] = k[NADAM_BETA1] * slot[0] + k[NADAM_ONE_MINUS_BETA1] * g;
    slot[1] = k[NADAM_BETA2] * slot[1] + k[NADAM_ONE_MINUS_BETA2] * (g * g);
    const T ahead = k[NADAM_INTO] * g + k[NADAM_OUT] * slot[0];
    return p - ahead / (FO_T(fo_sqrt)(slot[1]) + k[NADAM_EPS]);
}

#define RULE nadam
#include "../loop.inc"
#undef RULE

#endif
