/* A step, block by block: the norm of a block's gradient, and its update. A block has all of its elements
 * in the gradient, or some rows of them. */
#include "update.h"
#include "platform.h"
#include "rule.h"
#include <math.h>
#include <string.h>

#define MAX_FETCHED 256 /* elements of a row, of each array; the processor foresees the others */
#define ROWS_AHEAD 4

/* ---- all elements of a block ----------------------------------------------------------------- */

/* Adds the sums up, always in the same order. */
static double fold(double *sum)
{
    for (int half = FO_LANES / 2; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            sum[j] += sum[j + half];
    return sum[0];
}

void fo_scan_block(const fo_step *s, const piece *p, int64_t block, int64_t offset, int64_t n,
                   char *buffer)
{
    const fo_tensor *t = p->tensor;
    const tensor_work *w = p->work;
    const int64_t at = offset + p->to_grad;
    if (!has_gradient(s, t))
        return;
    const void *grad = effective_grad(s, t, w, offset, at, n, buffer);
    const double scale = unscale(s, t);
    double sums[FO_LANES] = {0};
    s->table->add_squares[w->type](n, grad, scale, 0, sums);
    const double sum = fold(sums);
    s->plan->block_sum[block] = sum;
    /* A finite sum has finite terms; one that is not may have overflowed. */
    s->plan->block_finite[block] = sum - sum == 0 || s->table->all_finite[w->type](n, grad, scale);
}

/* Calls a loop: at first for what comes before a cache line, so that no vector of the parameter lies
 * in two cache lines; nor do those of the other arrays, if they begin at the same place in a line. */
static void update(const tensor_work *w, int64_t n, char *param, const char *grad, void **slot)
{
    const size_t item = w->item;
    const int64_t head =
        n < MIN_TO_ALIGN ? 0 : (int64_t)((-(uintptr_t)param & (CACHE_LINE - 1)) / item);
    if (head > 0) {
        w->update(head, param, grad, slot, w->consts, w->gscale, w->gmax);
        for (int j = 0; j < FO_MAX_SLOTS; j++)
            slot[j] = slot[j] ? (char *)slot[j] + (size_t)head * item : NULL;
    }
    w->update(n - head, param + (size_t)head * item, grad + (size_t)head * item, slot, w->consts,
              w->gscale, w->gmax);
}

FO_APART void average(const fo_step *s, const fo_tensor *t, const fo_coding *coding, int64_t offset,
                      int64_t n)
{
    _Alignas(64) char buffers[2][FO_STRETCH * sizeof(double)];
    const fo_dtype type = arithmetic_of(t);
    const int64_t most = is_coded(t, type) ? FO_STRETCH : n;
    const array params = array_of(t, coding, 0), averages = {t->dtype.of.ema, t->ema, NULL};
    for (int64_t end = offset + n; offset < end; offset += most) {
        const int64_t m = end - offset < most ? end - offset : most;
        const void *param = decoded(s, &params, offset, m, buffers[0]);
        if (s->args->ema_starts) {
            put(s, &averages, offset, m, param, NULL);
        } else {
            void *ema = decoded(s, &averages, offset, m, buffers[1]);
            s->table->average[type](m, ema, param, s->args->ema_decay);
            put(s, &averages, offset, m, ema, NULL);
        }
    }
}

/* Where elements of the parameter are from `offset` on, and those of its slots; none of these is stored
 * in another type. */
static char *find_elements(const fo_step *s, const fo_tensor *t, const tensor_work *w,
                           int64_t offset, void **slot)
{
    const size_t start = (size_t)offset * w->item;
    for (int j = 0; j < FO_MAX_SLOTS; j++)
        slot[j] = t->slot[j] && j + 1 != w->by_row && j != s->plan->number
                      ? (char *)t->slot[j] + start
                      : NULL;
    return (char *)t->param + start;
}

/* Updates n elements from `offset` on, whose gradient is from `at` on. */
static void update_elements(const fo_step *s, const fo_tensor *t, const tensor_work *w,
                            int64_t offset, int64_t at, int64_t n, char *buffer)
{
    if (w->coded) {
        fo_update_coded(s, t, w, offset, at, n);
        return;
    }
    const void *grad = effective_grad(s, t, w, offset, at, n, buffer);
    void *slot[FO_MAX_SLOTS];
    update(w, n, find_elements(s, t, w, offset, slot), grad, slot);
}

/* ---- rows that have a gradient ---------------------------------------------------------------- */

/* Elements of one row; or of several that follow one another, in the parameter and as given. */
typedef struct {
    int64_t k, next;        /* distinct rows, from k on to before `next` */
    int64_t begin, end, at; /* elements, and where their gradient is given first */
} run;

/* Finds the run of row k within elements from `from` to `to`. */
static run find_run(const fo_rows *rows, int64_t k, int64_t from, int64_t to)
{
    const int64_t size = rows->row_size, *first = rows->first;
    const fo_row *given = &rows->sorted[first[k]];
    const int64_t start = given->row * size;
    run r = {k, k + 1, start > from ? start : from, start + size, 0};
    r.at = given->at * size + (r.begin - start);
    while (r.end < to && r.next < rows->n_distinct && first[r.next] - first[r.next - 1] == 1 &&
           first[r.next + 1] - first[r.next] == 1 && given[1].row == given->row + 1 &&
           given[1].at == given->at + 1) {
        given++;
        r.next++;
        r.end += size;
    }
    r.end = r.end < to ? r.end : to;
    return r;
}

/* A run's gradient; of a row that is given more than once, the sum in the order given. Without rows, it
 * is one of all elements. */
static const void *run_grad(const fo_step *s, const fo_tensor *t, const tensor_work *w,
                            const fo_rows *rows, const run *r, char *buffer)
{
    _Alignas(64) char more[FO_STRETCH * sizeof(double)];
    const int64_t n = r->end - r->begin;
    const void *grad = effective_grad(s, t, w, r->begin, r->at, n, buffer);
    if (!rows)
        return grad;
    const fo_row *given = &rows->sorted[rows->first[r->k]];
    const fo_row *const end = &rows->sorted[rows->first[r->k + 1]];
    if (end - given == 1)
        return grad;
    if (grad != buffer)
        memcpy(buffer, grad, (size_t)n * w->item);
    for (const int64_t first = given->at; ++given < end;) {
        const int64_t at = r->at + (given->at - first) * rows->row_size;
        for (int64_t i = 0; i < n; i += FO_STRETCH) {
            const int64_t m = n - i < FO_STRETCH ? n - i : FO_STRETCH;
            s->table->add[w->type](m, buffer + (size_t)i * w->item,
                                   effective_grad(s, t, w, r->begin + i, at + i, m, more));
        }
    }
    return buffer;
}

static void update_run(const fo_step *s, const fo_tensor *t, const tensor_work *w,
                       const fo_rows *rows, const run *r, char *buffer)
{
    const int64_t n = r->end - r->begin;
    if (!rows || rows->first[r->next] - rows->first[r->k] == r->next - r->k) {
        update_elements(s, t, w, r->begin, r->at, n, buffer);
        return;
    }
    fo_tensor summed = *t; /* whose gradient is in the buffer */
    summed.dtype.of.grad = w->type;
    summed.grad = (void *)run_grad(s, t, w, rows, r, buffer);
    update_elements(s, &summed, w, r->begin, 0, n, buffer);
}

/* ---- rows of which a slot has one value ------------------------------------------------------- */

/* At most `most` elements of a row, from `begin` on. */
static run part_of(const run *row, int64_t begin, int64_t most)
{
    const int64_t left = row->end - begin;
    return (run){row->k, row->next, begin, begin + (left < most ? left : most),
                 row->at + (begin - row->begin)};
}

/* Updates a row: the mean of its squares comes first, then its value, then its elements. */
static void update_row(const fo_step *s, const fo_tensor *t, const tensor_work *w,
                       const fo_rows *rows, const run *row, char *buffer)
{
    _Alignas(64) char decoding[FO_STRETCH * sizeof(double)];
    const array params = array_of(t, w->coding, 0);
    char *const at = (char *)t->slot[w->by_row - 1] + (size_t)(row->begin / t->width) * w->item;
    double sums[FO_LANES] = {0}, consts[FO_MAX_CONSTS], value;
    tensor_work own = *w;
    for (int64_t i = row->begin; i < row->end; i += FO_STRETCH) {
        const run part = part_of(row, i, FO_STRETCH);
        const int64_t n = part.end - part.begin;
        const void *grad = run_grad(s, t, w, rows, &part, buffer);
        const void *param = decoded(s, &params, part.begin, n, decoding);
        s->table->add_row[w->type](n, param, grad, w->consts, w->gscale, w->gmax, sums);
    }
    memcpy(consts, w->consts, sizeof consts);
    own.consts = consts;
    if (w->type == FO_F32) {
        float narrow;
        memcpy(&narrow, at, sizeof narrow);
        value = (double)narrow;
    } else {
        memcpy(&value, at, sizeof value);
    }
    fo_rule_row(s->plan->rule, fold(sums) / (double)t->width, &value, consts);
    const float narrow = (float)value;
    memcpy(at, w->type == FO_F32 ? (const void *)&narrow : &value, w->item);
    for (int64_t i = row->begin; i < row->end; i += FO_BLOCK) {
        const run part = part_of(row, i, FO_BLOCK);
        update_run(s, t, &own, rows, &part, buffer);
    }
}

/* ---- a block of a gradient of all elements ---------------------------------------------------- */

/* Where the first row begins that does so at this element or later. A row is updated with the block that
 * it begins in. */
static int64_t next_row(const fo_tensor *t, int64_t offset)
{
    return (offset + t->width - 1) / t->width * t->width;
}

void fo_update_block(const fo_step *s, const piece *p, int64_t block, int64_t offset, int64_t n,
                     char *buffer)
{
    const fo_tensor *t = p->tensor;
    const tensor_work *w = p->work;
    (void)block;
    const bool part = has_gradient(s, t) && !s->result->skipped;
    const bool by_row = part && !s->args->add && w->by_row != 0;
    if (by_row) {
        const int64_t end = next_row(t, offset + n);
        offset = next_row(t, offset);
        n = end - offset;
    }
    const int64_t at = offset + p->to_grad;
    if (by_row) {
        for (int64_t i = 0; i < n; i += t->width)
            update_row(s, t, w, NULL, &(run){0, 0, offset + i, offset + i + t->width, at + i},
                       buffer);
    } else if (part && s->args->add) {
        const array sums = sums_of(t);
        put(s, &sums, offset, n, fo_mean_grad(s, t, offset, at, n, buffer), NULL);
    } else if (part) {
        update_elements(s, t, w, offset, at, n, buffer);
    }
    if (t->ema && !s->result->skipped && !s->args->add)
        average(s, t, w->coding, offset, n);
    if (t->grad && s->args->zero_grad)
        fo_zero_grad(t, at, n);
}

/* ---- steps that rows have missed --------------------------------------------------------------- */

static const double zeros[FO_BLOCK]; /* their gradient, in either type */

static bool is_zero(const array *a, int64_t offset, int64_t n)
{
    static const char none[FO_BLOCK * sizeof(double)];
    const fo_storage *storage = &fo_storages[a->dtype];
    const char *at = (const char *)a->data + (size_t)offset * storage->bytes;
    return memcmp(at, none, (size_t)n * storage->bytes) == 0;
}

/* Takes the steps from number j on, in n elements. */
static void take_missed(const fo_step *s, const fo_tensor *t, const tensor_work *w, int64_t j,
                        int64_t begin, int64_t n)
{
    fo_update *const *const updates = s->table->update[w->type][s->plan->rule - fo_rules];
    void *slot[FO_MAX_SLOTS];
    char *const param = find_elements(s, t, w, begin, slot);
    for (; j < t->log->n; j++) {
        const fo_missed *m = &t->log->steps[j % FO_ROW_LOG];
        updates[m->variant](n, param, zeros, slot, m->consts, m->gscale, m->gmax);
    }
}

/* What a missed step makes of a tensor, of which the rest is known. */
static tensor_work work_of(const fo_step *s, const tensor_work *now, const fo_missed *m)
{
    tensor_work w = *now;
    w.update = s->table->update[w.type][s->plan->rule - fo_rules][m->variant];
    w.variant = (uint8_t)m->variant;
    w.slots = (uint8_t)slots_of(s->plan->rule, m->variant);
    w.by_row = slot_by_row(s->plan->rule, m->variant);
    w.consts = m->consts;
    w.gscale = m->gscale;
    w.gmax = m->gmax;
    w.step = m->step;
    return w;
}

/* The same where something is stored in another type: it is stored again after each step. And where a
 * slot has one value for the row, which has to be all of it. */
FO_APART void take_missed_apart(const fo_step *s, const fo_tensor *t, const tensor_work *now,
                                int64_t j, int64_t begin, int64_t n)
{
    static const ptrdiff_t shape[] = {PTRDIFF_MAX}, strides[] = {0}; /* the same zero, ever again */
    _Alignas(64) char buffer[FO_BLOCK * sizeof(double)];
    fo_tensor missed = *t;
    missed.grad = (void *)zeros;
    missed.grad_shape = shape;
    missed.grad_strides = strides;
    missed.dtype.of.grad = now->type;
    for (; j < t->log->n; j++) {
        const tensor_work w = work_of(s, now, &t->log->steps[j % FO_ROW_LOG]);
        missed.grad_ndim = w.by_row ? 1 : 0;
        if (w.by_row)
            update_row(s, &missed, &w, NULL, &(run){0, 0, begin, begin + n, 0}, buffer);
        else
            fo_update_coded(s, &missed, &w, begin, 0, n);
    }
}

void fo_catch_up(const fo_step *s, const fo_tensor *t, const tensor_work *now, int64_t row,
                 int64_t begin, int64_t end)
{
    const fo_row_log *log = t->log;
    const int64_t size = t->size / log->n_rows;
    const uint16_t behind = (uint16_t)((uint16_t)log->n - log->taken[row]);
    const fo_missed *first = &log->steps[(log->n - behind) % FO_ROW_LOG];
    if (behind != 0 && slot_by_row(s->plan->rule, first->variant)) {
        if (row * size >= begin) /* in the block that it begins in */
            take_missed_apart(s, t, now, log->n - behind, row * size, size);
        return;
    }
    begin = begin > row * size ? begin : row * size;
    end = end < (row + 1) * size ? end : (row + 1) * size;
    if (behind == 0)
        return;
    const int64_t n = end - begin;
    bool at_zero = true; /* all slots, so far */
    for (int j = 0; j < FO_MAX_SLOTS && at_zero; j++) {
        const array a = array_of(t, now->coding, 1 + j);
        at_zero = j == s->plan->number || !a.data || is_zero(&a, begin, n);
    }
    int64_t j = log->n - behind;
    while (j < log->n && at_zero && log->steps[j % FO_ROW_LOG].rests)
        j++;
    if (now->coded)
        take_missed_apart(s, t, now, j, begin, n);
    else
        take_missed(s, t, now, j, begin, n);
}

/* ---- a block of a gradient of some rows -------------------------------------------------------- */

/* Its elements are those from `begin` to `end`; its sum is that of all of them, zero but in these
 * rows. */
void fo_scan_rows(const fo_step *s, const piece *p, int64_t block, int64_t begin, int64_t end,
                  int64_t k, char *buffer)
{
    const fo_tensor *t = p->tensor;
    const tensor_work *w = p->work;
    const fo_rows *rows = w->rows;
    const double scale = unscale(s, t);
    double sums[FO_LANES] = {0};
    bool finite = true;
    for (run r; k < rows->n_distinct && fo_distinct_row(rows, k) * rows->row_size < end;
         k = r.next) {
        r = find_run(rows, k, begin, end);
        const void *grad = run_grad(s, t, w, rows, &r, buffer);
        const int64_t n = r.end - r.begin;
        s->table->add_squares[w->type](n, grad, scale, (r.begin - begin) % FO_LANES, sums);
        finite = finite && s->table->all_finite[w->type](n, grad, scale);
    }
    s->plan->block_sum[block] = fold(sums);
    s->plan->block_finite[block] = finite;
}

/* Has the processor fetch a row, which it cannot foresee. */
FO_INLINE void fetch_row(const fo_tensor *t, const tensor_work *w, const fo_rows *rows, int64_t k)
{
    const fo_row *given = &rows->sorted[rows->first[k]];
    const int64_t size = rows->row_size, n = size < MAX_FETCHED ? size : MAX_FETCHED;
    const array grads = {t->dtype.of.grad, t->grad, NULL};
    fo_fetch(&grads, given->at * size, n);
    for (int j = 0; j <= FO_MAX_SLOTS; j++) {
        const array a = array_of(t, w->coding, j);
        if (j == 0 || w->slots & FO_SLOT(j - 1))
            fo_fetch(&a, given->row * size, n);
    }
}

static void zero_rows(const fo_tensor *t, const fo_rows *rows, const run *r)
{
    const int64_t first = rows->sorted[rows->first[r->k]].at;
    if (r->next - r->k > 1) {
        fo_zero_grad(t, r->at, r->end - r->begin);
        return;
    }
    for (int64_t i = rows->first[r->k]; i < rows->first[r->next]; i++)
        fo_zero_grad(t, r->at + (rows->sorted[i].at - first) * rows->row_size, r->end - r->begin);
}

/* Updates a run, once it has taken the steps that it has missed. */
static void update_rows(const fo_step *s, const fo_tensor *t, const tensor_work *w,
                        const fo_rows *rows, const run *r, char *buffer)
{
    if (t->log && t->log->n != t->log->current)
        for (int64_t k = r->k; k < r->next; k++)
            fo_catch_up(s, t, w, fo_distinct_row(rows, k), r->begin, r->end);
    if (w->by_row == 0) {
        update_run(s, t, w, rows, r, buffer);
        return;
    }
    for (int64_t k = r->k, done = 0; k < r->next; k++, done += t->width) {
        const int64_t begin = r->begin + done;
        update_row(s, t, w, rows, &(run){k, k + 1, begin, begin + t->width, r->at + done}, buffer);
    }
}

void fo_update_rows(const fo_step *s, const piece *p, int64_t block, int64_t begin, int64_t end,
                    int64_t k, char *buffer)
{
    const fo_tensor *t = p->tensor;
    const tensor_work *w = p->work;
    const fo_rows *rows = w->rows;
    (void)block;
    if (w->by_row) {
        begin = next_row(t, begin);
        end = next_row(t, end);
        while (k < rows->n_distinct && fo_distinct_row(rows, k) * t->width < begin)
            k++;
    }
    for (run r; k < rows->n_distinct && fo_distinct_row(rows, k) * rows->row_size < end;
         k = r.next) {
        r = find_run(rows, k, begin, end);
        for (int64_t ahead = k; ahead < r.next; ahead++)
            if (ahead + ROWS_AHEAD < rows->n_distinct)
                fetch_row(t, w, rows, ahead + ROWS_AHEAD);
        if (!s->result->skipped)
            update_rows(s, t, w, rows, &r, buffer);
        if (s->args->zero_grad)
            zero_rows(t, rows, &r);
    }
    if (t->ema && !s->result->skipped)
        average(s, t, w->coding, begin, end - begin);
}
