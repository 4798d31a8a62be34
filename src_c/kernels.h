/* What kernels.c, compiled once per instruction set, offers the driver. */
#ifndef FO_KERNELS_H
#define FO_KERNELS_H

#include "core.h"

#define FO_MAX_VARIANTS 4

/* Elements that are decoded at once: a few arrays of them, encoded and decoded to double, fit a
 * first cache of 32 KiB. What steps take with other figures, relative to 512 (SGD with momentum and
 * Adam, all in swapped float32, FO_TEST_STORAGE; 4096 and 200,000 elements; best of 45 on a Zen 5):
 *
 *               128          256          1024         2048         4096
 *     avx2      1.10 - 1.18  1.02 - 1.06  1.00 - 1.03  1.08 - 1.12  1.02 - 1.15
 *     avx512    0.99 - 1.07  0.95 - 1.04  0.96 - 1.01  1.02 - 1.11  1.18 - 1.33
 *
 * `base`, which decodes slowly, gains up to a tenth from 4096. */
#define FO_STRETCH 512

enum {
#define FO_RULE(rule, variants) FO_INDEX_##rule,
#include "rules.def"
#undef FO_RULE
    FO_RULE_COUNT
};

enum {
#define FO_NATIVE(name, bytes, text) FO_DTYPE_##name,
#define FO_CODED(name, T, bytes, text) FO_DTYPE_##name,
#define FO_PAIRED(name, T, bytes, beside, per, text) FO_DTYPE_##name,
#include "storage.def"
#undef FO_NATIVE
#undef FO_CODED
#undef FO_PAIRED
    FO_DTYPES
};

/* Decodes n elements, and what is beside them, to the type that rules compute in; encodes such. With
 * 16 random bits for each, a store rounds up or down at random; with NULL, to nearest. */
typedef void fo_load(int64_t n, void *to, const void *from, const void *beside);
typedef void fo_store(int64_t n, void *to, const void *from, void *beside, const uint16_t *random);

/* Makes such bits for n elements, at most FO_STRETCH, from this one on, under the key of all else:
 * to[j] for array number j of those in the set. */
typedef void fo_random(int64_t n, uint16_t (*to)[FO_STRETCH], unsigned arrays, uint64_t key,
                       int64_t element);

/* What is stored together so often that it has loops of its own, which decode, update and encode
 * without a detour: X(name, the types of parameter, gradient and state, ...). State that may not be
 * stored so is float32. All else takes the way of step.c. */
#define FO_EACH_FUSED(X, ...)                                                                      \
    X(bf16, bf16, bf16, bf16, __VA_ARGS__)                                                         \
    X(bf16_f32, bf16, bf16, f32, __VA_ARGS__)                                                      \
    X(split_f32, bf16_split, bf16, f32, __VA_ARGS__)

enum {
#define FO_FUSED_INDEX(name, param, grad, state, unused) FO_FUSED_##name,
    FO_EACH_FUSED(FO_FUSED_INDEX, ) FO_FUSED_COUNT
};

/* An array that is stored in fewer bits, or may be. */
typedef struct {
    char *data, *beside;
} fo_stored;

/* What fo_update does, to a parameter and slots as they are stored: n, which is even, from
 * number `element` on, which is even, too. */
typedef void fo_fused(int64_t n, const fo_stored *arrays, const fo_stored *grad, bool stochastic,
                      uint64_t key, uint32_t element, const double *consts, double gscale,
                      double gmax);

/* Float to double. */
typedef void fo_widen(int64_t n, double *to, const void *from);

/* Updates n elements. gscale and gmax scale and clip the gradient, consts are the rule's. */
typedef void fo_update(int64_t n, void *param, const void *grad, void *const *slot,
                       const double *consts, double gscale, double gmax);

/* Of scale*grad: adds the squares to FO_LANES interleaved sums, of which the first element belongs to
 * number `lane`; and whether all are finite. */
#define FO_LANES 16
typedef void fo_add_squares(int64_t n, const void *grad, double scale, int64_t lane, double *sums);
typedef bool fo_all_finite(int64_t n, const void *grad, double scale);

/* Adds the squares of n elements' gradients, as the rule takes them, to FO_LANES interleaved sums. */
typedef void fo_add_row(int64_t n, const void *param, const void *grad, const double *consts,
                        double gscale, double gmax, double *sums);

/* ema = decay*ema + (1 - decay)*param */
typedef void fo_average(int64_t n, void *ema, const void *param, double decay);

/* to = (sum + scale*grad) / divisor; sum or grad may be NULL, and counts as nothing. */
typedef void fo_mean(int64_t n, void *to, const void *sum, const void *grad, double scale,
                     double divisor);

/* to += from */
typedef void fo_add(int64_t n, void *to, const void *from);

/* Has words from..to of the arrays take up the bits `taken` of those that are read. */
typedef void fo_move(int64_t from, int64_t to, void *const *updated, int n_updated,
                     const void *read, uint32_t taken);

typedef struct {
    const char *name;
    fo_load *load[FO_DTYPES]; /* NULL: there is nothing to decode */
    fo_store *store[FO_DTYPES];
    fo_fused *fused[FO_RULE_COUNT][FO_FUSED_COUNT][FO_MAX_VARIANTS];
    fo_random *random;
    fo_widen *widen;
    fo_update *update[2][FO_RULE_COUNT][FO_MAX_VARIANTS]; /* by the type that it computes in */
    fo_add_squares *add_squares[2];
    fo_add_row *add_row[2];
    fo_all_finite *all_finite[2];
    fo_average *average[2];
    fo_mean *mean[2];
    fo_add *add[2];
    fo_move *move;
} fo_table;

extern const fo_table fo_table_base, fo_table_avx2, fo_table_avx512;

const fo_table *fo_active_table(void);
void fo_select_default_table(void);

#endif
