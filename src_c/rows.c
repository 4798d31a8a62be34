/* Sorts the rows of a gradient, so that one thread does all that concerns a row, once. */
#include "rows.h"
#include <stdlib.h>
#include <string.h>

#define MIN_FOR_RADIX 64
#define MAX_DIGIT_BITS 10

static bool make_room(fo_rows *rows, int64_t n)
{
    if (n < rows->room)
        return true;
    fo_rows_free(rows);
    rows->sorted = calloc((size_t)n + 1, sizeof *rows->sorted);
    rows->spare = calloc((size_t)n + 1, sizeof *rows->spare);
    rows->first = calloc((size_t)n + 1, sizeof *rows->first);
    rows->room = rows->sorted && rows->spare && rows->first ? n + 1 : 0;
    return rows->room > 0;
}

/* Stable, both of them. */
static void sort_by_insertion(fo_row *rows, int64_t n)
{
    for (int64_t i = 1; i < n; i++) {
        const fo_row moved = rows[i];
        int64_t k = i;
        for (; k > 0 && rows[k - 1].row > moved.row; k--)
            rows[k] = rows[k - 1];
        rows[k] = moved;
    }
}

/* Rows below n_rows, by digits, the last one first: each moves all to the other array, the first of
 * them from the indices, and meanwhile the next one is counted. Leaves all in `sorted`. */
static void sort_by_radix(fo_rows *rows, const int64_t *indices, int64_t n_rows)
{
    int64_t memory[2][1 << MAX_DIGIT_BITS];
    int64_t *counts = memory[0], *next = memory[1];
    int bits = 1;
    while ((n_rows - 1) >> bits)
        bits++;
    const int digits = (bits + MAX_DIGIT_BITS - 1) / MAX_DIGIT_BITS;
    const int width = (bits + digits - 1) / digits, mask = (1 << width) - 1;
    const int64_t n = rows->n;
    memset(counts, 0, ((size_t)mask + 1) * sizeof *counts);
    for (int64_t i = 0; i < n; i++)
        counts[indices[i] & mask]++;
    for (int shift = 0; shift < bits; shift += width) {
        const fo_row *const from = rows->sorted;
        fo_row *const to = rows->spare;
        int64_t before = 0;
        for (int digit = 0; digit <= mask; digit++) {
            const int64_t count = counts[digit];
            counts[digit] = before;
            before += count;
        }
        const bool last = shift + width >= bits;
        memset(next, 0, ((size_t)mask + 1) * sizeof *next);
        for (int64_t i = 0; i < n; i++) {
            const fo_row moved = shift == 0 ? (fo_row){indices[i], i} : from[i];
            if (!last)
                next[moved.row >> shift >> width & mask]++;
            to[counts[moved.row >> shift & mask]++] = moved;
        }
        rows->spare = rows->sorted;
        rows->sorted = to;
        int64_t *const counted = next;
        next = counts;
        counts = counted;
    }
}

static void find_distinct(fo_rows *rows)
{
    const fo_row *const sorted = rows->sorted;
    const int64_t n = rows->n;
    int64_t *const first = rows->first;
    int64_t n_distinct = n > 0;
    first[0] = 0;
    for (int64_t i = 1; i < n; i++) {
        first[n_distinct] = i; /* unless it is not the first of its row: overwritten */
        n_distinct += sorted[i].row != sorted[i - 1].row;
    }
    first[n_distinct] = n;
    rows->n_distinct = n_distinct;
}

/* Lists the blocks that rows reach; or, since all elements are averaged, all blocks. */
static bool find_blocks(fo_rows *rows, const fo_tensor *tensor)
{
    const int64_t size = rows->row_size, all = fo_count_blocks(tensor->size);
    const int64_t each = size / FO_BLOCK + 2; /* a row reaches no more */
    int64_t most = all / each < rows->n_distinct ? all : rows->n_distinct * each;
    if (tensor->ema)
        most = all;
    if (most > rows->block_room) {
        free(rows->blocks);
        rows->blocks = calloc((size_t)most + 1, sizeof *rows->blocks);
        rows->block_room = rows->blocks ? most : 0;
        if (!rows->blocks)
            return false;
    }
    fo_row_block *const blocks = rows->blocks;
    int64_t next = 0, n_blocks = 0; /* the first block that is not listed yet; those that are */
    for (int64_t k = 0; k < rows->n_distinct; k++) {
        const int64_t begin = fo_distinct_row(rows, k) * size, last = (begin + size - 1) / FO_BLOCK;
        if (!tensor->ema && begin / FO_BLOCK == last) { /* most; which of them, nobody foresees */
            blocks[n_blocks] = (fo_row_block){last, k};
            n_blocks += last >= next;
            next = last + 1;
            continue;
        }
        if (!tensor->ema && begin / FO_BLOCK > next)
            next = begin / FO_BLOCK;
        for (; next <= last; next++)
            blocks[n_blocks++] = (fo_row_block){next, k};
    }
    for (; tensor->ema && next < all; next++)
        blocks[n_blocks++] = (fo_row_block){next, rows->n_distinct};
    rows->n_blocks = n_blocks;
    return true;
}

fo_status fo_rows_sort(fo_rows *rows, const fo_tensor *tensor, int64_t *bad)
{
    const int64_t n = tensor->n_indices, n_rows = tensor->size / tensor->row_size;
    bool sorted = true;
    for (int64_t i = 0; i < n; i++) {
        const int64_t row = tensor->indices[i];
        *bad = i;
        if (row < 0 || row >= n_rows)
            return FO_BAD_INDEX;
        sorted = sorted && (i == 0 || tensor->indices[i - 1] <= row);
    }
    if (!make_room(rows, n))
        return FO_NO_MEMORY;
    rows->row_size = tensor->row_size;
    rows->n = n;
    if (sorted || n < MIN_FOR_RADIX) {
        for (int64_t i = 0; i < n; i++)
            rows->sorted[i] = (fo_row){tensor->indices[i], i};
        if (!sorted)
            sort_by_insertion(rows->sorted, n);
    } else {
        sort_by_radix(rows, tensor->indices, n_rows);
    }
    find_distinct(rows);
    return find_blocks(rows, tensor) ? FO_OK : FO_NO_MEMORY;
}

void fo_rows_free(fo_rows *rows)
{
    free(rows->sorted);
    free(rows->spare);
    free(rows->first);
    free(rows->blocks);
    *rows = (fo_rows){0};
}
