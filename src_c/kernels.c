/* All loops, for both types that rules compute in and for all that store them, under the
 * instruction set that this compilation is for: FO_ISA names it, the compiler's flags choose it,
 * and the table is all that can be seen from outside. */
#include "kernels.h"
#include "random.h"
#include "rule.h"
#include "rules.def"
#include <string.h>

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

#include "codecs.inc"

#define FO_C_f32 unaligned_f32
#define FO_C_f64 unaligned_f64
#define FO_NATIVE(name, bytes, text)
#define FO_PAIRED(name, T, bytes, beside, per, text)
#define FO_CODED(name, T, bytes, text)                                                             \
    FO_INLINE void load_n_##name(int64_t n, void *to_, const void *from_, const void *beside)      \
    {                                                                                              \
        FO_C_##T *to = to_;                                                                        \
        const unsigned char *from = from_;                                                         \
        (void)beside;                                                                              \
        FO_INDEPENDENT                                                                             \
        for (int64_t i = 0; i < n; i++)                                                            \
            to[i] = load_##name(from + i * (bytes));                                               \
    }                                                                                              \
    FO_INLINE void store_n_##name(int64_t n, void *to_, const void *from_, void *beside,           \
                                  const uint16_t *random)                                          \
    {                                                                                              \
        unsigned char *to = to_;                                                                   \
        const FO_C_##T *from = from_;                                                              \
        (void)beside;                                                                              \
        if (!random) {                                                                             \
            FO_INDEPENDENT                                                                         \
            for (int64_t i = 0; i < n; i++)                                                        \
                store_##name(to + i * (bytes), from[i], false, 0);                                 \
        } else {                                                                                   \
            FO_INDEPENDENT                                                                         \
            for (int64_t i = 0; i < n; i++)                                                        \
                store_##name(to + i * (bytes), from[i], true, random[i]);                          \
        }                                                                                          \
    }
#include "storage.def"
#undef FO_CODED
#undef FO_PAIRED

/* As functions, for the table. */
#define FO_CODED(name, T, bytes, text)                                                             \
    static void load_##name##_(int64_t n, void *to, const void *from, const void *beside)          \
    {                                                                                              \
        load_n_##name(n, to, from, beside);                                                        \
    }                                                                                              \
    static void store_##name##_(int64_t n, void *to, const void *from, void *beside,               \
                                const uint16_t *random)                                            \
    {                                                                                              \
        store_n_##name(n, to, from, beside, random);                                               \
    }
#define FO_PAIRED(name, T, bytes, beside, per, text) FO_CODED(name, T, bytes, text)
#include "storage.def"
#undef FO_NATIVE
#undef FO_CODED
#undef FO_PAIRED

FO_INLINE void bits_for(int64_t n, word *to, const word *hashes, const int number)
{
    for (int64_t j = 0; j < n; j++)
        to[j] = FO_LOWER_FIRST(fo_bits_for(hashes[j], number));
}

static void random_bits(int64_t n, uint16_t (*to)[FO_STRETCH], unsigned arrays, uint64_t key,
                        int64_t element)
{
    for (int64_t done = 0; done < n;) {
        const int64_t odd = element % 2, left = (INT64_C(1) << 32) - element % (INT64_C(1) << 32);
        const int64_t m = n - done < left ? n - done : left, pairs = (odd + m + 1) / 2;
        const uint64_t own = fo_key(key, element >> 32);
        word hashes[FO_STRETCH / 2 + 1], bits[FO_STRETCH / 2 + 1];
        for (int64_t j = 0; j < pairs; j++)
            hashes[j] = fo_hash(own, (uint32_t)element / 2 + (uint32_t)j);
        for (int number = 0; number <= FO_MAX_SLOTS; number++) {
            if (!(arrays & FO_SLOT(number)))
                continue;
            switch (number) {
            case 0:
                bits_for(pairs, bits, hashes, 0);
                break;
            case 1:
                bits_for(pairs, bits, hashes, 1);
                break;
            case 2:
                bits_for(pairs, bits, hashes, 2);
                break;
            default:
                bits_for(pairs, bits, hashes, 3);
            }
            memcpy(to[number] + done, (const half *)bits + odd, (size_t)m * sizeof **to);
        }
        done += m;
        element += m;
    }
}

static void widen(int64_t n, double *to, const void *from_)
{
    const unaligned_f32 *from = from_;
    FO_INDEPENDENT
    for (int64_t i = 0; i < n; i++)
        to[i] = (double)from[i];
}

#include "fused.inc"

/* Of a step, only the memory traffic. */

FO_INLINE void move_n(int64_t from, int64_t to, void *const *updated, const word *read,
                      uint32_t taken, const int n)
{
    word *a = updated[0], *b = updated[1], *c = updated[2], *d = updated[3];
    FO_INDEPENDENT
    for (int64_t i = from; i < to; i++) {
        const uint32_t bits = read[i] & taken;
        a[i] ^= bits;
        if (n > 1)
            b[i] ^= bits;
        if (n > 2)
            c[i] ^= bits;
        if (n > 3)
            d[i] ^= bits;
    }
}

static void move(int64_t from, int64_t to, void *const *updated, int n_updated, const void *read,
                 uint32_t taken)
{
    switch (n_updated) {
    case 1:
        move_n(from, to, updated, read, taken, 1);
        break;
    case 2:
        move_n(from, to, updated, read, taken, 2);
        break;
    case 3:
        move_n(from, to, updated, read, taken, 3);
        break;
    default:
        move_n(from, to, updated, read, taken, 4);
    }
}

#define FO_STRING2(x) #x
#define FO_STRING(x) FO_STRING2(x)
#define FO_ENTRY_F32(rule, variant) rule##_##variant##_f32,
#define FO_ENTRY_F64(rule, variant) rule##_##variant##_f64,

const fo_table FO_CAT(fo_table, FO_ISA) = {
    .name = FO_STRING(FO_ISA),
#define FO_NATIVE(name, bytes, text) NULL,
#define FO_CODED(name, T, bytes, text) load_##name##_,
#define FO_PAIRED(name, T, bytes, beside, per, text) load_##name##_,
    .load =
        {
#include "storage.def"
        },
#undef FO_CODED
#undef FO_PAIRED
#define FO_CODED(name, T, bytes, text) store_##name##_,
#define FO_PAIRED(name, T, bytes, beside, per, text) store_##name##_,
    .store =
        {
#include "storage.def"
        },
#undef FO_NATIVE
#undef FO_CODED
#undef FO_PAIRED
    .fused =
        {
#define FO_RULE(rule, variants) {FO_EACH_FUSED(FO_FUSED_ENTRIES_##variants, rule)},
#include "rules.def"
#undef FO_RULE
        },
    .random = random_bits,
    .widen = widen,
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
    .add_squares = {add_squares_f32, add_squares_f64},
    .add_row = {add_row_f32, add_row_f64},
    .all_finite = {all_finite_f32, all_finite_f64},
    .average = {average_f32, average_f64},
    .mean = {mean_f32, mean_f64},
    .add = {add_f32, add_f64},
    .move = move,
};
