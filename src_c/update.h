/* What a step does to a block, in whichever thread. */
#ifndef FO_UPDATE_H
#define FO_UPDATE_H

#include "plan.h"
#include "platform.h"

#define CACHE_LINE 64    /* bytes */
#define MIN_TO_ALIGN 256 /* elements */

/* Does n elements of a piece, from `offset` of its tensor on, where this block begins. */
typedef void fo_block_pass(const fo_step *s, const piece *p, int64_t block, int64_t offset,
                           int64_t n, char *buffer);

/* Does the rows of a gradient in a block of its tensor, elements `begin` to `end`; `k` is the first of
 * the distinct rows there. */
typedef void fo_rows_pass(const fo_step *s, const piece *p, int64_t block, int64_t begin,
                          int64_t end, int64_t k, char *buffer);

fo_block_pass fo_scan_block, fo_update_block;
fo_rows_pass fo_scan_rows, fo_update_rows;

/* Updates n elements from `offset` on, whose gradient is from `at` on, where something is stored in
 * another type than the rule computes in. */
void fo_update_coded(const fo_step *s, const fo_tensor *t, const tensor_work *w, int64_t offset,
                     int64_t at, int64_t n);

/* Has the processor fetch what comes next: it does not foresee it, where several arrays are read by
 * turns, a stretch of each. (Inlined, since GCC drops calls of what only prefetches.) */
FO_INLINE void fo_fetch(const array *a, int64_t offset, int64_t n)
{
    const fo_storage *storage = &fo_storages[a->dtype];
    const char *at = (const char *)a->data + (size_t)offset * storage->bytes;
    for (size_t k = 0; k < (size_t)n * storage->bytes; k += CACHE_LINE)
        __builtin_prefetch(at + k);
    at = beside_at(a, offset);
    for (size_t k = 0; at && k < (size_t)n * storage->beside / (size_t)storage->per;
         k += CACHE_LINE)
        __builtin_prefetch(at + k);
}

/* Has a row take the steps that it has missed, in elements `begin` to `end` as far as they are its
 * own. (What it has taken is noted once all of it has.) */
void fo_catch_up(const fo_step *s, const fo_tensor *t, const tensor_work *w, int64_t row,
                 int64_t begin, int64_t end);

#endif
