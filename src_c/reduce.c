/* Means of what several processes have: added up in an order of their own, so that the bits do not
 * depend on how the arrays came here. */
#include "plan.h"
#include "platform.h"

#include <string.h>

/* n elements from an offset on, in the type of the sum: where they are, or in the buffer. */
static const void *in_type(const fo_table *table, fo_dtype type, fo_dtype stored, int64_t n,
                           const void *from, int64_t offset, void *buffer)
{
    const void *at = (const char *)from + (size_t)offset * fo_storages[stored].bytes;
    if (stored == type)
        return at;
    fo_convert(table, type, stored, n, buffer, at);
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
        for (int k = 0; k < count; k++) {
            const void *term = in_type(table, type, stored[k], m, arrays[k], i, buffer);
            if (k == 0)
                memcpy(sum, term, (size_t)m * item);
            else
                table->add[type](m, sum, term);
        }
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
        const void *g = grad ? in_type(table, type, stored, m, grad, i, buffer) : NULL;
        table->mean[type](m, (char *)to + at, sum ? (const char *)sum + at : NULL, g, scale,
                          divisor);
    }
    fo_fpenv_leave(saved);
}
