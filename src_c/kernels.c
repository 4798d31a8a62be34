/* All loops, for both types, under the instruction set that this compilation is for: FO_ISA names
 * it, the compiler's flags choose it, and the table is all that can be seen from outside. */
#include "kernels.h"
#include "rule.h"
#include "rules.def"

#define FO_EACH_VARIANT_1(X, rule) X(rule, 0)
#define FO_EACH_VARIANT_2(X, rule) X(rule, 0) X(rule, 1)
#define FO_EACH_VARIANT_4(X, rule) X(rule, 0) X(rule, 1) X(rule, 2) X(rule, 3)

FO_INLINE float fo_sqrt_f32(float x) { return sqrtf(x); }
FO_INLINE double fo_sqrt_f64(double x) { return sqrt(x); }

#define T float
#define FO_T(name) FO_CAT(name, f32)
#include "typed.inc"
#undef T
#undef FO_T

#define T double
#define FO_T(name) FO_CAT(name, f64)
#include "typed.inc"
#undef T
#undef FO_T

/* Of a step, only the memory traffic: the words change places, and one takes up what is read. */
typedef uint32_t word FO_UNALIGNED;

FO_INLINE void move_n(int64_t from, int64_t to, void *const *updated, const word *read, const int n)
{
    word *a = updated[0], *b = updated[n > 1 ? 1 : 0], *c = updated[n > 2 ? 2 : 0],
         *d = updated[n > 3 ? 3 : 0];
    FO_INDEPENDENT
    for (int64_t i = from; i < to; i++) {
        const uint32_t last = a[i] ^ read[i];
        if (n > 1)
            a[i] = b[i];
        if (n > 2)
            b[i] = c[i];
        if (n > 3)
            c[i] = d[i];
        *(n == 1 ? &a[i] : n == 2 ? &b[i] : n == 3 ? &c[i] : &d[i]) = last;
    }
}

static void move(int64_t from, int64_t to, void *const *updated, int n_updated, const void *read)
{
    switch (n_updated) {
    case 1:
        move_n(from, to, updated, read, 1);
        break;
    case 2:
        move_n(from, to, updated, read, 2);
        break;
    case 3:
        move_n(from, to, updated, read, 3);
        break;
    default:
        move_n(from, to, updated, read, 4);
    }
}

#define FO_STRING2(x) #x
#define FO_STRING(x) FO_STRING2(x)
#define FO_ENTRY_F32(rule, variant) rule##_##variant##_f32,
#define FO_ENTRY_F64(rule, variant) rule##_##variant##_f64,

const fo_table FO_CAT(fo_table, FO_ISA) = {
    .name = FO_STRING(FO_ISA),
    .update =
        {
            {
#define FO_RULE(rule, variants) {FO_EACH_VARIANT_##variants(FO_ENTRY_F32, rule)},
#include "rules.def"
#undef FO_RULE
            },
            {
#define FO_RULE(rule, variants) {FO_EACH_VARIANT_##variants(FO_ENTRY_F64, rule)},
#include "rules.def"
#undef FO_RULE
            },
        },
    .sum_of_squares = {sum_of_squares_f32, sum_of_squares_f64},
    .all_finite = {all_finite_f32, all_finite_f64},
    .average = {average_f32, average_f64},
    .mean = {mean_f32, mean_f64},
    .move = move,
};
