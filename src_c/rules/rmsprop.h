/* RMSprop (Tieleman and Hinton 2012; centered: Graves 2013), with momentum.
 *
 *     v = alpha*v + (1-alpha)*(g*g)
 *     centered:  a = alpha*a + (1-alpha)*g,   w = max(v - a*a, floor)        else w = v
 *     u = (in*g) / (sqrt(w + eps_in) + eps_out)
 *     momentum:  b = mu*b + u,   p = p - out*b                               else p = p - u
 *
 * torch adds eps outside the root and multiplies the buffer by lr as it is used (in = 1, out = lr);
 * keras adds eps inside and puts lr into the buffer (in = lr, out = 1). Rounding can make v - a*a
 * negative: torch's floor is 0, keras has none, since its eps is added before the root. */
#ifndef T

#define rmsprop_hyper_list(X)                                                                      \
    FO_COMMON_HYPERS(X, 1e-2)                                                                      \
    X(alpha, 0.99, 0, INFINITY)                                                                    \
    X(eps, 1e-8, 0, INFINITY)                                                                      \
    X(momentum, 0, 0, INFINITY)                                                                    \
    X(centered, 0, 0, FO_SWITCH)
#define rmsprop_slot_list(X)                                                                       \
    X(square_avg, ALWAYS | UNSIGNED)                                                               \
    X(momentum_buffer, RMSPROP_MOMENTUM) X(grad_avg, RMSPROP_CENTERED | EXACT)
enum { RMSPROP_MOMENTUM = 1, RMSPROP_CENTERED = 2 };
enum {
    RMSPROP_ALPHA = FO_COMMON_CONSTS,
    RMSPROP_ONE_MINUS_ALPHA,
    RMSPROP_FLOOR,
    RMSPROP_EPS_IN,
    RMSPROP_EPS_OUT,
    RMSPROP_MU,
    RMSPROP_IN,
    RMSPROP_OUT,
    rmsprop_const_count
};

typedef struct {
    rmsprop_hyper_list(FO_FIELD)
} rmsprop_hypers;

static inline int rmsprop_variant(const double *hypers)
{
    const rmsprop_hypers *h = (const rmsprop_hypers *)hypers;
    return (h->momentum != 0 ? RMSPROP_MOMENTUM : 0) | (h->centered != 0 ? RMSPROP_CENTERED : 0);
}

static inline void rmsprop_consts(const double *hypers, fo_semantics semantics, int64_t t,
                                  unsigned fresh, double *k)
{
    const rmsprop_hypers *h = (const rmsprop_hypers *)hypers;
    const bool keras = semantics == FO_KERAS, lr_goes_in = keras || h->momentum == 0;
    (void)t, (void)fresh;
    k[RMSPROP_ALPHA] = h->alpha;
    k[RMSPROP_ONE_MINUS_ALPHA] = 1 - h->alpha;
    k[RMSPROP_FLOOR] = keras ? -INFINITY : 0;
    k[RMSPROP_EPS_IN] = keras ? h->eps : 0;
    k[RMSPROP_EPS_OUT] = keras ? 0 : h->eps;
    k[RMSPROP_MU] = h->momentum;
    k[RMSPROP_IN] = lr_goes_in ? h->lr : 1;
    k[RMSPROP_OUT] = lr_goes_in ? 1 : h->lr;
}

#else

FO_INLINE T FO_T(rmsprop)(T p, T g, T *slot, const T *k, int variant)
{
    slot[0] = k[RMSPROP_ALPHA] * slot[0] + k[RMSPROP_ONE_MINUS_ALPHA] * (g * g);
    T w = slot[0];
    if (variant & RMSPROP_CENTERED) {
        slot[2] = k[RMSPROP_ALPHA] * slot[2] + k[RMSPROP_ONE_MINUS_ALPHA] * g;
        w = FO_T(fo_at_least)(k[RMSPROP_FLOOR], w - slot[2] * slot[2]);
    }
    const T den = FO_T(fo_sqrt)(w + k[RMSPROP_EPS_IN]) + k[RMSPROP_EPS_OUT];
    const T u = (k[RMSPROP_IN] * g) / den;
    if (!(variant & RMSPROP_MOMENTUM))
        return p - u;
    slot[1] = k[RMSPROP_MU] * slot[1] + u;
    return p - k[RMSPROP_OUT] * slot[1];
}

#define RULE rmsprop
#include "../loop.inc"
#undef RULE

#endif
