/* RAdam (Liu et al. 2020): Adam, which is momentum alone until its second moment has seen enough.
 *
 *     m = beta1*m + (1-beta1)*g
 *     v = beta2*v + (1-beta2)*(g*g)
 *     p = p - (step*m) / (sqrt(v) + eps)       once it is rectified
 *     p = p - (step*m) / (sqrt(1) + 0)         before, even where v is infinite
 *
 * With c1 = 1 - beta1^t and c2 = 1 - beta2^t, step = lr/c1, times r*sqrt(c2) once it is rectified. */
#ifndef T

#define radam_hyper_list(X)                                                                        \
    FO_COMMON_HYPERS(X, 1e-3)                                                                      \
    X(beta1, 0.9, 0, FO_BELOW_1)                                                                   \
    X(beta2, 0.999, 0, FO_BELOW_1)                                                                 \
    X(eps, 1e-8, 0, INFINITY)
#define radam_slot_list(X) X(exp_avg, ALWAYS) X(exp_avg_sq, ALWAYS | UNSIGNED)
enum {
    RADAM_BETA1 = FO_COMMON_CONSTS,
    RADAM_ONE_MINUS_BETA1,
    RADAM_BETA2,
    RADAM_ONE_MINUS_BETA2,
    RADAM_STEP,
    RADAM_EPS,
    RADAM_RECTIFIED,
    radam_const_count
};

typedef struct {
    radam_hyper_list(FO_FIELD)
} radam_hypers;

static inline int radam_variant(const double *hypers)
{
    (void)hypers;
    return 0;
}

/* The length of the simple moving average that is like the exponential one after t steps: twice the
 * mean of 1..t weighted by 1, beta, ..., beta^(t-1), less 1. The usual expression of it,
 * (1+beta)/(1-beta) - 2 t beta^t / (1-beta^t), loses half of the digits to cancellation.
 *
 *     rho_1 = 1,   rho_2n = rho_n + 2n q_n/(1 + q_n),   rho_n+1 = 1 + beta (rho_n + 1) u_n/u_n+1
 *
 * with u_n = 1 - beta^n as fo_one_minus_power has it, and q_n = beta^n: 1 - u_n while that is the
 * greater one, and a product once it is the smaller. */
static inline double radam_length(double beta, int64_t t)
{
    const double one_minus_beta = 1 - beta;
    double rho = 1, u = one_minus_beta, q = beta;
    int bit = 0;
    while (t >> (bit + 1))
        bit++;
    while (bit-- > 0) {
        rho = rho + 2 * (double)(t >> (bit + 1)) * (q / (1 + q));
        u = u * (2 - u);
        q = u < 0.5 ? 1 - u : q * q;
        if (t >> bit & 1) {
            const double next = one_minus_beta + beta * u;
            rho = 1 + beta * (rho + 1) * (u / next);
            u = next;
            q = u < 0.5 ? 1 - u : beta * q;
        }
    }
    return rho;
}

static inline void radam_consts(const double *hypers, fo_semantics semantics, int64_t t,
                                unsigned fresh, double *k)
{
    const radam_hypers *h = (const radam_hypers *)hypers;
    (void)semantics;
    (void)fresh;
    const double rho = radam_length(h->beta2, t);
    const double limit = (1 + h->beta2) / (1 - h->beta2);
    const bool rectified = rho > 5;
    const double r2 =
        rectified ? (rho - 4) / (limit - 4) * ((rho - 2) / (limit - 2)) * (limit / rho) : 1;
    const double c2 = rectified ? fo_one_minus_power(h->beta2, t) : 1;
    k[RADAM_BETA1] = h->beta1;
    k[RADAM_ONE_MINUS_BETA1] = 1 - h->beta1;
    k[RADAM_BETA2] = h->beta2;
    k[RADAM_ONE_MINUS_BETA2] = 1 - h->beta2;
    k[RADAM_STEP] = h->lr * sqrt(r2 * c2) / fo_one_minus_power(h->beta1, t);
    k[RADAM_EPS] = rectified ? h->eps : 0;
    k[RADAM_RECTIFIED] = rectified;
}

#else

FO_INLINE T FO_T(radam)(T p, T g, T *slot, const T *k, int variant)
{
    (void)variant;
    slot[0] = k[RADAM_BETA1] * slot[0] + k[RADAM_ONE_MINUS_BETA1] * g;
    slot[1] = k[RADAM_BETA2] * slot[1] + k[RADAM_ONE_MINUS_BETA2] * (g * g);
    const T v = k[RADAM_RECTIFIED] != 0 ? slot[1] : 1;
    return p - (k[RADAM_STEP] * slot[0]) / (FO_T(fo_sqrt)(v) + k[RADAM_EPS]);
}

#define RULE radam
#include "../loop.inc"
#undef RULE

#endif
