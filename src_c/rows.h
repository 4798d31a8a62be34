/* Gradients of some rows: which rows, in order, and which blocks of the parameter they lie in. */
#ifndef FO_ROWS_H
#define FO_ROWS_H

#include "core.h"

/* A row, and the place at which its gradient is given. */
typedef struct {
    int64_t row, at;
} fo_row;

/* A block of FO_BLOCK elements of the parameter, and the first of the distinct rows that reach it. */
typedef struct {
    int64_t number, first;
} fo_row_block;

typedef struct {
    int64_t row_size;   /* elements */
    int64_t n;          /* rows that are given */
    int64_t n_distinct; /* of which so many are distinct */
    fo_row *sorted;     /* those that are given: by row, and of each row in the order given */
    fo_row *spare;      /* as many, to sort with */
    int64_t *first;     /* of each distinct row, the first in `sorted`; n at the end */
    int64_t n_blocks;
    fo_row_block *blocks;
    int64_t room, block_room; /* rows, less than this, and blocks that there is memory for */
} fo_rows;

/* Sorts the rows that a tensor's gradient is of. FO_BAD_INDEX: the one at `*bad` is none of the
 * tensor's rows. FO_NO_MEMORY. */
fo_status fo_rows_sort(fo_rows *rows, const fo_tensor *tensor, int64_t *bad);
void fo_rows_free(fo_rows *rows);

/* The blocks of so many elements. */
static inline int64_t fo_count_blocks(int64_t size)
{
    return size / FO_BLOCK + (size % FO_BLOCK != 0);
}

static inline int64_t fo_distinct_row(const fo_rows *rows, int64_t k)
{
    return rows->sorted[rows->first[k]].row;
}

#endif
