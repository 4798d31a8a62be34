/* Means of what several processes have: added up in an order of their own, so that the bits do not
 * depend on how the arrays came here. */
#include "kernels.h"
#include "platform.h"

#include <string.h>

/* n elements that are stored as some type, in the type of the sum: where they are, or in the buffer. */
static const void *as_type(const fo_table *table, fo_dtype type, fo_dtype stored, int64_t n,
                           const void *from, int64_t offset, void *buffer)
{
    _Alignas(64) float single[FO_BLOCK];
    const void *at = (const char *)from + (size_t)offset * fo_storages[stored].bytes;
    if (stored == type)
        return at;
    if (fo_storages[stored].arithmetic == type) {
        table->load[stored](n, buffer, at, NULL);
        return buffer;
    }
    if (table->load[stored])
        table->load[stored](n, single, at, NULL);
    table->widen(n, buffer, table->load[stored] ? single : at);
    return buffer;
}

void fo_ordered_mean(fo_dtype type, int64_t n, void *to, int count, const void *const *arrays,
                     const fo_dtype *stored)
{
    _Alignas(64) char buffer[FO_BLOCK * sizeof(double)];
    const fo_table *table = fo_active_table();
    const size_t item = fo_storages[type].bytes;
    const fo_fpenv saved = fo_fpenv_enter();
    for (int64_t i = 0; i < n; i += FO_BLOCK) {
        const int64_t m = n - i < FO_BLOCK ? n - i : FO_BLOCK;
        char *const sum = (char *)to + (size_t)i * item;
        memcpy(sum, as_type(table, type, stored[0], m, arrays[0], i, buffer), (size_t)m * item);
        for (int k = 1; k < count; k++)
            table->add[type](m, sum, as_type(table, type, stored[k], m, arrays[k], i, buffer));
        table->mean[type](m, sum, sum, NULL, 1, count);
    }
    fo_fpenv_leave(saved);
}

void fo_batch_mean(fo_dtype type, int64_t n, void *to, const void *sum, const void *grad,
                   fo_dtype stored, double scale, double divisor)
{
    _Alignas(64) char buffer[FO_BLOCK * sizeof(double)];
    const fo_table *table = fo_active_table();
    const size_t item = fo_storages[type].bytes;
    const fo_fpenv saved = fo_fpenv_enter();
    for (int64_t i = 0; i < n; i += FO_BLOCK) {
        const int64_t m = n - i < FO_BLOCK ? n - i : FO_BLOCK;
        const size_t at = (size_t)i * item;
        table->mean[type](m, (char *)to + at, sum ? (const char *)sum + at : NULL,
                          grad ? as_type(table, type, stored, m, grad, i, buffer) : NULL, scale,
                          divisor);
    }
    fo_fpenv_leave(saved);
}
