/* The types that elements are stored in. */
#include "kernels.h"
#include <string.h>

const fo_storage fo_storages[] = {
#define FO_NATIVE(name, bytes, text) {text, bytes, FO_DTYPE_##name, 0, 0},
#define FO_CODED(name, T, bytes, text) {text, bytes, FO_DTYPE_##T, 0, 0},
#define FO_PAIRED(name, T, bytes, beside, per, text) {text, bytes, FO_DTYPE_##T, beside, per},
#include "storage.def"
#undef FO_NATIVE
#undef FO_CODED
#undef FO_PAIRED
};

const int fo_storage_count = FO_DTYPES;

_Static_assert((int)FO_DTYPE_f32 == (int)FO_F32 && (int)FO_DTYPE_f64 == (int)FO_F64, "fo_dtype");
_Static_assert((int)FO_DTYPE_bf16 == (int)FO_BF16 && (int)FO_DTYPE_f16 == (int)FO_F16, "fo_dtype");
_Static_assert((int)FO_DTYPE_u8 == (int)FO_8BIT_UNSIGNED && (int)FO_DTYPE_s8 == (int)FO_8BIT_SIGNED,
               "fo_dtype");
_Static_assert((int)FO_DTYPE_bf16_split == (int)FO_BF16_SPLIT, "fo_dtype");
_Static_assert((int)FO_DTYPE_f16_master == (int)FO_F16_MASTER, "fo_dtype");

void fo_decode(fo_dtype dtype, int64_t n, float *to, const void *from, const void *beside)
{
    fo_load *const load = fo_active_table()->load[dtype];
    if (load)
        load(n, to, from, beside);
    else
        memcpy(to, from, (size_t)n * sizeof *to);
}

void fo_encode(fo_dtype dtype, int64_t n, void *to, const float *from, void *beside)
{
    fo_store *const store = fo_active_table()->store[dtype];
    if (store)
        store(n, to, from, beside, NULL);
    else
        memcpy(to, from, (size_t)n * sizeof *from);
}
