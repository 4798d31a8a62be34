/* What a step does to a block, in whichever thread. */
#ifndef FO_UPDATE_H
#define FO_UPDATE_H

#include "plan.h"

/* Does n elements of a piece, from `offset` of its tensor on, where this block begins. */
typedef void fo_block_pass(const fo_step *s, const piece *p, int64_t block, int64_t offset,
                           int64_t n, char *buffer);

/* Does the rows of a gradient in a block of its tensor, elements `begin` to `end`; `k` is the first of
 * the distinct rows there. */
typedef void fo_rows_pass(const fo_step *s, const piece *p, int64_t block, int64_t begin,
                          int64_t end, int64_t k, char *buffer);

fo_block_pass fo_scan_block, fo_update_block;
fo_rows_pass fo_scan_rows, fo_update_rows;

/* Has a row take the steps that it has missed, in elements `begin` to `end` as far as they are its
 * own. (What it has taken is noted once all of it has.) */
void fo_catch_up(const fo_step *s, const fo_tensor *t, const tensor_work *w, int64_t row,
                 int64_t begin, int64_t end);

#endif
