/* The types that elements are stored in. */
#include "kernels.h"

const fo_storage fo_storages[] = {
#define FO_NATIVE(name, bytes, text) {text, bytes, FO_DTYPE_##name},
#define FO_CODED(name, T, bytes, text) {text, bytes, FO_DTYPE_##T},
#include "storage.def"
#undef FO_NATIVE
#undef FO_CODED
};

const int fo_storage_count = FO_DTYPES;

_Static_assert((int)FO_DTYPE_f32 == (int)FO_F32 && (int)FO_DTYPE_f64 == (int)FO_F64, "fo_dtype");
