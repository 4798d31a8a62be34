/* What kernels.c, compiled once per instruction set, offers the driver. */
#ifndef FO_KERNELS_H
#define FO_KERNELS_H

#include "core.h"

#define FO_MAX_VARIANTS 4

enum {
#define FO_RULE(rule, variants) FO_INDEX_##rule,
#include "rules.def"
#undef FO_RULE
    FO_RULE_COUNT
};

enum {
#define FO_NATIVE(name, bytes, text) FO_DTYPE_##name,
#define FO_CODED(name, T, bytes, text) FO_DTYPE_##name,
#include "storage.def"
#undef FO_NATIVE
#undef FO_CODED
    FO_DTYPES
};

/* Decodes n elements to the type that rules compute in; encodes such. */
typedef void fo_load(int64_t n, void *to, const void *from);
typedef void fo_store(int64_t n, void *to, const void *from);

/* Updates n elements. gscale and gmax scale and clip the gradient, consts are the rule's. */
typedef void fo_update(int64_t n, void *param, const void *grad, void *const *slot,
                       const double *consts, double gscale, double gmax);

/* Of scale*grad: the sum of squares, and whether all are finite. */
typedef double fo_sum_of_squares(int64_t n, const void *grad, double scale);
typedef bool fo_all_finite(int64_t n, const void *grad, double scale);

/* ema = decay*ema + (1 - decay)*param */
typedef void fo_average(int64_t n, void *ema, const void *param, double decay);

/* to = (sum + scale*grad) / divisor; sum or grad may be NULL, and counts as nothing. */
typedef void fo_mean(int64_t n, void *to, const void *sum, const void *grad, double scale,
                     double divisor);

/* Has words from..to of the arrays take up the bits `taken` of those that are read. */
typedef void fo_move(int64_t from, int64_t to, void *const *updated, int n_updated,
                     const void *read, uint32_t taken);

typedef struct {
    const char *name;
    fo_load *load[FO_DTYPES]; /* NULL: there is nothing to decode */
    fo_store *store[FO_DTYPES];
    fo_update *update[2][FO_RULE_COUNT][FO_MAX_VARIANTS]; /* by the type that it computes in */
    fo_sum_of_squares *sum_of_squares[2];
    fo_all_finite *all_finite[2];
    fo_average *average[2];
    fo_mean *mean[2];
    fo_move *move;
} fo_table;

extern const fo_table fo_table_base, fo_table_avx2, fo_table_avx512;

const fo_table *fo_active_table(void);
void fo_select_default_table(void);

#endif
